"""Test sets of one's own, in every layout, read beside hand-written lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.small_corpora import write_lines

from lsmoe_ds.config.data import Corpus
from lsmoe_ds.data.formats import find_parts
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.texts import read_own

EN_DE, DE_EN, DE_FR, EN_FR = (Direction(*text.split("-")) for text in ("en-de", "de-en", "de-fr", "en-fr"))
TEXT = {"en": ["One.", "", "Three"], "de": ["Eins.", "Zwei", ""], "fr": ["Un.", "Deux", "Trois"]}


def moses(folder: Path) -> list[str]:
    for code, lines in TEXT.items():
        write_lines(folder / f"set.{code}", lines)
    return [str(folder / "set")]


def moses_folder(folder: Path) -> list[str]:
    for code, lines in TEXT.items():
        write_lines(folder / "m" / f"newstest.{code}", lines)
    return [str(folder / "m")]


def moses_folder_of_splits(folder: Path) -> list[str]:
    for code, lines in TEXT.items():
        write_lines(folder / "m" / f"train.{code}", ["no"])
        write_lines(folder / "m" / f"dev.{code}", ["no"])
        write_lines(folder / "m" / f"test.{code}", lines)
    return [str(folder / "m")]


def files(folder: Path) -> list[str]:
    write_lines(folder / "source-text.en", TEXT["en"])
    write_lines(folder / "newstest2019-ref.deu.txt", TEXT["de"])
    write_lines(folder / "french", TEXT["fr"])
    return [
        str(folder / "source-text.en"),
        str(folder / "newstest2019-ref.deu.txt"),
        f"fr={folder / 'french'}",
    ]


def table(folder: Path) -> list[str]:
    write_lines(
        folder / "set.tsv",
        [
            "deu_Latn\tid\ten\tfr",
            *("\t".join((d, "7", e, f)) for e, d, f in zip(*TEXT.values(), strict=True)),
        ],
    )
    return [str(folder / "set.tsv")]


def flores(folder: Path) -> list[str]:
    for code, lines in zip(("eng_Latn", "deu_Latn", "fra_Latn"), TEXT.values(), strict=True):
        write_lines(folder / "flores" / "devtest" / f"{code}.devtest", lines)
        write_lines(folder / "flores" / "dev" / f"{code}.dev", ["no"])
    return [str(folder / "flores")]


def ntrex(folder: Path) -> list[str]:
    where = folder / "NTREX" / "NTREX-128"
    write_lines(where / "newstest2019-src.eng.txt", TEXT["en"])
    for code, lines in (
        ("deu", TEXT["de"]),
        ("fra", TEXT["fr"]),
        ("eng-GB", ["no"]),
        ("eng-US", ["no"]),
        ("en", ["no"]),  # whatever is called English beside the source is a translation of it
        ("fra-CA", ["no"]),
    ):
        write_lines(where / f"newstest2019-ref.{code}.txt", lines)
    write_lines(where / "newstest2019-ref-2.deu.txt", ["no"])
    return [str(folder / "NTREX")]


LAYOUTS = [moses, moses_folder, moses_folder_of_splits, files, table, flores, ntrex]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_any_direction(layout, tmp_path) -> None:
    found = read_own(layout(tmp_path), "test", [EN_DE, DE_EN, DE_FR])
    assert found.by_direction == {
        EN_DE: (TEXT["en"], TEXT["de"]),
        DE_EN: (TEXT["de"], TEXT["en"]),
        DE_FR: (TEXT["de"], TEXT["fr"]),
    }
    assert not found.skipped and found.sentences == 9
    assert re.fullmatch("(set|m|source-text|flores|NTREX)-[0-9a-f]{8}", found.split)
    assert found.first(2).by_direction[EN_DE] == (TEXT["en"][:2], TEXT["de"][:2])
    assert read_own(layout(tmp_path), "test", [Direction("en", "ru"), EN_DE]).skipped == (
        Direction("en", "ru"),
    )


def test_ntrex_is_a_layout_of_corpora_too(tmp_path) -> None:
    write_lines(tmp_path / "newstest2019-src.eng.txt", ["a"])
    for code in ("zho-CN", "zho-TW", "por", "por-BR"):
        write_lines(tmp_path / f"newstest2019-ref.{code}.txt", [code])
    corpus = Corpus(path=tmp_path, format="ntrex")
    found = {
        part.bitext: (part.split, list(part.pairs()))
        for part in find_parts([corpus], tmp_path, ["en-zh_Hans", "en-pt", "en-pt_BR"])
    }
    assert found == {
        "en-zh_Hans": ("test", [("a", "zho-CN")]),
        "en-pt": ("test", [("a", "por")]),
        "en-pt_BR": ("test", [("a", "por-BR")]),
    }
    (tmp_path / "newstest2019-src.eng.txt").unlink()
    with pytest.raises(
        UserError, match=r"is not laid out as NTREX-128: it has no newstest2019-src\.eng\.txt"
    ):
        find_parts([corpus], tmp_path, ["en-pt"])


def test_the_split_of_a_set_that_has_several(tmp_path) -> None:
    assert read_own(flores(tmp_path), "dev", [EN_DE]).by_direction[EN_DE] == (["no"], ["no"])
    assert read_own(moses_folder_of_splits(tmp_path), "dev", [EN_DE]).by_direction[EN_DE] == (["no"], ["no"])
    for one_set in (moses, files, table):
        with pytest.raises(UserError, match="is one set of text, not dev and test: leave --split out"):
            read_own(one_set(tmp_path), "dev", [EN_DE])
    with pytest.raises(UserError, match="has no dev text: choose the other --split"):
        read_own(ntrex(tmp_path), "dev", [EN_DE])
    with pytest.raises(UserError, match="'train' is no held-out text"):
        read_own(moses(tmp_path), "train", [EN_DE])


def test_sets_of_one_name_are_told_apart_by_their_text(tmp_path) -> None:
    first, again = (read_own(moses(tmp_path), "test", [EN_DE]).split for _ in range(2))
    write_lines(tmp_path / "set.de", ["Eins.", "Zwei", "!"])
    assert first == again != read_own([str(tmp_path / "set")], "test", [EN_DE]).split
    write_lines(tmp_path / "set.fr", ["of another direction", "", ""])
    assert read_own([str(tmp_path / "set")], "test", [EN_DE]).split != first


def test_text_that_is_named_like_training_text_is_said(tmp_path, capsys) -> None:
    for code, lines in TEXT.items():
        write_lines(tmp_path / "m" / f"train.{code}", lines)
    assert read_own([str(tmp_path / "m")], "test", [EN_DE]).sentences == 3
    assert (
        f"lsmoe: --test {tmp_path}/m: train.de is scored as a test set, and is named like training text\n"
        in capsys.readouterr().err
    )
    read_own(moses(tmp_path), "test", [EN_DE])
    assert capsys.readouterr().err == ""


def test_a_file_named_by_another_code_of_its_language(tmp_path) -> None:
    write_lines(tmp_path / "a.no", ["Ja."])
    write_lines(tmp_path / "a.en", ["Yes."])
    direction = Direction("en", "nb")
    for paths in (["no={}/a.no", "eng_Latn={}/a.en"], ["{}/a.no", "{}/a.en"], ["{}/a"]):
        found = read_own([path.format(tmp_path) for path in paths], "test", [direction])
        assert found.by_direction == {direction: (["Yes."], ["Ja."])}


def test_what_is_no_test_set_is_refused(tmp_path) -> None:
    write_lines(tmp_path / "set.en", TEXT["en"])
    write_lines(tmp_path / "set.de", TEXT["de"][:2])
    write_lines(tmp_path / "set.no-code", ["x"])
    write_lines(tmp_path / "f" / "first.en", ["x"])
    write_lines(tmp_path / "f" / "first.de", ["x"])
    write_lines(tmp_path / "f" / "second.en", ["x"])
    write_lines(tmp_path / "f" / "second.de", ["x"])
    (tmp_path / "bad.en").write_bytes(b"\xff\n")
    write_lines(tmp_path / "bad.de", ["x"])
    for paths, message in (
        (["set"], r"set\.de has 2 lines but .*set\.en has 3"),
        (["none"], r"there is no such folder and there are no files .*none\.CODE: give a folder"),
        (["set.en"], r"set\.en is one file: give a folder, a TSV file, the common part of file names"),
        (["en=set.en"], "is the text of one language"),
        (["set.en", "none.de"], r"there is no file .*none\.de"),
        (["set.en", "en=set.de"], r"--test names two files for en: .*set\.en and .*set\.de"),
        (
            ["set.en", "set.no-code"],
            "'no-code' is not a language code: write --test CODE=FILE|there is nothing to score",
        ),
        (["f"], r"f holds more than one set, such as .*f/first and .*f/second: name one"),
        (["bad"], r"bad\.en, line 1: not UTF-8"),
    ):
        given = [re.sub(r"^(\w+=|)", rf"\g<1>{tmp_path}/", path) for path in paths]
        with pytest.raises(UserError, match=message):
            read_own(given, "test", [EN_DE])
    with pytest.raises(UserError, match="there is nothing to score: en-fr has no text in set"):
        read_own([str(tmp_path / "set")], "test", [EN_FR])

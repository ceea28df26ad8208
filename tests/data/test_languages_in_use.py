"""Corpora and runs whose languages are spelled by other conventions."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from support.language_codes import NLLB
from support.small_corpora import recipe as small_recipe
from support.small_corpora import write_fetched, write_lines
from support.small_run import TARGET_TOP2, make_recipe, train_and_save, write_corpus

from lsmoe_ds import cli, notices
from lsmoe_ds.checkpoint.run_folder import check_run, open_run
from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.config.data import Corpus
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.formats import find_parts, search
from lsmoe_ds.data.notices import why_no_text
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.export.subnetwork import extract_stored
from lsmoe_ds.inference.load import load
from lsmoe_ds.languages import normalize_code


@pytest.fixture(autouse=True)
def nothing_said_yet():
    notices.notice.cache_clear()


# Corpora.


def found(path: Path, layout: Any, *bitexts: str, **given: str) -> list[TextPart]:
    return find_parts([Corpus(path=path, format=layout, **given)], path, bitexts)


def names(parts: list[TextPart]) -> list[list[str]]:
    return [[file.name for file in part.files] for part in parts]


def write_files(folder: Path, *files: str) -> None:
    for name in files:
        write_lines(folder / name, [name])


def test_files_and_columns_of_all_conventions_are_read_and_said_in_one_line(tmp_path, capsys):
    write_files(tmp_path, "a.deu_Latn", "a.eng", "a.zho_Hans", "a.zh-TW")
    assert names(found(tmp_path / "a", "moses", "de-en", "en-zh_Hans", "de-zh_Hant")) == [
        ["a.deu_Latn", "a.eng"], ["a.eng", "a.zho_Hans"], ["a.deu_Latn", "a.zh-TW"]
    ]  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].endswith(
        "a: deu_Latn is read as de, eng is read as en, zho_Hans is read as zh_Hans, zh-TW is read as zh_Hant"
    )
    write_files(tmp_path, "b.deu", "b.en")
    corpora = [Corpus(path=tmp_path / stem, format="moses") for stem in "ab"]
    assert len(find_parts(corpora, tmp_path, ["de-en"])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == f"lsmoe: corpus {tmp_path}/a: deu_Latn is read as de, eng is read as en; corpus {tmp_path}/b: deu "
        "is read as de"
    )
    write_lines(tmp_path / "x.tsv", ["eng_Latn\tpor-BR\tJPN", "Hello\tOi\tやあ"])
    (part,) = found(tmp_path / "x.tsv", "tsv", "ja-pt_BR")
    assert list(part.pairs()) == [("やあ", "Oi")]


def test_many_codes_are_said_briefly(tmp_path, capsys):
    for code in NLLB[:40]:
        write_lines(tmp_path / "dev" / f"{code}.dev", ["x"])
    write_lines(tmp_path / "dev" / "eng_Latn.dev", ["x"])
    bitexts = [Direction("en", normalize_code(code)).bitext for code in NLLB[:40]]
    assert len(found(tmp_path, "flores", *bitexts)) == 40
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(" and 31 more") and len(said) < 400


def test_of_two_spellings_the_closest_is_read_and_the_other_named(tmp_path, capsys):
    write_files(tmp_path, "a.en", "a.eng_Latn", "a.no", "a.nb")
    assert names(found(tmp_path / "a", "moses", "en-nb")) == [["a.en", "a.nb"]]
    assert "en is read from a.en, not from a.eng_Latn, which means the same" in capsys.readouterr().err
    assert names(found(tmp_path / "a", "moses", "en-no")) == [["a.en", "a.no"]]
    assert names(found(tmp_path / "a", "moses", "en-nb", source="eng_Latn", target="nb")) == [
        ["a.eng_Latn", "a.nb"]
    ]


def test_two_spellings_that_are_as_close_are_refused(tmp_path):
    write_files(tmp_path, "a.deu", "a.ger", "a.en")
    with pytest.raises(
        UserError,
        match=r"both a\.deu and a\.ger are de: remove one of them, or name one as 'source' or 'target'",
    ):
        found(tmp_path / "a", "moses", "de-en")
    assert names(found(tmp_path / "a", "moses", "de-en", source="ger")) == [["a.ger", "a.en"]]
    write_lines(tmp_path / "x.tsv", ["en\tde\tde", "a\tb\tc"])
    with pytest.raises(UserError, match=r"both column 2 \(de\) and column 3 \(de\) are de"):
        found(tmp_path / "x.tsv", "tsv", "de-en")


def test_text_in_norwegian_serves_one_code_only(tmp_path, capsys):
    write_files(tmp_path, "a.en", "a.no")
    assert names(found(tmp_path / "a", "moses", "en-nb")) == [["a.en", "a.no"]]
    assert "a: no is read as nb" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"a\.no is read as nb and as no: write one of these codes"):
        found(tmp_path / "a", "moses", "en-nb", "en-no")


def test_opus_and_fetched_corpora_by_other_codes(tmp_path, capsys):
    for pair, codes in (("en-pt", ("en", "pt")), ("en-zh", ("en", "zh")), ("en-de", ("en", "de"))):
        for code in codes:
            write_lines(tmp_path / "supervised" / pair / f"opus.{pair}-train.{code}", ["x"])
    assert names(found(tmp_path, "opus100", "en-pt", "en-zh_Hans", "de-en")) == [
        ["opus.en-pt-train.en", "opus.en-pt-train.pt"], ["opus.en-zh-train.en", "opus.en-zh-train.zh"],
        ["opus.en-de-train.de", "opus.en-de-train.en"],
    ]  # fmt: skip
    write_fetched(tmp_path, "django", {"de-en": [("Hallo", "Hello")], "en-sw_KE": [("Hello", "Jambo")]})
    parts = find_parts(["django"], tmp_path, ["de-en", "en-sw"])
    assert [list(part.pairs()) for part in parts] == [[("Hallo", "Hello")], [("Hello", "Jambo")]]
    assert list(find_parts(["django"], tmp_path, ["eng_Latn-de"])[0].pairs()) == [("Hello", "Hallo")]


def test_iwslt_keeps_pairs_of_one_folder_apart(tmp_path):
    for name in ("de-en.de", "de-en.en", "en-pt-br.en", "en-pt-br.pt-br"):
        write_lines(tmp_path / f"train.tags.{name}", [name])
        write_lines(tmp_path / f"IWSLT14.TED.dev2010.{name}.xml", [f"<seg>{name}</seg>"])
    parts = found(tmp_path, "iwslt", "de-en", "en-pt_BR")
    texts = {part.bitext: list(part.pairs()) for part in parts}
    assert texts == {"de-en": [("de-en.de", "de-en.en")], "en-pt_BR": [("en-pt-br.en", "en-pt-br.pt-br")]}
    assert sorted((part.bitext, part.split) for part in parts) == [
        (b, s) for b in ("de-en", "en-pt_BR") for s in ("dev", "train")
    ]


def test_a_corpus_in_another_variety_is_not_mixed_in_but_named(tmp_path):
    write_files(tmp_path, "a.en", "a.por_Latn", "a.zh_TW")
    corpora = [Corpus(path=tmp_path / "a", format="moses")]
    assert find_parts(corpora, tmp_path, ["en-pt_BR"]) == []

    def why(bitext: str) -> str:
        return why_no_text(search(corpora, tmp_path, [bitext]), bitext)

    assert why("en-pt_BR") == f" (corpus {tmp_path}/a has pt (Portuguese, a.por_Latn): write pt)"
    assert "has zh_Hant (Chinese (Traditional), a.zh_TW): write zh_Hant" in why("en-zh_Hans")
    assert why("it-sw") == ""
    write_files(tmp_path, "b.en")
    found = search([Corpus(path=tmp_path / "b", format="moses")], tmp_path, ["de-en"])
    assert why_no_text(found, "de-en") == f" (corpus {tmp_path}/b has b.en but no file for de)"
    with pytest.raises(
        UserError,
        match=r"no text for en-pt_BR in the corpora of the recipe \(.*\) \(corpus .*a has pt .*: write pt\)",
    ):
        prepare(
            small_recipe(tmp_path, corpora=[{"path": tmp_path / "a", "format": "moses"}], languages=["pt_BR"])
        )


# Runs from before codes were resolved.


def call(monkeypatch, *arguments: str, text: str = "") -> None:
    monkeypatch.setattr(sys, "argv", ["lsmoe", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code


def old_run(pool, folder: Path) -> Path:
    """Train and return a run with the codes eng_Latn, hi and iw, whose order is not that of en, he and hi."""
    write_corpus(folder)
    text = folder / "text.tsv"
    text.write_text(
        text.read_text(encoding="utf-8").replace("en\tde\tfr", "eng_Latn\thi\tiw", 1), encoding="utf-8"
    )
    value = make_recipe(folder, TARGET_TOP2, TARGET_TOP2).model_dump(mode="json")
    pairs = [f"eng_Latn-{code}" for code in ("hi", "iw")] + [f"{code}-eng_Latn" for code in ("hi", "iw")]
    value["data"] |= {
        "languages": ["eng_Latn", "hi", "iw"],
        "directions": pairs,
        "cleaning": {"script_share": 0.0},
    }
    recipe = Recipe.model_validate(value)
    data = prepare(recipe)
    open_run(recipe, folder / "run", data.folder / "vocabulary.model")
    pool.run(1, train_and_save, recipe, folder / "run", data.vocabulary.size)
    return folder / "run"


def test_a_run_keeps_the_codes_that_it_was_trained_with(pool, tmp_path, monkeypatch, capsys):
    run = old_run(pool, tmp_path)
    assert (
        Vocabulary.load(run / "vocabulary.model").codes
        == load_recipe(run / "recipe.yaml").languages.codes
        == ("eng_Latn", "hi", "iw")
    )
    own = load_recipe(run / "recipe.yaml")
    check_run(own, run, run / "vocabulary.model")
    (tmp_path / "mine.yaml").write_text(own.to_yaml(), encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"data\.directions \['eng_Latn-hi', .* continue it with its own recipe, .*run/recipe\.yaml, or",
    ):
        check_run(load_recipe(tmp_path / "mine.yaml"), run, run / "vocabulary.model")
    translated = []
    capsys.readouterr()
    for source, target in (("eng_Latn", "iw"), ("en", "he"), ("en-US", "heb_Hebr")):
        call(
            monkeypatch,
            "translate",
            str(run),
            "--from",
            source,
            "--to",
            target,
            "--beam",
            "1",
            text="bafe dogi\n",
        )
        translated.append(capsys.readouterr().out)
    assert translated[0] == translated[1] == translated[2] and translated[0].strip()
    call(
        monkeypatch,
        "evaluate",
        str(run),
        "--directions",
        "en-he,hi-en",
        "--limit",
        "2",
        "--beam",
        "1",
        "--json",
    )
    scores = ScoreTable.from_json(capsys.readouterr().out)
    assert [str(score.direction) for score in scores.directions] == ["eng_Latn-iw", "hi-eng_Latn"]
    assert {
        "into_english",
        "out_of_english",
    } <= scores.averages().keys() and "between_others" not in scores.averages()
    dense = tmp_path / "dense"
    call(
        monkeypatch,
        "convert",
        str(run),
        "--as",
        "dense",
        "--from",
        "en",
        "--to",
        "he",
        "--out",
        str(dense),
        "--check",
        "2",
    )
    assert load(dense).recipe.data.directions == ["eng_Latn-iw"]
    assert extract_stored(find_model(run), Direction("en", "he"))[1].data.directions == ["eng_Latn-iw"]
    capsys.readouterr()
    call(
        monkeypatch, "translate", str(dense), "--from", "en", "--to", "iw", "--beam", "1", text="bafe dogi\n"
    )
    assert capsys.readouterr().out == translated[0]

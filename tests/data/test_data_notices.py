"""What preparing decides by itself is said, kept in the manifest and shown again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.small_corpora import (
    flores,
    moses,
    notices,
    pairs,
    recipe,
    sentence,
    table,
    write_fetched,
    write_lines,
)

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.summary import show
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted, listed


def test_nothing_to_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = recipe(tmp_path, corpora=[table(tmp_path, "a.tsv", "de", "en", 200)], languages=["de"])
    assert notices(settings, capsys) == []
    assert show(settings).table().caption is None


@pytest.mark.parametrize(("count", "sets"), [(9, 0), (10, 1)])
def test_a_bitext_without_dev_and_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, sets: int
) -> None:
    corpora = [
        table(tmp_path, "a.tsv", "de", "en", 200),
        table(tmp_path, "b.tsv", "en", "fr", count, start=500),
    ]
    settings = recipe(tmp_path, corpora=corpora, languages=["de", "fr"])
    (said,) = notices(settings, capsys)
    sizes = {(row.direction, row.split): row.pairs for row in show(settings).rows}
    assert (sizes["en-fr", "dev"], sizes["en-fr", "test"]) == (sets, sets)
    if sets:
        assert said.startswith("smaller sets than the 10 dev and 20 test sentences") and said.endswith(
            "the other: en-fr 1 and 1"
        )
    else:
        assert (
            said
            == "warning: no dev or test set for en-fr (9 pairs): a set is at most a tenth of the pairs after "
            "cleaning"
        )


def test_sets_that_are_cut_to_a_tenth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora = [
        table(tmp_path, "a.tsv", "de", "en", 200),
        table(tmp_path, "b.tsv", "en", "fr", 155, start=500),
    ]
    (said,) = notices(recipe(tmp_path, corpora=corpora, languages=["de", "fr"]), capsys)
    assert said.endswith(": en-fr 10 and 15")


def test_none_are_missed_where_none_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora = [table(tmp_path, "a.tsv", "de", "en", 200), table(tmp_path, "b.tsv", "en", "fr", 9, start=500)]
    (said,) = notices(
        recipe(tmp_path, corpora=corpora, languages=["de", "fr"], held_out={"dev": 0, "test": 5}), capsys
    )
    assert said.startswith("warning: no test set for en-fr (9 pairs)")


def test_a_corpus_that_adds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One has other languages, one only what the first has too, one only what cleaning drops."""
    corpora = [
        table(tmp_path, "a.tsv", "de", "en", 200),
        table(tmp_path, "fr.tsv", "en", "fr", 20),
        table(tmp_path, "copy.tsv", "de", "en", 50),
    ]
    write_lines(tmp_path / "short.tsv", ["de\ten", *(f"kurz {n}\tshort {n}" for n in range(5))])
    corpora.append({"path": str(tmp_path / "short.tsv"), "format": "tsv"})
    said = notices(recipe(tmp_path, corpora=corpora, languages=["de"]), capsys)
    assert said[0] == f"warning: corpus {tmp_path}/fr.tsv has no text for any direction of the recipe"
    assert [each.split("/")[-1] for each in said[1:]] == [
        f"{name}.tsv adds nothing: each of its pairs was dropped by cleaning, as a copy or as held out"
        for name in ("copy", "short")
    ]


@pytest.mark.parametrize(
    ("quoted", "says"),
    [(19, None), (20, "10% of the rows have a field"), (200, "100% of the rows have a field")],
)
def test_fields_in_quotes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quoted: int, says: str | None
) -> None:
    lines = [
        f'"{a}"\t{b}\t{a}' if number < quoted else f"{a}\t{b}\t"
        for number, (a, b) in enumerate(pairs("de", "en", 200))
    ]
    write_lines(tmp_path / "x.tsv", ["de\ten\tfr", *lines])
    corpora = [{"path": str(tmp_path / "x.tsv"), "format": "tsv"}]
    settings = recipe(
        tmp_path,
        corpora=corpora,
        languages=["de", "fr"],
        cleaning={"script_share": 0.0},
        held_out={"dev": 0, "test": 0},
    )
    said = [each for each in notices(settings, capsys) if "quote" in each]
    assert [each.startswith(f"warning: {tmp_path}/x.tsv: {says}") for each in said] == (
        [True] if says else []
    )


def test_a_model_to_start_from_with_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said where sets are chosen by other settings than those that the base was prepared by."""
    corpora = [table(tmp_path, "a.tsv", "de", "en", 200)]
    base = recipe(tmp_path, "base", corpora=corpora, languages=["de"])
    (tmp_path / "base").mkdir()
    (tmp_path / "base/recipe.yaml").write_text(base.to_yaml(), encoding="utf-8")
    vocabulary = {"file": str(prepare(base).folder / "vocabulary.model"), "size": 120}

    def tuned(name: str, **data: Any) -> list[str]:
        made = recipe(
            tmp_path, name, **{"corpora": corpora, "languages": ["de"], "vocabulary": vocabulary, **data}
        )
        training = made.training.model_copy(update={"start_from": tmp_path / "base"})
        return notices(made.model_copy(update={"training": training}), capsys)

    assert tuned("same") == []
    same, there = (tmp_path / f"prepared/{name}/test/de-en/en.txt" for name in ("same", "base"))
    assert same.read_text(encoding="utf-8") == there.read_text(encoding="utf-8")
    (said,) = tuned(
        "other",
        corpora=[table(tmp_path, "b.tsv", "de", "en", 150, start=100)],
        held_out={"dev": 5, "test": 5},
    )
    assert said.startswith(
        f"warning: 'data.corpora', 'data.held_out' are not as in {tmp_path}/base/recipe.yaml: that model may "
        "have been"
    )
    assert tuned("none", held_out={"dev": 0, "test": 0}) == []  # no set is chosen


def test_languages_that_a_corpus_of_many_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fetched(
        tmp_path, "django", {name: pairs(*name.split("-"), 200) for name in ("de-en", "en-fr", "en-ru")}
    )
    write_lines(
        tmp_path / "corpora/django/en-pt_BR.tsv",
        ["\t".join(pair) for pair in pairs("en", "fr", 200, start=500)],
    )
    write_fetched(tmp_path, "django", {})
    corpora = ["django", flores(tmp_path / "f", 5, 900, ("deu_Latn", "eng_Latn", "por_Latn"))]
    said = notices(
        recipe(tmp_path, corpora=corpora, languages=["de", "ru", "pt_BR"], cleaning={"script_share": 0.0}),
        capsys,
    )
    assert (
        f"corpus {tmp_path}/f has no text in pt_BR, ru; it has pt (Portuguese, por_Latn.devtest), which is "
        "another variety" in said
    )
    assert len(said) == 2


def test_a_direction_without_training_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moses(tmp_path / "m", "train", 200)
    moses(tmp_path / "m", "test", 5, start=300, codes=("de", "fr"))
    corpora = [{"path": str(tmp_path / "m"), "format": "moses"}]
    settings = recipe(tmp_path, corpora=corpora, languages=[], directions=["de-en", "de-fr"])
    said = notices(settings, capsys)
    assert "warning: there is no training text for de-fr: these are only evaluated (zero-shot)" in said


def test_long_lists_are_cut() -> None:
    assert listed("abcdefgh") == "a, b, c, d, e, f, g, h"
    assert listed("aabcdefghij") == "a, b, c, d, e, f, g, h and 2 more"


def test_one_is_no_plural() -> None:
    assert [counted(number, "pair") for number in (0, 1, 2000)] == ["0 pairs", "1 pair", "2,000 pairs"]


def with_table(tmp_path: Path) -> Recipe:
    return recipe(
        tmp_path, corpora=["django", table(tmp_path, "x.tsv", "de", "en", 50, start=500)], languages=["de"]
    )


CASES: list[tuple[list[str] | None, str]] = [
    (["fr\ten", "Bonjour\tHello"], "x.tsv has no more text for the recipe's directions"),
    (
        ["Hallo\tHello", "Ja\tYes"],
        (
            r"corpus .*x.tsv can no longer be read: .*x.tsv, line 1 names no languages \(found 'Hallo',"
            r" 'Hello'\)"
        ),
    ),
    (["no tab"], "corpus .*x.tsv can no longer be read: .*x.tsv, line 1: two or more language codes"),
    (["de\ten", "Hallo"], "x.tsv has changed"),
]


@pytest.mark.parametrize(("lines", "says"), CASES)
def test_a_corpus_that_cannot_be_read_any_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], says: str
) -> None:
    """A changed corpus is not called "up to date": the data were prepared from other text. They stay, and
    `show` says so too.
    """
    write_fetched(tmp_path, "django", {"de-en": pairs("de", "en", 200)})
    settings = with_table(tmp_path)
    before = prepare(settings).manifest
    write_lines(tmp_path / "x.tsv", lines)
    (said,) = show(settings).notices
    assert re.match(f"warning: 'lsmoe data prepare' would prepare these data again: .*{says}", said)
    capsys.readouterr()
    if "fr" in lines[0]:  # a corpus of other languages is no error, but it is said that it adds nothing
        assert prepare(settings).manifest["notices"] == [
            f"warning: corpus {tmp_path}/x.tsv has no text for any direction of the recipe"
        ]
    else:
        with pytest.raises(UserError, match=r"x.tsv, line \d"):
            prepare(settings)
        assert PreparedData.of(settings).manifest == before
    assert "up to date" not in capsys.readouterr().err


def test_a_corpus_that_is_gone_is_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was prepared of it is good as it is; the others are compared all the same."""
    write_fetched(tmp_path, "django", {"de-en": pairs("de", "en", 200)})
    settings = with_table(tmp_path)
    prepare(settings)
    shutil.rmtree(tmp_path / "corpora")
    capsys.readouterr()
    prepare(settings)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "up to date" in said
        and "corpus django is not compared with what was prepared: corpus django is not fetched" in said
    )
    assert "corpus django is not compared" in show(settings).notices[-1]
    write_lines(tmp_path / "x.tsv", ["de\ten", f"{sentence('de', 1)}\t{sentence('en', 1)}"])
    with pytest.raises(UserError, match="lsmoe data fetch django"):
        prepare(settings)
    assert "x.tsv has changed" in capsys.readouterr().err


def test_held_out_text_only(tmp_path: Path) -> None:
    corpora = [flores(tmp_path / "f", 15, start=0)]
    with pytest.raises(UserError, match=r"no training pair is left: .*/f\) only dev and test sets remain"):
        prepare(recipe(tmp_path, corpora=corpora, languages=["de"]))


def test_training_text_that_cleaning_drops_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moses(tmp_path / "m", "test", 12, start=300)
    moses(tmp_path / "m", "train", 200)
    corpora = [{"path": str(tmp_path / "m"), "format": "moses"}]
    never = {"min_words": 190}
    with pytest.raises(
        UserError,
        match=r"no training pair of de-en is left after cleaning \(read 200, short 200\): give more text or",
    ):
        prepare(recipe(tmp_path, corpora=corpora, languages=["de"], cleaning=never))
    write_fetched(tmp_path, "django", {"en-fr": pairs("en", "fr", 200)})
    vocabulary = (
        prepare(recipe(tmp_path, "other", corpora=corpora, languages=["de"])).folder / "vocabulary.model"
    )
    settings = {"vocabulary": {"file": vocabulary, "size": 120}, "cleaning": never}
    said = notices(recipe(tmp_path, corpora=corpora, languages=["de"], **settings), capsys)
    assert said[-1].startswith(
        "warning: cleaning and holding out leave no training text of de-en: these are only evaluated"
    )


def test_held_out_text_only_with_a_vocabulary(tmp_path: Path) -> None:
    """Enough to evaluate an imported model."""
    write_fetched(tmp_path, "django", {"de-en": pairs("de", "en", 200)})
    vocabulary = prepare(recipe(tmp_path, "first", languages=["de"])).folder / "vocabulary.model"
    corpora = [flores(tmp_path / "f", 15, start=0)]
    data = prepare(
        recipe(tmp_path, corpora=corpora, languages=["de"], vocabulary={"file": vocabulary, "size": 120})
    )
    assert data.manifest["bitexts"]["de-en"]["test"]["pairs"] == 15

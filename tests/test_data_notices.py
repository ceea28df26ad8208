"""What preparing decides by itself is said, kept in the manifest and shown again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_corpora import pairs, recipe, sentence, write_fetched, write_lines

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.formats import split_of
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.summary import show
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.texts import read_own
from lsmoe_ds.languages import Direction
from lsmoe_ds.notices import counted, listed

SPELLED = {"deu_Latn": "de", "eng_Latn": "en", "fra_Latn": "fr", "por_Latn": "fr"}


def table(folder: Path, name: str, first: str, second: str, count: int, start: int = 0) -> dict[str, str]:
    """A corpus of one table."""
    content = pairs(first, second, count, start)
    write_lines(folder / name, [f"{first}\t{second}", *("\t".join(pair) for pair in content)])
    return {"path": str(folder / name), "format": "tsv"}


def moses(folder: Path, stem: str, count: int, start: int = 0, codes: tuple[str, str] = ("de", "en")) -> None:
    for side, code in enumerate(codes):
        write_lines(folder / f"{stem}.{code}", [pair[side] for pair in pairs(*codes, count, start)])


def notices(settings: Recipe, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `prepare` says between its first and its last lines; `show` says the same."""
    data = prepare(settings)
    said = capsys.readouterr().err
    found: list[str] = data.manifest["notices"]
    assert all(notice in said for notice in found)
    shown = show(settings)
    assert shown.notices == tuple(found)
    assert shown.to_dict()["notices"] == shown.notices
    caption = shown.table().caption
    assert str(caption or "") == "\n".join(found)
    return found


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


def flores(
    folder: Path,
    count: int,
    start: int,
    codes: Sequence[str] = ("deu_Latn", "eng_Latn"),
    split: str = "devtest",
) -> dict[str, str]:
    for code in codes:
        lines = [sentence(SPELLED[code], number) for number in range(start, start + count)]
        write_lines(folder / split / f"{code}.{split}", lines)
    return {"path": str(folder), "format": "flores"}


def test_which_of_two_test_sets_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moses(tmp_path / "m", "train", 200)
    moses(tmp_path / "m", "test", 12, start=300)
    corpora = [{"path": str(tmp_path / "m"), "format": "moses"}, flores(tmp_path / "f", 15, start=400)]
    settings = recipe(tmp_path, corpora=corpora, languages=["de"])
    assert notices(settings, capsys) == [
        f"corpus {tmp_path}/m brings the test set of de-en: test.de, test.en",
        f"the test set of de-en is that of {tmp_path}/m; that of {tmp_path}/f is only kept out of training",
    ]
    assert {row.pairs for row in show(settings).rows if row.split == "test"} == {12}
    other = recipe(tmp_path, "other", corpora=corpora[::-1], languages=["de"])
    assert notices(other, capsys) == [
        f"corpus {tmp_path}/f brings the test set of de-en: deu_Latn.devtest, eng_Latn.devtest",
        f"the test set of de-en is that of {tmp_path}/f; that of {tmp_path}/m is only kept out of training",
    ]
    assert {row.pairs for row in show(other).rows if row.split == "test"} == {15}


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_published_set_without_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str]
) -> None:
    moses(tmp_path / "m", "train", 200)
    for code in ("de", "en"):
        write_lines(tmp_path / f"m/test.{code}", lines)
    settings = recipe(tmp_path, corpora=[{"path": str(tmp_path / "m"), "format": "moses"}], languages=["de"])
    (said,) = notices(settings, capsys)
    assert (
        said == f"warning: the test set of de-en in corpus {tmp_path}/m has no sentence (test.de and test.en)"
    )
    assert {row.pairs for row in show(settings).rows if row.split == "test"} == {
        20
    }  # held out of the training text instead


def test_empty_training_text_beside_other_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moses(tmp_path / "m", "train", 200)
    moses(tmp_path / "m", "more", 0)
    write_lines(tmp_path / "x.tsv", ["de\ten"])
    corpora = [
        {"path": str(tmp_path / "m"), "format": "moses"},
        {"path": str(tmp_path / "x.tsv"), "format": "tsv"},
    ]
    assert notices(recipe(tmp_path, corpora=corpora, languages=["de"]), capsys) == [
        f"warning: the training text of de-en in corpus {tmp_path}/m has no sentence (more.de and more.en)",
        f"warning: the training text of de-en in corpus {tmp_path}/x.tsv has no sentence (x.tsv)",
    ]


def test_no_text_but_empty_files(tmp_path: Path) -> None:
    moses(tmp_path, "train", 0)
    with pytest.raises(
        UserError,
        match=r"there is no text for de-en: the files of the corpora are empty \(train.de, train.en\)",
    ):
        prepare(
            recipe(tmp_path, corpora=[{"path": str(tmp_path / "train"), "format": "moses"}], languages=["de"])
        )


@pytest.mark.parametrize(("gone", "there"), [("en", "de"), ("de", "en")])
def test_one_side_of_a_published_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: str, there: str
) -> None:
    moses(tmp_path / "m", "train", 200)
    moses(tmp_path / "m", "test", 12, start=300)
    (tmp_path / f"m/test.{gone}").unlink()
    (said,) = notices(
        recipe(tmp_path, corpora=[{"path": str(tmp_path / "m"), "format": "moses"}], languages=["de"]), capsys
    )
    assert (
        said
        == f"warning: corpus {tmp_path}/m has test.{there} but no file for {gone} beside it: no test set of "
        "de-en is read from there"
    )


def test_one_side_of_one_of_two_published_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moses(tmp_path / "m", "train", 200)
    for year in (2013, 2014):
        moses(tmp_path / "m", f"newstest{year}", 12, start=year)
    (tmp_path / "m/newstest2014.en").unlink()
    said = notices(
        recipe(tmp_path, corpora=[{"path": str(tmp_path / "m"), "format": "moses"}], languages=["de"]), capsys
    )
    assert "has newstest2014.de but no file for en beside it" in said[0] and len(said) == 2


def test_one_side_of_a_set_in_many_languages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said of a language that the corpus has otherwise, not of every language that it lacks."""
    corpora = [
        table(tmp_path, "a.tsv", "de", "en", 200),
        table(tmp_path, "b.tsv", "en", "fr", 200, start=500),
    ]
    flores(tmp_path / "f", 5, 900, ("deu_Latn", "eng_Latn", "fra_Latn"), "dev")
    corpora.append(flores(tmp_path / "f", 5, 950, ("eng_Latn", "fra_Latn")))
    for languages in (["de", "fr"], ["de"]):
        said = notices(recipe(tmp_path, languages[-1], corpora=corpora, languages=languages), capsys)
        assert (
            said[len(languages) % 2]
            == f"warning: corpus {tmp_path}/f has eng_Latn.devtest but no file for de beside it: no test set "
            "of de-en is read from there"
        )
        assert sum("beside" in each for each in said) == 1


def test_text_of_other_pairs_is_nothing_amiss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One folder has a pair more than the recipe, and a test set of one of its pairs; one corpus has one
    pair.
    """
    moses(tmp_path / "m", "train.de-en", 200)
    moses(tmp_path / "m", "train.en-fr", 200, start=500, codes=("en", "fr"))
    moses(tmp_path / "m", "train.en-ru", 5, codes=("en", "ru"))
    moses(tmp_path / "m", "test.de-en", 12, start=900)
    corpora = [
        {"path": str(tmp_path / "m"), "format": "moses"},
        table(tmp_path, "a.tsv", "de", "en", 200, start=2000),
    ]
    (said,) = notices(recipe(tmp_path, corpora=corpora, languages=["de", "fr"]), capsys)
    assert said.startswith(f"corpus {tmp_path}/m brings the test set of de-en")


def test_one_side_of_a_set_of_iwslt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moses(tmp_path / "m", "train.tags.de-en", 200)
    write_lines(tmp_path / "m/IWSLT14.TED.tst2010.de-en.de.xml", [f"<seg>{sentence('de', 900)}</seg>"])
    (said,) = notices(
        recipe(tmp_path, corpora=[{"path": str(tmp_path / "m"), "format": "iwslt"}], languages=["de"]), capsys
    )
    assert "has IWSLT14.TED.tst2010.de-en.de.xml but no file for en beside it: no test set of de-en" in said


def test_segments_of_iwslt_that_one_side_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said by `prepare` and `show`, and where the folder is a test set of `evaluate`."""
    moses(tmp_path / "m", "train.tags.de-en", 200)
    for code, numbers in (("de", range(11)), ("en", range(1, 12))):
        segments = [f'<seg id="{number}">\n{sentence(code, 900 + number)}\n</seg>' for number in numbers]
        write_lines(tmp_path / f"m/IWSLT14.TED.tst2010.de-en.{code}.xml", segments)
    settings = recipe(tmp_path, corpora=[{"path": str(tmp_path / "m"), "format": "iwslt"}], languages=["de"])
    said, serving = notices(settings, capsys)
    assert (
        said.startswith("warning: 2 segments are left out, whose docid and id only one file has: ")
        and "brings the test set" in serving
    )
    assert {row.pairs for row in show(settings).rows if row.split == "test"} == {10}
    texts = read_own([str(tmp_path / "m")], "test", [Direction("de", "en")])
    assert texts.by_direction[Direction("de", "en")][1] == [
        sentence("en", 900 + number) for number in range(1, 11)
    ]
    assert f"lsmoe: {said}" in capsys.readouterr().err


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


def test_a_sentence_in_two_published_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moses(tmp_path / "m", "train", 200)
    moses(tmp_path / "m", "test", 10, start=300)
    moses(tmp_path / "m", "dev", 10, start=307)
    said = notices(
        recipe(tmp_path, corpora=[{"path": str(tmp_path / "m"), "format": "moses"}], languages=["de"]), capsys
    )
    # three pairs, both sides of them
    assert said[-1].startswith("warning: 6 sentences are in a dev set and in a test set that corpora bring")


def test_a_direction_without_training_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moses(tmp_path / "m", "train", 200)
    moses(tmp_path / "m", "test", 5, start=300, codes=("de", "fr"))
    corpora = [{"path": str(tmp_path / "m"), "format": "moses"}]
    settings = recipe(tmp_path, corpora=corpora, languages=[], directions=["de-en", "de-fr"])
    said = notices(settings, capsys)
    assert "warning: there is no training text for de-fr: these are only evaluated (zero-shot)" in said


def test_a_stem_named_like_a_test_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moses(tmp_path, "newstest2014", 200)
    settings = recipe(
        tmp_path, corpora=[{"path": str(tmp_path / "newstest2014"), "format": "moses"}], languages=["de"]
    )
    (said,) = notices(settings, capsys)
    assert "newstest2014.CODE is trained on although it is named like a test set" in said


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("train", "train"), ("news.de-en", "train"), ("latest", "train"), ("device", "train"), ("contest-2", "train"),
        ("dev", "dev"), ("valid", "dev"), ("corpus.dev", "dev"), ("newsdev2016", "dev"), ("validation_1", "dev"),
        ("test", "test"), ("test2017", "test"), ("newstest2014", "test"), ("wmt-test", "test"), ("tst2010", "test"), ("devtest", "test"),
        ("Test.part-1", "test"), ("dev-test", "test"),
    ],
)  # fmt: skip
def test_which_stems_are_dev_and_test(stem: str, split: str) -> None:
    assert split_of(stem) == split


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

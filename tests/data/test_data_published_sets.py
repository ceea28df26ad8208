"""What is said of published dev and test sets: which one serves, and what one side of them lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.small_corpora import flores, moses, notices, recipe, sentence, table, write_lines

from lsmoe_ds.data.formats import split_of
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.summary import show
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.texts import read_own


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


def test_a_sentence_in_two_published_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moses(tmp_path / "m", "train", 200)
    moses(tmp_path / "m", "test", 10, start=300)
    moses(tmp_path / "m", "dev", 10, start=307)
    said = notices(
        recipe(tmp_path, corpora=[{"path": str(tmp_path / "m"), "format": "moses"}], languages=["de"]), capsys
    )
    # three pairs, both sides of them
    assert said[-1].startswith("warning: 6 sentences are in a dev set and in a test set that corpora bring")


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

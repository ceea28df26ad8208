"""Held out means in every language: no sentence of a dev or test set, on any side, is in any training
text.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_corpora import fates_of, made_bitext, pairs, recipe, sentence, write_lines

from lsmoe_ds.config.data import HeldOut
from lsmoe_ds.data.bitext import COMMON, RARE
from lsmoe_ds.data.fates import DEV, TEST
from lsmoe_ds.data.held_out import Claims
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.shards import key
from lsmoe_ds.data.splitting import hold_out
from lsmoe_ds.data.summary import show
from lsmoe_ds.directions import Direction

Lines = list[tuple[str, str]]


def bare(text: str) -> str:
    """Return the letters of a made-up sentence in lower case, which near-duplicates have in common."""
    return "".join(character for character in text.lower() if character.isalpha())


def write_bitexts(folder: Path, bitexts: dict[str, Lines]) -> list[dict[str, str]]:
    """One table for each bitext; returns them as corpora of a recipe."""
    for name, content in bitexts.items():
        write_lines(folder / f"{name}.tsv", [name.replace("-", "\t"), *("\t".join(pair) for pair in content)])
    return [{"path": str(folder / f"{name}.tsv"), "format": "tsv"} for name in bitexts]


def prepared(folder: Path, bitexts: dict[str, Lines], *more: dict[str, str], **data: Any) -> PreparedData:
    corpora = [*write_bitexts(folder, bitexts), *more]
    settings = {
        "vocabulary": {"size": 120, "character_coverage": 1.0},
        "languages": [],
        "directions": list(bitexts),
        **data,
    }
    return prepare(recipe(folder, corpora=corpora, **settings))


def texts_of(data: PreparedData, split: str) -> list[tuple[str, str]]:
    """(bitext, sentence) of both sides; of the training text out of its tokens."""
    found = []
    for name in data.manifest["bitexts"]:
        direction = Direction(*name.split("-"))
        if split == "train":
            tokens = data.tokens(direction, split)
            for store in (tokens.source, tokens.target):
                found += [(name, data.vocabulary.decode(store[i])) for i in range(len(tokens))]
        else:
            found += [(name, text) for side in data.text(direction, split) for text in side]
    return found


def check_nothing_held_out_is_trained_on(data: PreparedData) -> None:
    sets = {split: {bare(text) for _, text in texts_of(data, split)} for split in ("dev", "test")}
    trained = {bare(text) for _, text in texts_of(data, "train")}
    assert sets["dev"] and sets["test"] and trained
    assert not sets["dev"] & sets["test"]
    assert not sets["dev"] & trained and not sets["test"] & trained


def multi_way(codes: str, count: int) -> dict[str, Lines]:
    """Return a bitext for each pair of the languages, all with the same sentences."""
    return {f"{a}-{b}": pairs(a, b, count) for a, b in combinations(sorted(codes.split()), 2)}


@pytest.mark.parametrize(("codes", "count"), [("de en fr", 150), ("de en fr ru", 100)])
def test_a_multi_way_corpus(tmp_path: Path, codes: str, count: int) -> None:
    data = prepared(tmp_path, multi_way(codes, count), held_out={"dev": 5, "test": 10})
    check_nothing_held_out_is_trained_on(data)
    for name in data.manifest["bitexts"]:
        assert [data.manifest["bitexts"][name][split]["pairs"] for split in ("dev", "test")] == [5, 10], name
        # All languages hold out the same sentences, so that each bitext loses no more than its own two sets.
        assert data.manifest["bitexts"][name]["train"]["pairs"] == count - 15
        assert data.manifest["cleaning"][name]["held out"] == 0


def test_bitexts_that_overlap_in_part(tmp_path: Path) -> None:
    """Each language pair has some sentences that the others lack, and the French ones of German are others
    than those of English.
    """
    bitexts = {
        "de-en": pairs("de", "en", 200),
        "en-fr": pairs("en", "fr", 200, start=100),
        "de-fr": [(sentence("de", n), sentence("fr", m)) for n in range(100) for m in (n, n + 7000)],
    }
    data = prepared(tmp_path, bitexts, held_out={"dev": 10, "test": 20})
    check_nothing_held_out_is_trained_on(data)
    cleaning, sizes = data.manifest["cleaning"], data.manifest["bitexts"]
    for name in bitexts:
        assert (
            sum(sizes[name][split]["pairs"] for split in ("train", "dev", "test"))
            + cleaning[name]["held out"]
            == 200
        )
    assert sum(cleaning[name]["held out"] for name in bitexts) > 0
    rows = {
        (row.direction, row.split): row
        for row in show(settings_of(tmp_path, bitexts, held_out={"dev": 10, "test": 20})).rows
    }
    for name in bitexts:
        assert rows[name, "train"].held_out == cleaning[name]["held out"] and rows[name, "test"].held_out == 0


def settings_of(folder: Path, bitexts: dict[str, Lines], **data: Any) -> Any:
    corpora = [{"path": str(folder / f"{name}.tsv"), "format": "tsv"} for name in bitexts]
    rest = {
        "vocabulary": {"size": 120, "character_coverage": 1.0},
        "languages": [],
        "directions": list(bitexts),
        **data,
    }
    return recipe(folder, corpora=corpora, **rest)


def test_the_dropped_pairs_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """300 sentences stand twice, the second time with another case and digits: what is held out of them is
    dropped once each.
    """
    noisy = [(german.upper(), f"{english[:-1]} 7 !") for german, english in pairs("de", "en", 300)]
    data = prepared(tmp_path, {"de-en": pairs("de", "en", 300) + noisy}, held_out={"dev": 10, "test": 20})
    check_nothing_held_out_is_trained_on(data)
    assert data.manifest["cleaning"]["de-en"]["held out"] == 30
    assert "30 more pairs are not trained on" in capsys.readouterr().err


def test_one_translation_of_two_sentences(tmp_path: Path) -> None:
    """Every German sentence stands for two English ones: the one that is not in the set must not be trained
    on either.
    """
    both = [(sentence("de", n), sentence("en", m)) for n in range(150) for m in (n, n + 1000)]
    data = prepared(
        tmp_path, {"de-en": both}, languages=["de"], directions=[], held_out={"dev": 10, "test": 20}
    )
    check_nothing_held_out_is_trained_on(data)
    sizes = data.manifest["bitexts"]["de-en"]
    assert (
        sizes["test"]["pairs"] >= 15
        and sizes["train"]["pairs"] + data.manifest["cleaning"]["de-en"]["held out"] >= 270
    )


def test_a_sentence_under_another_language_is_held_out_too(tmp_path: Path) -> None:
    """Close languages share sentences: those of the Norwegian test set stand in the Danish text, letter by
    letter.
    """
    bitexts = {
        "en-nb": pairs("en", "de", 200),
        "da-en": [(first, f"{second[:-1]} so.") for first, second in pairs("de", "en", 200)],
    }
    data = prepared(tmp_path, bitexts, held_out={"dev": 10, "test": 20})
    check_nothing_held_out_is_trained_on(data)


@pytest.mark.parametrize("noise", ["{}", "{} 42", "«{}»", "{}!?"])
def test_published_sets_are_held_out_by_both_sides(tmp_path: Path, noise: str) -> None:
    """A test set of German and English: its German side is in German-French text, under French that nothing
    else has.
    """
    for side, code in enumerate(("deu_Latn", "eng_Latn")):
        write_lines(
            tmp_path / f"flores/devtest/{code}.devtest",
            [noise.format(pair[side]) for pair in pairs("de", "en", 12)],
        )
        write_lines(
            tmp_path / f"flores/dev/{code}.dev",
            [noise.format(pair[side]) for pair in pairs("de", "en", 8, start=12)],
        )
    bitexts = {
        "de-en": [(german, sentence("en", n + 5000)) for n, (german, _) in enumerate(pairs("de", "en", 150))],
        "de-fr": [(sentence("de", n), sentence("fr", n + 7000)) for n in range(150)],
        "en-fr": pairs("en", "fr", 150),
    }
    flores = {"path": str(tmp_path / "flores"), "format": "flores"}
    data = prepared(tmp_path, bitexts, flores, held_out={"dev": 5, "test": 10})
    check_nothing_held_out_is_trained_on(data)
    for name in bitexts:
        assert data.manifest["cleaning"][name]["held out"] >= 20  # the 20 published sentences, once each
    assert len(data.text(Direction("de", "en"), "test")[0]) == 12


def test_a_second_published_set_is_kept_out_too(tmp_path: Path) -> None:
    for folder, start in (("one", 0), ("two", 20)):
        for side, code in enumerate(("deu_Latn", "eng_Latn")):
            lines = [pair[side] for pair in pairs("de", "en", 10, start=start)]
            write_lines(tmp_path / f"{folder}/devtest/{code}.devtest", lines)
    sets = [{"path": str(tmp_path / folder), "format": "flores"} for folder in ("one", "two")]
    data = prepared(tmp_path, {"de-en": pairs("de", "en", 200)}, *sets, held_out={"dev": 5, "test": 10})
    check_nothing_held_out_is_trained_on(data)
    assert data.text(Direction("de", "en"), "test")[0] == [sentence("de", n) for n in range(10)]
    trained = {text for _, text in texts_of(data, "train")}
    assert not trained & {sentence("en", n) for n in range(20, 30)}


def test_common_sentences_are_not_chosen(tmp_path: Path) -> None:
    """A third of the pairs have one of two translations: held out, they would cost a sixth of the text
    each.
    """
    usual = pairs("de", "en", 200)
    common = [(sentence("de", 9000 + n % 2), sentence("en", 1000 + n)) for n in range(100)]
    data = prepared(tmp_path, {"de-en": usual + common}, held_out={"dev": 10, "test": 20})
    held = {text for split in ("dev", "test") for _, text in texts_of(data, split)}
    assert not held & {sentence("de", 9000), sentence("de", 9001)}
    assert data.manifest["bitexts"]["de-en"]["train"]["pairs"] == 270


def test_what_is_common(tmp_path: Path) -> None:
    """In more than five pairs, and in more than one of a hundred."""
    assert (RARE, COMMON) == (5, 100)
    for pairs_of_all, of_one, common in ((30, 5, False), (30, 6, True), (1000, 10, False), (1000, 11, True)):
        keys = [(n, 7000 if n < of_one else n + 10_000) for n in range(pairs_of_all)]
        bitext = made_bitext(tmp_path / f"{pairs_of_all}-{of_one}", "de-en", keys, shard=7)
        assert bitext.common.tolist() == ([7000] if common else [])


def test_of_a_sentence_with_two_translations_the_rarer_is_held_out(tmp_path: Path) -> None:
    """English 1 has the translations 100 (in four pairs) and 101 (in one)."""
    bitext = made_bitext(tmp_path, "de-en", [(100, 1), (101, 1), (100, 2), (100, 3), (100, 4)])
    found = bitext._rarest(bitext._choose(np.array([1], dtype=np.uint64), (bitext.pivot,)))
    assert found.places.tolist() == [1]


def test_a_sentence_is_in_one_set_only(tmp_path: Path) -> None:
    """English 1 goes to dev and English 2 to test, but both are German 100: the second choice is left out."""
    bitext, claims = made_bitext(tmp_path, "de-en", [(100, 1), (100, 2), (102, 3)]), Claims()
    bitext.decide({"dev": np.array([1], dtype=np.uint64), "test": np.array([2, 3], dtype=np.uint64)}, claims)
    assert fates_of(bitext) == [DEV, 0, TEST]
    bitext.leave_out(claims)
    assert bitext.size("train") == 0 and bitext.counts["held out"] == 1


def test_what_is_held_out_already_comes_first(tmp_path: Path) -> None:
    """The German-French text holds out what the two English ones do, although it would have chosen others by
    itself.
    """
    number = 200
    bases = {"de-en": (1000, 2000), "en-fr": (2000, 3000), "de-fr": (1000, 3000)}
    texts = [
        made_bitext(tmp_path, name, [(first + n, second + n) for n in range(number)], shard=60)
        for name, (first, second) in bases.items()
    ]
    hold_out(texts, HeldOut(dev=6, test=12, seed=4))
    fates = [fates_of(bitext) for bitext in texts]
    assert fates[0] == fates[1] == fates[2]
    assert (fates[0].count(DEV), fates[0].count(TEST)) == (6, 12)
    assert all(bitext.counts["held out"] == 0 for bitext in texts)


def test_pairs_of_which_both_sides_are_held_out_come_before_those_of_which_one_is(tmp_path: Path) -> None:
    claims = Claims()
    claims.add("test", np.array([1000, 1001, 3001], dtype=np.uint64))
    bitext = made_bitext(tmp_path, "de-fr", [(1000, 3000), (1001, 3001), (1002, 3002)])
    assert bitext.adopt({"dev": 2, "test": 1}, claims, seed=1) == {"dev": 2, "test": 0}
    assert fates_of(bitext) == [0, TEST, 0]


def test_what_may_be_chosen(tmp_path: Path) -> None:
    """Not English 1, whose only translation is held out already, nor 2, which is; 3 has another
    translation.
    """
    bitext, claims = (
        made_bitext(tmp_path, "de-en", [(100, 1), (101, 2), (100, 3), (102, 3), (103, 4)]),
        Claims(),
    )
    claims.add("test", np.array([100, 2], dtype=np.uint64))
    assert bitext.candidates(claims).tolist() == [3, 4]


def test_near_duplicates_have_one_key_in_all_languages() -> None:
    assert key("Das ist gut.") == key("DAS IST GUT 42!")
    assert key("Das ist gut.") != key("Das ist gute.")

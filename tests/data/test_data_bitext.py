"""Cleaning one bitext: which side the limits are for, exact copies, and what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.small_corpora import clean_parts, fates_of, keys_of, pairs, write_lines

from lsmoe_ds.data import keys, shards
from lsmoe_ds.data.bitext import Bitext
from lsmoe_ds.data.cleaning import hash64
from lsmoe_ds.data.fates import DROPPED, TRAIN
from lsmoe_ds.data.text_part import TextPart


def cleaned(folder: Path, name: str, *corpora: list[tuple[str, str]], **settings: int) -> Bitext:
    """Clean the text of some corpora, ``c0``, ``c1``, ..., and return them as a bitext."""
    parts = []
    for number, content in enumerate(corpora):
        write_lines(folder / f"c{number}.tsv", ["\t".join(pair) for pair in content])
        parts.append(TextPart(f"c{number}", name, "train", (folder / f"c{number}.tsv",), "table"))
    return clean_parts(folder, name, parts, **settings)


def test_word_limits_are_for_the_english_side(tmp_path: Path) -> None:
    """English comes second in de-en: three German and six English words stay, six and two go."""
    stays = ("eins zwei dreiundzwanzig", "one two three four five six")
    goes = ("eins zwei drei vier fünf sechs", "twenty thousand")
    bitext = cleaned(tmp_path, "de-en", [stays, goes], min_words=4)
    assert list(bitext.pairs("train")) == [stays]
    assert bitext.counts == {"read": 2, "short": 1, "duplicate": 0}


def test_scripts_belong_to_their_sides(tmp_path: Path) -> None:
    """Bulgarian comes first in bg-en, and the rules read the English side first."""
    content = [
        ("Запазете всички промени", "Save all of the changes"),
        ("Save all of the changes", "Запазете всички промени"),
    ]
    bitext = cleaned(tmp_path, "bg-en", content)
    assert list(bitext.pairs("train")) == content[:1] and bitext.counts["script"] == 1


def test_word_limits_are_for_the_first_side_without_english(tmp_path: Path) -> None:
    stays = ("eins zwei drei vier", "un deux")
    goes = ("eins zwei", "un deux trois quatre")
    assert list(cleaned(tmp_path, "de-fr", [stays, goes], min_words=4).pairs("train")) == [stays]


@pytest.mark.parametrize(
    ("name", "pivot", "english"),
    [("de-en", 1, True), ("en-fr", 0, True), ("de-fr", 0, False), ("be-eng_Latn", 1, True)],
)
def test_which_side_sentences_are_chosen_by(tmp_path: Path, name: str, pivot: int, english: bool) -> None:
    assert (Bitext(name, tmp_path).pivot, Bitext(name, tmp_path).english) == (pivot, english)


def test_exact_copies_of_a_pair(tmp_path: Path) -> None:
    """Three times in two corpora: trained on once, two counted; another translation of the same sentence is
    no copy.
    """
    (first, second), other = (
        pairs("de", "en", 2),
        ("Ein ganz anderer Satz steht hier.", pairs("de", "en", 1)[0][1]),
    )
    bitext = cleaned(tmp_path, "de-en", [first, second, first], [first, other])
    assert list(bitext.pairs("train")) == [first, second, other]
    assert bitext.counts == {"read": 5, "duplicate": 2}
    assert fates_of(bitext) == [TRAIN, TRAIN, DROPPED, DROPPED, TRAIN]
    assert bitext.spans == [("c0", 0, 3), ("c1", 3, 5)]
    assert (bitext.kept_of("c0"), bitext.kept_of("c1"), bitext.kept_of("c2")) == (2, 1, 0)


def test_keys_belong_to_their_sides(tmp_path: Path) -> None:
    bitext = cleaned(tmp_path, "de-en", [("Der Hund schläft.", "The dog sleeps 2 hours.")])
    assert [keys_of(bitext, side)[0] for side in (0, 1)] == [
        hash64("derhundschläft"),
        hash64("thedogsleepshours"),
    ]


@pytest.mark.parametrize(("shard", "chunk", "at_once"), [(2, 10, 2), (3, 1, 1000), (1, 1, 1)])
def test_shards_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int, chunk: int, at_once: int
) -> None:
    content = pairs("de", "en", 7)
    whole = cleaned(tmp_path, "de-en", content, content[:3], content[2:5])
    monkeypatch.setattr(shards, "SHARD", shard)
    monkeypatch.setattr(shards, "CHUNK", chunk)
    monkeypatch.setattr(keys, "KEYS_AT_ONCE", at_once)
    (tmp_path / "again").mkdir()
    parts = cleaned(tmp_path / "again", "de-en", content, content[:3], content[2:5])
    assert len(whole.pieces) == 3 and len(parts.pieces) == -(-7 // shard) + 2 * -(-3 // shard)
    assert whole.spans == parts.spans == [("c0", 0, 7), ("c1", 7, 10), ("c2", 10, 13)]
    assert whole.counts == parts.counts == {"read": 13, "duplicate": 6}
    assert fates_of(whole) == fates_of(parts) == [TRAIN] * 7 + [DROPPED] * 6
    assert [keys_of(whole, side) for side in (0, 1)] == [keys_of(parts, side) for side in (0, 1)]
    assert list(whole.pairs("train")) == list(parts.pairs("train")) == content

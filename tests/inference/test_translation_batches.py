"""How lines are cut, batched and joined. The engine translates a text into itself, one token a character."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.inference.beam_search import Hypothesis, Search
from lsmoe_ds.inference.translate import (
    Translation,
    cut_line,
    translate,
    translate_all,
    translate_lines,
    translate_tokens,
)

DIRECTIONS = [Direction("en", code) for code in ("de", "zh_Hans", "ja", "th", "zh_Hant")]


class Echo:
    """An engine that keeps the batches it gets. ``longest`` tokens of a sentence fit, beside tag and EOS."""

    languages = Languages(tuple(DIRECTIONS))

    def __init__(self, longest: int = 10, size: int = 100) -> None:
        self.recipe = SimpleNamespace(
            data=SimpleNamespace(batch=SimpleNamespace(max_length=longest + 2)),
            model=SimpleNamespace(task="translate"),
        )
        self.vocabulary = SimpleNamespace(
            size=size,
            encode=lambda text: [ord(each) for each in text],
            decode=lambda ids: "".join(map(chr, ids)),
        )
        self.batches: list[list[int]] = []

    def search(self, sources, direction, search) -> list[list[Hypothesis]]:
        self.batches.append([len(source) for source in sources])
        return [[Hypothesis(list(source), 0.0)] for source in sources]


JOINTS = [("de", " "), ("th", " "), ("zh_Hans", ""), ("zh_Hant", ""), ("ja", "")]


@pytest.mark.parametrize(("target", "joint"), JOINTS)
def test_the_parts_of_a_line_are_joined_as_the_target_writes_sentences(target, joint):
    lines = ["aaaa. bbbb. cc.", "dd"]
    assert list(translate(Echo(), Direction("en", target), lines)) == [
        joint.join(["aaaa.", "bbbb. cc."]),
        "dd",
    ]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("1234567890", ["1234567890"]),
        ("12345678901", ["1234567890", "1"]),  # one word: wherever it is full
        (
            "aa. b, cc dd. ee",
            ["aa.", "b, cc dd.", "ee"],
        ),  # after sentences, though a clause ends nearer to the middle
        ("a, b c, d e, f", ["a, b c,", "d e, f"]),
        ("aa bb cc dd", ["aa bb", "cc dd"]),
        ("aaa bbb - cc dd", ["aaa bbb -", "cc dd"]),
        ("a，b，cccccccc", ["a，b，", "cccccccc"]),
        ("  aaaa  ", ["aaaa"]),
        ("   ", []),
    ],
)
def test_a_line_is_cut_at_its_best_place_nearest_to_the_middle(line, parts):
    assert ["".join(map(chr, part)) for part in cut_line(line, Echo())] == parts


def test_batches_are_of_like_length_and_hold_their_tokens_with_tag_and_eos():
    """(3 + 2) x 4 = 20 tokens; of four with 4 tokens each already 24."""
    engine, search = Echo(), Search(beam=1)
    sources = [[1] * length for length in (4, 3, 3, 30, 3, 4, 3, 3, 4)]
    found = translate_tokens(engine, DIRECTIONS[0], sources, search, batch_tokens=20)
    assert engine.batches == [[3, 3, 3, 3], [3, 4, 4], [4], [30]]
    assert [len(best.tokens) for (best,) in found] == [4, 3, 3, 30, 3, 4, 3, 3, 4]


def test_the_logits_of_a_step_are_bounded():
    """2^26 values: of 2^24 tokens and a beam of 2 for two sentences."""
    engine = Echo(size=2**24)
    translate_tokens(engine, DIRECTIONS[0], [[1]] * 5, Search(beam=2), batch_tokens=1000)
    assert engine.batches == [[1, 1], [1, 1], [1]]


def test_space_within_a_translation_is_single_and_none_stands_at_its_ends():
    engine = Echo()
    found = [Hypothesis([ord(each) for each in " a \n b "], 0.0)]
    engine.search = lambda sources, direction, search: [found] * len(sources)
    assert translate_all(engine, DIRECTIONS[0], ["x", "", "y"], Search()) == ["a b", "", "a b"]


@pytest.mark.parametrize(("target", "joint"), JOINTS)
def test_the_n_best_of_a_line_join_those_of_its_parts(target, joint):
    """A part of T letters has T translations here, of which 3 are wanted."""
    engine = Echo()

    def search(sources, direction, search) -> list[list[Hypothesis]]:
        return [
            [Hypothesis([*source, ord(str(rank))], -len(source) - rank) for rank in range(len(source))][
                : search.n_best
            ]
            for source in sources
        ]

    engine.search = search
    lines = ["aaaa. bbbb. cc.", "x", " ", "12345678901"]
    found = translate_lines(engine, Direction("en", target), lines, Search(n_best=3))
    assert found == [
        [Translation(joint.join([f"aaaa.{rank}", f"bbbb. cc.{rank}"]), -14 - 2 * rank) for rank in range(3)],
        [Translation("x0", -1)],
        [Translation("", 0)],
        [Translation(joint.join([f"1234567890{rank}", "10"]), -11 - rank) for rank in range(3)],
    ]


def test_chunks_of_lines_grow_from_16_to_2048():
    engine, read = Echo(), []

    def lines():
        for number in range(16 + 32 + 64):
            read.append(number)
            yield "a"

    stream, seen = translate(engine, DIRECTIONS[0], lines()), []
    for _ in range(16 + 32 + 64):
        next(stream)
        seen.append(len(read))
    assert sorted(set(seen)) == [16, 48, 112]

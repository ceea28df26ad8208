"""Beam search over bigram models whose best translations and scores are found with pencil and paper."""

from __future__ import annotations

import math

import pytest
import torch

from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.inference.beam_search import Hypothesis, Search, beam_search
from lsmoe_ds.languages import BOS, EOS, PAD

A, B, C, D, BANNED = 4, 5, 6, 7, 8
END, START = EOS, EOS  # the decoder starts from EOS
Rows = dict[int, dict[int, float]]


class Bigram:
    """A model by the probability of each token after the one before; what a row lacks is impossible."""

    def __init__(self, rows: Rows) -> None:
        self.logs = torch.full((9, 9), -60.0)
        for before, row in rows.items():
            for token, probability in row.items():
                self.logs[before, token] = math.log(probability)

    def start(self, source, ids, route):
        return self

    def step(self, tokens, state):
        return self.logs[tokens[:, 0]]

    def select(self, sentences, hypotheses):
        return self


def search_of(
    rows: Rows, beam: int, penalty: float, extra: int = 20, sentences: int = 1, n_best: int = 1
) -> list[list[Hypothesis]]:
    """Return the best translations of sources of one token, its tag and EOS."""
    source, ids = torch.full((sentences, 3), 3), torch.zeros(sentences, dtype=torch.long)
    search = Search(beam, penalty, per_source_token=0.0, extra=extra, n_best=n_best)
    return beam_search(Bigram(rows), source, SentenceIds(ids, ids, ids), [BOS, PAD, BANNED], search)


LATER_IS_BETTER = {START: {A: 0.9, B: 0.1}, A: {C: 0.99, END: 0.01}, B: {END: 1.0}, C: {END: 1.0}}
SHORT_OR_LONG = {START: {A: 0.6, B: 0.4}, A: {END: 1.0}, B: {C: 1.0}, C: {END: 1.0}}


@pytest.mark.parametrize(
    ("rows", "beam", "penalty", "tokens", "score"),
    [
        # A negative penalty favors short ones, yet A C has (log 0.9 + log 0.99) x 3^2, and B log 0.1 x 2^2.
        (LATER_IS_BETTER, 2, -2.0, [A, C], -1.0387),
        # EOS counts in the length: log 0.6 / 2^p against log 0.4 / 3^p.
        (SHORT_OR_LONG, 2, 0.0, [A], -0.5108),
        (SHORT_OR_LONG, 2, 1.0, [A], -0.2554),
        (SHORT_OR_LONG, 2, 2.0, [B, C], -0.1018),
        # Greedy search stops at the first end, though B C would score better.
        (SHORT_OR_LONG, 1, 2.0, [A], -0.1277),
        ({START: {A: 1.0}, A: {END: 0.6, C: 0.4}, C: {END: 1.0}}, 1, 2.0, [A], -0.1277),
        # The longer one may still win in the very next step, by 3 log 0.45 against 2 log 0.3.
        (
            {START: {A: 0.55, B: 0.45}, A: {END: 0.3 / 0.55, C: 0.25 / 0.55}, B: {C: 1.0}, C: {END: 1.0}},
            2,
            -1.0,
            [B, C],
            -2.3955,
        ),
        # Both that are continued come from one hypothesis: A D is the second of those that do not end.
        (
            {
                START: {A: 0.9, B: 0.1},
                A: {END: 0.4, C: 0.31, D: 0.29},
                B: {B: 1.0},
                C: {B: 1.0},
                D: {END: 1.0},
            },
            2,
            2.0,
            [A, D],
            -0.1493,
        ),
        # An end that is not among the best `beam` continuations does not count.
        ({START: {A: 1.0}, A: {C: 0.6, END: 0.4}, C: {END: 1.0}}, 1, 1.0, [A, C], -0.1703),
        # One token is banned, and the end banned as the first: A has 0.2 / (0.2 + 0.1), not 0.2.
        (
            {START: {A: 0.2, B: 0.1, BANNED: 0.5, END: 0.2}, A: {END: 1.0}, B: {END: 1.0}},
            1,
            0.0,
            [A],
            -0.4055,
        ),
    ],
)
def test_scores(rows, beam, penalty, tokens, score):
    for (found,) in search_of(rows, beam, penalty, sentences=2):
        assert found.tokens == tokens
        assert found.score == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("beam", [1, 3])
def test_at_the_limit_a_translation_ends_with_the_probability_that_this_has(beam):
    """A A A has (2 log 0.99 + log 0.01) / 4, more than (log 0.99 + log 0.01) / 3 and log 0.01 / 2."""
    ((found,),) = search_of({START: {A: 1.0}, A: {A: 0.99, END: 0.01}}, beam, 1.0, extra=3)
    assert found.tokens == [A, A, A] and found.score == pytest.approx(-1.1563, abs=1e-4)


def test_the_longest_translation_that_the_limit_allows_can_win():
    """B C D has log 0.3 / 4, and A log 0.5 / 2; were 3 the greatest length, log 0.3 / 3 could not win."""
    rows = {START: {A: 0.5, B: 0.5}, A: {END: 1.0}, B: {C: 0.6, END: 0.4}, C: {D: 1.0}, D: {END: 1.0}}
    ((found,),) = search_of(rows, 2, 1.0, extra=3)
    assert found.tokens == [B, C, D] and found.score == pytest.approx(-0.3010, abs=1e-4)


def test_the_search_goes_on_while_the_worst_of_the_n_best_can_be_beaten():
    """After A, log 0.9 / 2, nothing can be the best any more, but B C, log 0.1 / 3, is the second."""
    rows = {START: {A: 0.9, B: 0.1}, A: {END: 1.0}, B: {C: 1.0}, C: {END: 1.0}}
    ((best, second),) = search_of(rows, 2, 1.0, n_best=2)
    assert best.tokens == [A] and best.score == pytest.approx(-0.0527, abs=1e-4)
    assert second.tokens == [B, C] and second.score == pytest.approx(-0.7675, abs=1e-4)


def test_all_that_end_in_the_last_step_count():
    """A ends first, log 0.33 / 2. In the next step B D ends, log 0.4 / 3, and A C, log 0.27 / 3: three with a
    beam of 2, of which the last is not the worst.
    """
    rows = {
        START: {A: 0.6, B: 0.4},
        A: {END: 0.55, C: 0.45},
        B: {D: 1.0},
        C: {END: 1.0},
        D: {END: 1.0},
    }
    (found,) = search_of(rows, 2, 1.0, n_best=2)
    assert [each.tokens for each in found] == [[B, D], [A, C]]
    assert [each.score for each in found] == pytest.approx([-0.3054, -0.4364], abs=1e-4)


def test_there_may_be_fewer_than_n_best():
    """Five tokens may be generated, beside EOS, and one of them at most."""
    (found,) = search_of({START: {A: 0.9, B: 0.1}, A: {END: 1.0}}, 9, 1.0, extra=1, n_best=8)
    assert [each.tokens for each in found[:2]] == [[A], [B]] and len(found) == 5


def test_limits_are_counted_in_source_tokens():
    assert Search(per_source_token=1.5, extra=2).limits(torch.tensor([2, 3, 10])).tolist() == [5, 6, 17]
    assert Search(per_source_token=3.0, extra=-2).limits(torch.tensor([1, 2])).tolist() == [1, 4]

"""Beam search against a slow search without caches or batches, and against trying everything."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.slow_search import BANNED, make, same, sentences, slow_search

from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.beam_search import Hypothesis, Search, beam_search
from lsmoe_ds.languages import BOS, EOS, PAD

TASK = {"experts": 4, "every": 1, "top_k": 2, "routing": "task", "task": "pair"}
TOKEN = {"experts": 4, "every": 2, "top_k": 1, "routing": "token"}


@pytest.mark.parametrize(("encoder", "decoder"), [(None, None), (TASK, TASK), (TOKEN, TASK), (TOKEN, TOKEN)])
@pytest.mark.parametrize(("beam", "penalty"), [(1, 1.0), (5, 1.0), (4, 0.0), (3, 2.0), (3, -0.5)])
@torch.no_grad()
def test_equals_the_slow_search_with_mixed_directions_in_one_batch(encoder, decoder, beam, penalty):
    """The slow search never ends early, so the best of few are the first of the best of many."""
    model = make(encoder, decoder)
    source, ids = sentences([3, 7, 5, 4, 1, 6])
    search = Search(beam, penalty, per_source_token=1.0, extra=3, n_best=beam)
    wanted = []
    for row in range(len(source)):
        one = torch.tensor([row])
        real = int((source[row] != PAD).sum())
        wanted.append(slow_search(model, source[row : row + 1, :real], ids.select(one), BANNED, search))
    assert all(len(each) == beam for each in wanted)
    for n_best in sorted({1, min(2, beam), beam}):
        found = beam_search(model, source, ids, BANNED, replace(search, n_best=n_best))
        same(found, [each[:n_best] for each in wanted])
        if beam == 5:
            assert len({len(best.tokens) for best, *_ in found}) > 1, (
                "the test should see sentences leave the batch at different steps"
            )
        for hypothesis in (hypothesis for each in found for hypothesis in each):
            assert hypothesis.tokens and not set(hypothesis.tokens) & {*BANNED, EOS}


@pytest.mark.parametrize("n_best", [1, 10, 200])
def test_finds_the_best_of_all_when_the_beam_holds_everything(n_best):
    words, limit = 8, 3
    model = make(vocabulary=words, sharpness=1.5)
    source, ids = sentences([4], words)
    search = Search(beam=200, per_source_token=0.0, extra=limit, n_best=n_best)
    (found,) = beam_search(model, source, ids, [PAD, BOS, 7], search)
    everything = []
    for length in range(1, limit + 1):
        for tokens in itertools.product([3, 4, 5, 6], repeat=length):
            with torch.no_grad():
                logits = model.logits(source, torch.tensor([[EOS, *tokens]]), ids)[0]
                logits[:, [PAD, BOS, 7]] = logits[0, EOS] = -torch.inf
                logs = logits.log_softmax(1)
            total = sum(float(logs[i, word]) for i, word in enumerate([*tokens, EOS]))
            everything.append(Hypothesis(list(tokens), total / (length + 1)))
    assert len(everything) == 4 + 4**2 + 4**3
    same([found], [sorted(everything, key=lambda h: -h.score)[:n_best]])


@pytest.mark.parametrize("decoder", [None, TASK, TOKEN])
def test_a_sentence_translates_alike_alone_and_in_any_batch(decoder):
    model = make(decoder, decoder, seed=3)
    source, ids = sentences([9, 2, 5, 5, 12, 3, 7, 1], seed=4)
    search = Search(n_best=3)
    together = beam_search(model, source, ids, BANNED, search)
    alone = []
    for row in range(len(source)):
        one = torch.tensor([row])
        alone += beam_search(
            model, source[row : row + 1, : int((source[row] != PAD).sum())], ids.select(one), BANNED, search
        )
    same(together, alone)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 4, 3])
    same(
        beam_search(model, source[order], ids.select(order), BANNED, search),
        [together[i] for i in order.tolist()],
    )


def test_no_translation_is_empty_or_over_its_limit():
    model = make()
    with torch.no_grad():
        weight = model.embedding.tokens.weight
        weight[EOS] = 0  # makes the end improbable, so that the limit decides
        weight[EOS, 0] = -50
        model.decoder_norm.weight[0] = 0.2
        model.decoder_norm.bias[0] = 1.0
    source, ids = sentences([2, 5])
    found = beam_search(model, source, ids, BANNED, Search(per_source_token=2.0, extra=1))
    assert [len(best.tokens) for (best,) in found] == [5, 11]
    with torch.no_grad():
        weight[EOS, 0] = 50  # and now certain
    found = beam_search(model, source, ids, BANNED, Search())
    assert [len(best.tokens) for (best,) in found] == [1, 1]


def test_a_broken_model_is_named():
    model = make()
    with torch.no_grad():
        model.decoder_norm.weight[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        beam_search(model, *sentences([3]), BANNED, Search(extra=3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"beam": 0},
        {"length_penalty": math.nan},
        {"per_source_token": 0.0, "extra": 0},
        {"n_best": 0},
        {"beam": 3, "n_best": 4},
    ],
)
def test_settings_that_allow_no_search_are_refused(wrong):
    with pytest.raises(UserError):
        Search(**wrong)

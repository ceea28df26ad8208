"""Beam search against a slow search without caches or batches, and against trying everything."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.beam_search import Hypothesis, Search, beam_search
from lsmoe_ds.languages import BOS, EOS, PAD
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

VOCABULARY = 40
BANNED = [PAD, BOS, 37, 38, 39]
TASK = {"experts": 4, "every": 1, "top_k": 2, "routing": "task", "task": "pair"}
TOKEN = {"experts": 4, "every": 2, "top_k": 1, "routing": "token"}


def make(encoder=None, decoder=None, vocabulary=VOCABULARY, seed=1, sharpness=3.0) -> Transformer:
    """A random model whose distributions are sharp enough that hypotheses end at different times."""
    side = {"layers": 2, "feed_forward": 24}
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "data": {"corpora": ["mediawiki"], "languages": ["de", "fr"]},
            "model": {
                "hidden": 16,
                "heads": 2,
                "encoder": {**side, "moe": encoder},
                "decoder": {**side, "moe": decoder},
            },
            "training": {"steps": 1},
        }
    )
    model = Transformer(recipe, vocabulary)
    initialize(model, seed, Topology.single())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "decoder_norm.weight" in name:
                parameter *= sharpness
            if name.endswith(".bias") and "norm" not in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def sentences(lengths, vocabulary=VOCABULARY, seed=0) -> tuple[torch.Tensor, SentenceIds]:
    """Random sources of the given lengths, in mixed directions."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        source[row, :length] = torch.randint(4, vocabulary, (length,), generator=generator)
    direction = torch.arange(len(lengths)) % 4
    codes = torch.tensor([[1, 0], [0, 1], [1, 2], [2, 1]])[direction]  # en-de, de-en, en-fr, fr-en
    return source, SentenceIds(codes[:, 0], codes[:, 1], direction)


def slow_search(model, source, ids, banned, search, begin=(EOS,)) -> Hypothesis:
    """The definition, word by word, for one sentence [1, M]: the whole prefix through the model at every
    step.
    """
    limit = max(1, int(search.per_source_token * source.shape[1] + search.extra))
    running, finished = [([], 0.0)], []
    for position in range(limit + 1):
        continuations = []
        for prefix, total in running:
            logits = model.logits(source, torch.tensor([[*begin, *prefix]]), ids)[0, -1]
            logits[[*banned, EOS] if position == 0 else banned] = -torch.inf
            logs = logits.log_softmax(0)
            for word in range(len(logs)):
                if logs[word].isfinite() and (word == EOS or position < limit):
                    continuations.append(([*prefix, word], total + float(logs[word])))
        continuations.sort(key=lambda c: -c[1])
        for words, total in continuations[: search.beam]:
            if words[-1] == EOS and len(finished) < search.beam:
                finished.append(
                    Hypothesis(words[:-1], total / (len(begin) - 1 + len(words)) ** search.length_penalty)
                )
        if len(finished) == search.beam:
            break
        running = [c for c in continuations if c[0][-1] != EOS][: search.beam]
    return max(finished, key=lambda h: h.score)


def same(found, wanted):
    assert [h.tokens for h in found] == [h.tokens for h in wanted]
    assert [h.score for h in found] == pytest.approx([h.score for h in wanted], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize(("encoder", "decoder"), [(None, None), (TASK, TASK), (TOKEN, TASK), (TOKEN, TOKEN)])
@pytest.mark.parametrize(("beam", "penalty"), [(1, 1.0), (5, 1.0), (4, 0.0), (3, 2.0), (3, -0.5)])
@torch.no_grad()
def test_equals_the_slow_search_with_mixed_directions_in_one_batch(encoder, decoder, beam, penalty):
    model = make(encoder, decoder)
    source, ids = sentences([3, 7, 5, 4, 1, 6])
    search = Search(beam=beam, length_penalty=penalty, per_source_token=1.0, extra=3)
    found = beam_search(model, source, ids, BANNED, search)
    wanted = []
    for row in range(len(source)):
        one = torch.tensor([row])
        real = int((source[row] != PAD).sum())
        wanted.append(slow_search(model, source[row : row + 1, :real], ids.select(one), BANNED, search))
    same(found, wanted)
    if beam == 5:
        assert len({len(h.tokens) for h in found}) > 1, (
            "the test should see sentences leave the batch at different steps"
        )
    for hypothesis in found:
        assert hypothesis.tokens and not set(hypothesis.tokens) & {*BANNED, EOS}


def test_finds_the_best_of_all_when_the_beam_holds_everything():
    words, limit = 8, 3
    model = make(vocabulary=words, sharpness=1.5)
    source, ids = sentences([4], words)
    search = Search(beam=200, per_source_token=0.0, extra=limit)
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
    same([found], [max(everything, key=lambda h: h.score)])


@pytest.mark.parametrize("decoder", [None, TASK, TOKEN])
def test_a_sentence_translates_alike_alone_and_in_any_batch(decoder):
    model = make(decoder, decoder, seed=3)
    source, ids = sentences([9, 2, 5, 5, 12, 3, 7, 1], seed=4)
    together = beam_search(model, source, ids, BANNED, Search())
    alone = []
    for row in range(len(source)):
        one = torch.tensor([row])
        alone += beam_search(
            model, source[row : row + 1, : int((source[row] != PAD).sum())], ids.select(one), BANNED, Search()
        )
    same(together, alone)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 4, 3])
    same(
        beam_search(model, source[order], ids.select(order), BANNED, Search()),
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
    assert [len(h.tokens) for h in found] == [5, 11]
    with torch.no_grad():
        weight[EOS, 0] = 50  # and now certain
    found = beam_search(model, source, ids, BANNED, Search())
    assert [len(h.tokens) for h in found] == [1, 1]


def test_a_broken_model_is_named():
    model = make()
    with torch.no_grad():
        model.decoder_norm.weight[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        beam_search(model, *sentences([3]), BANNED, Search(extra=3))


@pytest.mark.parametrize(
    "wrong", [{"beam": 0}, {"length_penalty": math.nan}, {"per_source_token": 0.0, "extra": 0}]
)
def test_settings_that_allow_no_search_are_refused(wrong):
    with pytest.raises(UserError):
        Search(**wrong)

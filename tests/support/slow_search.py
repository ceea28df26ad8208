"""Search without caches or batches, on random models that are sure of themselves."""

from __future__ import annotations

import pytest
import torch

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.inference.beam_search import Hypothesis
from lsmoe_ds.languages import BOS, EOS, PAD
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

VOCABULARY = 40
BANNED = [PAD, BOS, 37, 38, 39]


def make(encoder=None, decoder=None, vocabulary=VOCABULARY, seed=1, sharpness=3.0) -> Transformer:
    """Make a random model whose distributions are sharp enough that hypotheses end at different times."""
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
    """Draw sources of the given lengths, in mixed directions."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        source[row, :length] = torch.randint(4, vocabulary, (length,), generator=generator)
    direction = torch.arange(len(lengths)) % 4
    codes = torch.tensor([[1, 0], [0, 1], [1, 2], [2, 1]])[direction]  # en-de, de-en, en-fr, fr-en
    return source, SentenceIds(codes[:, 0], codes[:, 1], direction)


def slow_search(model, source, ids, banned, search, begin=(EOS,)) -> list[Hypothesis]:
    """Follow the definition, word by word, for one sentence [1, M]: the whole prefix through the model at
    every step. Return the best of the finished hypotheses.
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
            if words[-1] == EOS:
                finished.append(
                    Hypothesis(words[:-1], total / (len(begin) - 1 + len(words)) ** search.length_penalty)
                )
        if len(finished) >= search.beam:
            break
        running = [c for c in continuations if c[0][-1] != EOS][: search.beam]
    return sorted(finished, key=lambda h: -h.score)[: search.n_best]


def same(found, wanted):
    assert [[h.tokens for h in each] for each in found] == [[h.tokens for h in each] for each in wanted]
    scores, expected = ([h.score for each in both for h in each] for both in (found, wanted))
    assert scores == pytest.approx(expected, rel=1e-6, abs=1e-5)

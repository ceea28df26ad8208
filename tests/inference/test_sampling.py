"""Sampled translations: tokens have the model's probabilities, and depend on nothing but their sentence."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.conversions import EN_DE
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_run

from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.beam_search import Search, never_generated
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.sampling import Sampling
from lsmoe_ds.languages import EOS

DRAWS = 400


@pytest.fixture(scope="module")
def loaded(pool, tmp_path_factory):
    return load(make_run(pool, tmp_path_factory.mktemp("sampled"), TOKEN_TOP2, TARGET_TOP2, 1)[0], "cpu")


@pytest.fixture(scope="module")
def sources(loaded):
    return [loaded.vocabulary.encode(line) for line in ("ba de fi", "ko la mi nobu", "lu")]


def log_probabilities(loaded, source, tokens) -> torch.Tensor:
    """Compute the log-probabilities [T + 1, V] of each next token, EOS included, in a teacher-forced pass."""
    batch = loaded.collate([source], [tokens], EN_DE)
    logits = loaded.logits_of(batch)[0].float().clone()
    logits[:, never_generated(loaded.vocabulary)] = -torch.inf
    logits[0, EOS] = -torch.inf
    return logits.log_softmax(1)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_first_tokens_are_as_frequent_as_they_are_probable(loaded, sources, temperature, top_k):
    settings = [
        Sampling(per_source_token=0, extra=1, temperature=temperature, top_k=top_k, seed=2, draw=draw)
        for draw in range(DRAWS)
    ]
    counted = Counter(loaded.search([sources[0]], EN_DE, each)[0][0].tokens[0] for each in settings)
    scores = log_probabilities(loaded, sources[0], [5])[0] / temperature
    if top_k is not None:
        scores[scores < scores.topk(top_k).values[-1]] = -torch.inf
    wanted = scores.softmax(0)
    assert all(wanted[token] > 0 for token in counted)
    for token in wanted.topk(5).indices.tolist():
        share, deviation = float(wanted[token]), float((wanted[token] * (1 - wanted[token]) / DRAWS).sqrt())
        assert abs(counted[token] / DRAWS - share) <= 4 * deviation + 1e-9, token


def test_a_sentence_is_sampled_alike_in_any_batch_and_scored_as_a_search_scores(loaded, sources):
    settings = Sampling(length_penalty=0.7, seed=3)
    together = loaded.search(sources, EN_DE, settings)
    for source, (found,) in zip(sources, together, strict=True):
        ((alone,),) = loaded.search([source], EN_DE, settings)
        assert alone.tokens == found.tokens and alone.score == pytest.approx(found.score, abs=1e-5)
        logs = log_probabilities(loaded, source, found.tokens)
        total = sum(float(logs[i, token]) for i, token in enumerate([*found.tokens, EOS]))
        assert found.score == pytest.approx(total / (len(found.tokens) + 1) ** 0.7, abs=1e-4)
    limits = settings.limits(torch.tensor([len(source) + 2 for source in sources])).tolist()
    assert all(0 < len(each.tokens) <= most for (each,), most in zip(together, limits, strict=True))


def test_draws_and_seeds_differ_and_one_token_is_greedy_search(loaded, sources):
    found = [
        tuple(loaded.search([sources[1]], EN_DE, Sampling(seed=seed, draw=draw))[0][0].tokens)
        for seed in (1, 2)
        for draw in (0, 1)
    ]
    assert len(set(found)) == 4
    greedy = [best.tokens for (best,) in loaded.search(sources, EN_DE, Search(1))]
    assert [each.tokens for (each,) in loaded.search(sources, EN_DE, Sampling(top_k=1))] == greedy


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": 0.0}, "temperature is 0.0: it must be a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top-k is 0"),
        ({"beam": 5}, "the beam is 5, but sampling has none"),
        ({"n_best": 2}, "2 best translations are wanted, but only a search has them"),
    ],
)
def test_settings_that_are_not_possible(settings, says):
    with pytest.raises(UserError, match=says):
        Sampling(**settings)

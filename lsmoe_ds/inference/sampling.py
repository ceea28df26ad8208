"""Sample translations from a model's distribution, as back-translation does.

Sampled translations are more varied than those of a beam search, and train a better model from text of one
language (Edunov et al., 2018). B sentences, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.beam_search import NOT_FINITE, Hypothesis, Search
from lsmoe_ds.languages import EOS, PAD
from lsmoe_ds.methods.context import Route
from lsmoe_ds.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling(Search):
    """Sample each token instead of searching: from the ``top_k`` most probable ones, or from all, with
    logits divided by ``temperature``.

    What is sampled for a sentence depends on it, on ``seed`` and on ``draw``, and not on its batch.
    """

    beam: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 1
    draw: int = 0

    def __post_init__(self) -> None:
        if self.n_best != 1:
            raise UserError(f"{self.n_best} best translations are wanted, but only a search has them")
        super().__post_init__()
        if self.beam != 1:
            raise UserError(f"the beam is {self.beam}, but sampling has none: set it to 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"the temperature is {self.temperature}: it must be a number above 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k is {self.top_k}: it must be at least 1")

    def generator(self, sentence: Sequence[int]) -> torch.Generator:
        """Return the random numbers of a sentence, given by the ids of its tokens."""
        text = f"{self.seed} {self.draw} {' '.join(map(str, sentence))}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@torch.inference_mode()
def sample(
    model: Transformer,
    source: Tensor,
    ids: SentenceIds,
    banned: Sequence[int],
    sampling: Sampling,
    route: Route = "specific",
    begin: Tensor | None = None,
) -> list[Hypothesis]:
    """Sample one translation of each sentence of ``source`` [B, M].

    The other arguments, the greatest lengths and the scores are those of
    :func:`lsmoe_ds.inference.beam_search.beam_search`. Raises UserError if the model computes values that are
    not finite.
    """
    batch, device = source.shape[0], source.device
    state = model.start(source, ids, route=route)
    limits = sampling.limits((source != PAD).sum(1))  # [B]
    forbidden = torch.tensor(sorted(banned), dtype=torch.long, device=device)
    forbidden_first = torch.tensor(sorted({*banned, EOS}), dtype=torch.long, device=device)
    generators = [sampling.generator([token for token in row if token != PAD]) for row in source.tolist()]
    latest = torch.full((batch, 1), EOS, device=device) if begin is None else begin
    given = latest.shape[1] - 1
    found: list[Hypothesis | None] = [None] * batch
    tokens: list[list[int]] = [[] for _ in range(batch)]
    place = list(range(batch))  # the batch index of each unfinished sentence
    sums = torch.zeros(batch, device=device)

    for position in range(int(limits.max()) + 1):
        logits = model.step(latest, state).float()  # [B, V]
        logits[:, forbidden if position else forbidden_first] = -torch.inf
        logs = logits.log_softmax(1)
        chosen = _draw(logits, sampling, [generators[i] for i in place])
        chosen = chosen.masked_fill(limits <= position, EOS)
        sums = sums + logs.gather(1, chosen[:, None]).squeeze(1)
        if not bool(sums.isfinite().all()):
            raise UserError(NOT_FINITE)
        length = (given + position + 1) ** sampling.length_penalty
        going = []
        for row, (i, token) in enumerate(zip(place, chosen.tolist(), strict=True)):
            if token == EOS:
                found[i] = Hypothesis(tokens[i], float(sums[row]) / length)
            else:
                tokens[i].append(token)
                going.append(row)
        if not going:
            break
        if len(going) < len(place):
            stay = torch.tensor(going, device=device)
            state, sums, limits, chosen = state.select(stay, stay), sums[stay], limits[stay], chosen[stay]
            place = [place[row] for row in going]
        latest = chosen[:, None]
    return [each for each in found if each is not None]


def _draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw a token [B] for each row of logits [B, V], by random numbers of its own.

    The largest of probabilities that are divided by exponential random numbers is one drawn by them.
    """
    scores = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[1]:
        least = scores.topk(sampling.top_k, 1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    noise = torch.stack([torch.empty(logits.shape[1]).exponential_(generator=each) for each in generators])
    return (scores.softmax(1) / noise.to(scores.device)).argmax(1)

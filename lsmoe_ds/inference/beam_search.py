"""Batched beam search with key-value caches.

The score of a hypothesis is fairseq's: the sum of its tokens' log-probabilities divided by ``length **
length_penalty``, where the length counts the generated tokens, EOS included. A tag that is given before the
translation counts in the length, and its probability not in the sum, as with transformers'
``forced_bos_token_id`` and CTranslate2's ``target_prefix``. As in fairseq, of the continuations of a
sentence's hypotheses the best ``beam`` are looked at: those that end in EOS are finished, and the best
``beam`` that do not end go on. A sentence is done when ``beam`` hypotheses are finished or, which changes no
result, when none that is continued can still win. (transformers' ``early_stopping=True`` counts in the same
way; its default searches longer.)

B sentences, W hypotheses a sentence, M source positions, V vocabulary, C candidates a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import BOS, EOS, PAD
from lsmoe_ds.methods.context import Route
from lsmoe_ds.model.transformer import Transformer

NOT_FINITE = (
    "the model computes values that are not finite numbers: its training went astray before this checkpoint"
)


@dataclass(frozen=True)
class Search:
    """``beam`` 1 is greedy search. A translation has at least one token beside EOS, and at most
    ``per_source_token * source + extra``, where the source counts its tag and EOS."""

    beam: int = 5
    length_penalty: float = 1.0
    per_source_token: float = 2.0
    extra: int = 20

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise UserError(f"the beam is {self.beam}: it must be at least 1")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"the length penalty is {self.length_penalty}: it must be a number such as 1.0")
        if self.per_source_token < 0 or self.per_source_token + self.extra < 1:
            raise UserError(
                f"at most {self.per_source_token} x source + {self.extra} tokens would be translated into: "
                "that must allow at least one"
            )

    def limits(self, lengths: Tensor) -> Tensor:
        """Return the most tokens, without EOS, of a translation of sources of these lengths (1 or more)."""
        return (lengths * self.per_source_token + self.extra).long()


@dataclass(frozen=True)
class Hypothesis:
    """The best translation found: its tokens, without EOS, and its score."""

    tokens: list[int]
    score: float


def never_generated(vocabulary: Vocabulary) -> list[int]:
    """List the ids that are no part of a translation."""
    return [BOS, PAD, *(vocabulary.tag_id(code) for code in vocabulary.codes), *vocabulary.unused]


@torch.inference_mode()
def beam_search(
    model: Transformer,
    source: Tensor,
    ids: SentenceIds,
    banned: Sequence[int],
    search: Search,
    route: Route = "specific",
    begin: Tensor | None = None,
) -> list[Hypothesis]:
    """Find the best translation of each sentence of ``source`` [B, M], whatever else is in the batch.

    ``banned`` are tokens that are never generated (PAD, BOS, tags): the others share all the probability, as
    in CTranslate2. Each translation follows what ``begin`` [B, 1 or 2] says of its sentence, EOS and perhaps
    a tag; by default EOS alone. Raises UserError if the model computes values that are not finite.
    """
    batch, device = source.shape[0], source.device
    state = model.start(source, ids, route=route)
    limits = search.limits((source != PAD).sum(1))  # [B]
    first_limit, last_limit = int(limits.min()), int(limits.max())
    forbidden = torch.tensor(sorted(banned), dtype=torch.long, device=device)
    forbidden_first = torch.tensor(sorted({*banned, EOS}), dtype=torch.long, device=device)

    # The best finished hypothesis of every sentence.
    best = torch.full((batch,), -torch.inf, device=device)
    best_tokens = torch.full((batch, last_limit), EOS, device=device)
    best_length = torch.zeros(batch, dtype=torch.long, device=device)

    # For each unfinished sentence: its place in the batch, its finished hypotheses, and those that continue.
    place = torch.arange(batch, device=device)
    finished = torch.zeros(batch, dtype=torch.long, device=device)
    sums = torch.zeros(batch, 1, device=device)  # [B, W]
    tokens = torch.empty(batch, 1, 0, dtype=torch.long, device=device)  # [B, W, position]
    latest = torch.full((batch, 1), EOS, device=device) if begin is None else begin  # [B W, positions]
    given = latest.shape[1] - 1

    for position in range(last_limit + 1):
        width = sums.shape[1]
        logits = model.step(latest, state).float()  # [B W, V]
        logits[:, forbidden if position else forbidden_first] = -torch.inf
        logs = logits.log_softmax(1)
        if position >= first_limit:
            over = (limits <= position).repeat_interleave(width)
            ends = logs[over, EOS]
            logs[over] = -torch.inf
            logs[over, EOS] = ends

        # The best 2 W' of all continuations are among the best 2 W' of each hypothesis; half of them at least
        # do not end.
        values, words = logs.topk(min(2 * search.beam, logs.shape[1]), 1)  # [B W, C']
        each = values.shape[1]
        candidates = (values.view(-1, width, each) + sums[:, :, None]).flatten(1)  # [B, W C']
        scores, chosen = candidates.topk(min(2 * search.beam, candidates.shape[1]), 1)  # [B, C]
        words = words.view(-1, width * each).gather(1, chosen)  # [B, C]
        parents = chosen // each  # [B, C]
        ends_here = words == EOS

        # Finish.
        looked_at = torch.arange(scores.shape[1], device=device) < search.beam
        finishing = ends_here & looked_at & scores.isfinite()
        finished += finishing.sum(1)
        scored = (scores / (given + position + 1) ** search.length_penalty).masked_fill(
            ~finishing, -torch.inf
        )
        score, which = scored.max(1)
        better = score > best[place]
        improved, parent = place[better], parents[better].gather(1, which[better, None])  # [I], [I, 1]
        best[improved] = score[better]
        best_length[improved] = position
        best_tokens[improved, :position] = (
            tokens[better].gather(1, parent[:, :, None].expand(-1, 1, position)).squeeze(1)
        )

        # Go on.
        going = ends_here.to(torch.int8).argsort(dim=1, stable=True)[
            :, : search.beam
        ]  # [B, W']: the best that do not end
        sums = scores.masked_fill(ends_here, -torch.inf).gather(1, going)
        # A sum can only fall, so divided by the most favorable length it bounds what can still be reached.
        next_length, longest = given + position + 2, (given + limits + 1).float()
        most = (longest**search.length_penalty).clamp(min=next_length**search.length_penalty)  # [B]
        done = (finished >= search.beam) | (sums[:, 0] / most <= best[place])
        words, parents = words.gather(1, going), parents.gather(1, going)
        rows = parents + torch.arange(len(place), device=device)[:, None] * width  # [B, W']
        tokens = torch.cat(
            [tokens.gather(1, parents[:, :, None].expand(-1, -1, position)), words[:, :, None]], 2
        )
        some_done = bool(done.any())
        if some_done:
            stay = (~done).nonzero().squeeze(1)
            if not len(stay):
                break
            place, finished, limits = place[stay], finished[stay], limits[stay]
            sums, tokens, words, rows = sums[stay], tokens[stay], words[stay], rows[stay]
        if some_done or search.beam > 1:
            state = state.select(stay if some_done else None, rows.flatten())
        latest = words.reshape(-1, 1)

    if not bool(best.isfinite().all()):
        raise UserError(NOT_FINITE)
    found = zip(best_tokens.tolist(), best_length.tolist(), best.tolist(), strict=True)
    return [Hypothesis(words[:length], score) for words, length, score in found]

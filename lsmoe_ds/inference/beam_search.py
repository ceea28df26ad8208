"""Batched beam search with key-value caches.

The score of a hypothesis is fairseq's: the sum of its tokens' log-probabilities divided by ``length **
length_penalty``, where the length counts the generated tokens and EOS. A given tag before the translation
counts in the length, but its probability not in the sum, as with transformers' ``forced_bos_token_id`` and
CTranslate2's ``target_prefix``. As in fairseq, each step finishes those of the best ``beam`` continuations of
a sentence that end in EOS, and continues the best ``beam`` that do not. A sentence is done after the step in
which its ``beam``-th hypothesis finishes, or earlier, without changing the result, when no continued
hypothesis can be one of the ``n_best`` any more. (transformers' ``early_stopping=True`` counts in the same
way; its default searches longer.) So the N best are the first N of any greater ``n_best``, which only takes
more steps.

B sentences, W hypotheses a sentence, N best of them, M source positions, V vocabulary, C candidates a
sentence.
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
    """Settings of a search for the ``n_best`` translations; ``beam`` 1 is greedy. A translation has at least
    one token beside EOS, and at most ``per_source_token * source + extra``, where ``source`` counts the
    source's tokens, tag and EOS."""

    beam: int = 5
    length_penalty: float = 1.0
    per_source_token: float = 2.0
    extra: int = 20
    n_best: int = 1

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise UserError(f"the beam is {self.beam}: it must be at least 1")
        if not 1 <= self.n_best <= self.beam:
            raise UserError(
                f"{self.n_best} best translations are wanted of a beam of {self.beam}: choose "
                f"{f'from 1 to {self.beam}' if self.beam > 1 else 1}, or a larger beam"
            )
        if not -10 <= self.length_penalty <= 10:  # length ** penalty must be a number
            raise UserError(
                f"the length penalty is {self.length_penalty}: it must be a number from -10 to 10, as 1.0 is"
            )
        if self.per_source_token < 0 or self.per_source_token + self.extra < 1:
            raise UserError(
                f"at most {self.per_source_token} x source + {self.extra} tokens would be translated into: "
                "that must allow at least one"
            )

    def limits(self, lengths: Tensor) -> Tensor:
        """Return the maximum length, without EOS, of a translation for each source length (1 or more)."""
        return (lengths * self.per_source_token + self.extra).long()


@dataclass(frozen=True)
class Hypothesis:
    """A translation found: its tokens, without EOS, and its score."""

    tokens: list[int]
    score: float


@dataclass(frozen=True)
class _Finished:
    """The N best finished hypotheses of B sentences, best first: their scores, tokens [B, N, longest] and
    ``lengths``. The score of an empty place is minus infinity.
    """

    scores: Tensor  # [B, N]
    tokens: Tensor
    lengths: Tensor  # [B, N]

    @classmethod
    def none(cls, batch: int, n_best: int, longest: int, device: torch.device) -> _Finished:
        return cls(
            torch.full((batch, n_best), -torch.inf, device=device),
            torch.full((batch, n_best, longest), EOS, device=device),
            torch.zeros(batch, n_best, dtype=torch.long, device=device),
        )

    def add(self, place: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor) -> None:
        """Add the candidates of U unfinished sentences that end in this step.

        ``place`` [U] has the sentences' indices, ``scores`` [U, C] minus infinity for those that do not end.
        A candidate's tokens are those of its parent (``parents`` [U, C]) in ``tokens`` [U, W, length].
        """
        better = (scores.amax(1) > self.scores[place, -1]).nonzero().squeeze(1)  # [I]
        if not len(better):
            return
        improved, parents = place[better], parents[better]
        n_best, length = self.scores.shape[1], tokens.shape[2]
        together = torch.cat([self.scores[improved], scores[better]], 1)  # [I, N + C]
        # Stable, so that of equal scores the one that finished first stays.
        ranked, order = together.sort(dim=1, descending=True, stable=True)
        self.scores[improved], order = ranked[:, :n_best], order[:, :n_best]
        lengths = torch.cat([self.lengths[improved], torch.full_like(parents, length)], 1)
        self.lengths[improved] = lengths.gather(1, order)
        # Those that finished in earlier steps are shorter, so the first ``length`` tokens are all they have.
        sequences = torch.cat([self.tokens[improved, :, :length], tokens[better]], 1)  # [I, N + W, length]
        own = torch.arange(n_best, device=place.device).expand(len(better), -1)
        rows = torch.cat([own, n_best + parents], 1).gather(1, order)  # [I, N]
        self.tokens[improved, :, :length] = sequences.gather(1, rows[:, :, None].expand(-1, -1, length))

    def hypotheses(self) -> list[list[Hypothesis]]:
        """Return the hypotheses of each sentence. Raises UserError if a sentence has none."""
        if not bool(self.scores[:, 0].isfinite().all()):
            raise UserError(NOT_FINITE)
        found = zip(self.tokens.tolist(), self.lengths.tolist(), self.scores.tolist(), strict=True)
        return [
            [
                Hypothesis(words[:length], score)
                for words, length, score in zip(*each, strict=True)
                if score > -math.inf
            ]
            for each in found
        ]


def never_generated(vocabulary: Vocabulary) -> list[int]:
    """List the ids that are never generated: BOS, PAD, tags and unused ids."""
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
) -> list[list[Hypothesis]]:
    """Find the best translations of each sentence of ``source`` [B, M], independent of the rest of the batch:
    ``search.n_best``, best first, or fewer (at least one) if no more finish.

    ``banned`` tokens (PAD, BOS, tags) are never generated; the others share all the probability, as in
    CTranslate2. ``begin`` [B, 1 or 2] has the tokens before each translation: EOS (the default), and perhaps
    a tag. Raises UserError if the model computes values that are not finite.
    """
    batch, device = source.shape[0], source.device
    state = model.start(source, ids, route=route)
    limits = search.limits((source != PAD).sum(1))  # [B]
    first_limit, last_limit = int(limits.min()), int(limits.max())
    forbidden = torch.tensor(sorted(banned), dtype=torch.long, device=device)
    forbidden_first = torch.tensor(sorted({*banned, EOS}), dtype=torch.long, device=device)

    best = _Finished.none(batch, search.n_best, last_limit, device)

    # For each unfinished sentence: its index in the batch, its finished hypotheses, and its open ones.
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

        # The best 2 W' of all continuations are among the best 2 W' of each hypothesis, and at least half of
        # them do not end.
        values, words = logs.topk(min(2 * search.beam, logs.shape[1]), 1)  # [B W, C']
        each = values.shape[1]
        candidates = (values.view(-1, width, each) + sums[:, :, None]).flatten(1)  # [B, W C']
        scores, chosen = candidates.topk(min(2 * search.beam, candidates.shape[1]), 1)  # [B, C]
        words = words.view(-1, width * each).gather(1, chosen)  # [B, C]
        parents = chosen // each  # [B, C]
        ends_here = words == EOS

        # Finish hypotheses that end in EOS.
        looked_at = torch.arange(scores.shape[1], device=device) < search.beam
        finishing = ends_here & looked_at & scores.isfinite()
        finished += finishing.sum(1)
        scored = (scores / (given + position + 1) ** search.length_penalty).masked_fill(
            ~finishing, -torch.inf
        )
        best.add(place, scored, tokens, parents)

        # Continue the best that do not end.
        going = ends_here.to(torch.int8).argsort(dim=1, stable=True)[
            :, : search.beam
        ]  # [B, W']: the best that do not end
        sums = scores.masked_fill(ends_here, -torch.inf).gather(1, going)
        # Sums only fall, so a sum divided by the most favorable length penalty bounds all later scores.
        next_length, longest = given + position + 2, (given + limits + 1).float()
        most = (longest**search.length_penalty).clamp(min=next_length**search.length_penalty)  # [B]
        done = (finished >= search.beam) | (sums[:, 0] / most <= best.scores[place, -1])
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

    return best.hypotheses()

"""Translate with a language model of transformers, by transformers' beam search. B sentences, W beams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds.config.host import import_transformers
from lsmoe_ds.data.batches import SequenceBatch
from lsmoe_ds.inference.beam_search import Hypothesis, Search

# A byte-level tokenizer may cut a translation into more tokens than its source.
PER_SOURCE_TOKEN = 4.0

Best = tuple[Tensor, Tensor]  # log-probabilities and tokens [B W, C] of one step, the best 2 W of each row


@torch.inference_mode()
def generate(
    write: Callable[..., Any],
    batch: SequenceBatch,
    lengths: Sequence[int],
    end: int,
    search: Search,
    window: int | None,
) -> list[list[Hypothesis]]:
    """Find the best answers to each prompt by calling ``write``, a model's ``generate`` bound to this batch.

    The B source ``lengths`` and the model's ``window`` limit the answers; the token ``end`` ends one.
    """
    begun = batch.tokens.shape[1]
    limits = [math.ceil(PER_SOURCE_TOKEN * length) + search.extra for length in lengths]
    if window is not None:
        limits = [max(1, min(limit, window - begun - 1)) for limit in limits]
    most = torch.tensor(limits, device=batch.tokens.device)
    best: list[Best] = []

    def stop(tokens: Tensor, scores: Tensor) -> Tensor:
        """Allow only ``end`` at the maximum length; tokens [B W, T], scores [B W, V]."""
        over = (most <= tokens.shape[1] - begun).repeat_interleave(search.beam)
        ends = scores[over, end]
        scores = scores.masked_fill(over[:, None], -math.inf)
        scores[over, end] = ends
        values, words = scores.topk(min(2 * search.beam, scores.shape[1]), 1)
        best.append((values, words))
        return scores

    transformers = import_transformers()
    found = write(
        # A forced end keeps its own probability, so force it after the normalization.
        logits_processor=transformers.LogitsProcessorList([transformers.LogitNormalization(), stop]),
        # The folder's own settings may sample, or penalize repetitions.
        generation_config=transformers.GenerationConfig(
            num_beams=search.beam,
            num_return_sequences=search.n_best,
            length_penalty=search.length_penalty,
            early_stopping=search.beam > 1,
            max_new_tokens=max(limits) + 1,
            eos_token_id=end,
            pad_token_id=end,
            return_dict_in_generate=True,
        ),
    )
    answers = found.sequences[:, begun:]  # [B N, T]
    # In greedy search, a sentence has one row of its own.
    rows = (
        found.beam_indices if search.beam > 1 else torch.arange(len(answers), device=answers.device)[:, None]
    )
    scores = _scores(best, answers, rows, end, search.length_penalty)
    hypotheses = [
        Hypothesis(row[: row.index(end)] if end in row else row, score)
        for row, score in zip(answers.tolist(), scores.tolist(), strict=True)
    ]
    return [hypotheses[start : start + search.n_best] for start in range(0, len(hypotheses), search.n_best)]


def _scores(best: Sequence[Best], answers: Tensor, rows: Tensor, end: int, length_penalty: float) -> Tensor:
    """Return the scores [A] of answers [A, T], as those of :mod:`lsmoe_ds.inference.beam_search`.

    ``best`` has the best tokens of each row at each step, ``rows`` [A, T or 1] the row that each token of an
    answer continues (-1 after its end). transformers' own scores would keep the log-probabilities of all
    tokens at all steps.
    """
    values, words = (torch.stack(each, 1) for each in zip(*best, strict=True))  # [B W, steps, C]
    at = rows.clamp(min=0), torch.arange(answers.shape[1], device=answers.device)
    values, words = values[at], words[at]  # [A, T, C]
    found = values.masked_fill(words != answers[:, :, None], -math.inf).amax(2)
    # The search may have chosen another of several tokens that are as probable as the last of the best.
    found = torch.where(found.isfinite(), found, values[:, :, -1])
    ends = answers == end
    counts = ends.cumsum(1) - ends.long() == 0  # up to the end, which counts
    return found.masked_fill(~counts, 0.0).sum(1) / counts.sum(1) ** length_penalty

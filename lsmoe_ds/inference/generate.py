"""Translate with a language model of transformers, by its own beam search. B sentences, W beams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lsmoe_ds.config.host import import_transformers
from lsmoe_ds.data.batches import SequenceBatch
from lsmoe_ds.inference.beam_search import Hypothesis, Search

# A byte-level tokenizer may cut a translation into more tokens than its source.
PER_SOURCE_TOKEN = 4.0


@torch.inference_mode()
def generate(
    write: Callable[..., Tensor],
    batch: SequenceBatch,
    lengths: Sequence[int],
    end: int,
    search: Search,
    window: int | None,
) -> list[Hypothesis]:
    """Find the best answer of each prompt by ``write``, transformers' ``generate`` of a model on this batch.

    ``lengths`` are those of the B sources, which limit the answers, like the ``window`` of the model; ``end``
    is the token that ends one.
    """
    begun = batch.tokens.shape[1]
    limits = [math.ceil(PER_SOURCE_TOKEN * length) + search.extra for length in lengths]
    if window is not None:
        limits = [max(1, min(limit, window - begun - 1)) for limit in limits]
    most = torch.tensor(limits, device=batch.tokens.device)

    def stop(tokens: Tensor, scores: Tensor) -> Tensor:
        """Allow only the end once the greatest length is reached; tokens [B W, T], scores [B W, V]."""
        over = (most <= tokens.shape[1] - begun).repeat_interleave(search.beam)
        ends = scores[over, end]
        scores = scores.masked_fill(over[:, None], -math.inf)
        scores[over, end] = ends
        return scores

    transformers = import_transformers()
    found = write(
        # An end that is forced has its own probability, so it comes after the normalization.
        logits_processor=transformers.LogitsProcessorList([transformers.LogitNormalization(), stop]),
        # The folder's own settings may sample, or punish what was written before.
        generation_config=transformers.GenerationConfig(
            num_beams=search.beam,
            length_penalty=search.length_penalty,
            early_stopping=search.beam > 1,
            max_new_tokens=max(limits) + 1,
            eos_token_id=end,
            pad_token_id=end,
        ),
    )
    answers = (row[begun:] for row in found.tolist())
    return [Hypothesis(row[: row.index(end)] if end in row else row, math.nan) for row in answers]

"""Compare a converted model with what it came from, on the same held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lsmoe_ds.data.batches import Batch
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import Engine
from lsmoe_ds.inference.label import Labeller, label_all
from lsmoe_ds.inference.load import Loaded
from lsmoe_ds.inference.translate import cut_line, translate_tokens
from lsmoe_ds.languages import Direction

BATCH = 16  # sentences whose logits are held at once


@dataclass(frozen=True)
class Agreement:
    """Two models on the same sentences: teacher-forced logits (None of an engine that gives none), and beam-5
    translations; or the logits and the labels of encoders.
    """

    largest_logit_difference: float | None
    same_translations: int
    sentences: int


def compare(sparse: Loaded, other: Engine, direction: Direction, sentences: Sequence[str]) -> Agreement:
    """Compare the logits of both models along the sparse model's translations, and the translations
    themselves.

    A model with a tokenizer of its own reads the sentences with that.
    """
    parts = [cut_line(line, sparse) for line in sentences]
    sources = [part for each in parts for part in each]
    theirs = sources
    if isinstance(other, Exported):
        theirs = [
            part
            for line, each in zip(sentences, parts, strict=True)
            for part in (each if len(each) != 1 else [other.encode(line)])
        ]
    first, second = (
        translate_tokens(sparse, direction, sources, Search()),
        translate_tokens(other, direction, theirs, Search()),
    )
    same = sum(a.tokens == b.tokens for a, b in zip(first, second, strict=True))
    if not isinstance(other, Loaded | Exported):
        return Agreement(None, same, len(sources))
    largest = 0.0
    for start in range(0, len(sources), BATCH):
        targets = [hypothesis.tokens for hypothesis in first[start : start + BATCH]]
        logits = [
            _logits(model, direction, sources[start : start + BATCH], targets) for model in (sparse, other)
        ]
        both = min(each.shape[1] for each in logits)  # a grown model has further tags, at the end
        largest = max(largest, (logits[0][:, :both] - logits[1][:, :both]).abs().max().item())
    return Agreement(largest, same, len(sources))


@torch.inference_mode()
def _logits(
    engine: Loaded | Exported,
    direction: Direction,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Return teacher-forced logits at all real positions of a batch [N, V], on the CPU."""
    number = engine.languages.direction_id(direction)
    form = form_of(engine.recipe.data, engine.languages, engine.vocabulary)
    batch = form.collate(sources, targets, [number] * len(sources)).to(engine.device)
    return engine.logits_of(batch)[batch.read].cpu()


class _Noted:
    """A labeller that keeps the logits of its batches."""

    def __init__(self, engine: Labeller) -> None:
        self.recipe, self.vocabulary = engine.recipe, engine.vocabulary
        self.languages, self.device, self._engine = engine.languages, engine.device, engine
        self.logits: list[torch.Tensor] = []

    def logits_of(self, batch: Batch) -> torch.Tensor:
        found = self._engine.logits_of(batch)
        self.logits.append(found.cpu())
        return found


def compare_labels(sparse: Loaded, other: Engine, direction: Direction, lines: Sequence[str]) -> Agreement:
    """Compare the logits and the labels of two encoders on the same lines."""
    assert isinstance(other, Labeller)
    both = _Noted(sparse), _Noted(other)
    first, second = (label_all(each, direction, lines) for each in both)
    largest = max(float((a - b).abs().max()) for a, b in zip(both[0].logits, both[1].logits, strict=True))
    return Agreement(largest, sum(a == b for a, b in zip(first, second, strict=True)), len(lines))

"""Compare a converted model, loaded as users would, with its source model on held-out sentences."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.m2m_100 import type_of
from lsmoe_ds.checkpoint.stored import Stored, find_model
from lsmoe_ds.config.host import NLLB_MOE
from lsmoe_ds.console import progress
from lsmoe_ds.data.batches import Batch
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.metrics import TASKS
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.export.peft import open_adapted
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import Engine
from lsmoe_ds.inference.label import Labeller, label_all
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import cut_line, translate_tokens

BATCH = 16  # sentences whose logits are in memory at once


@dataclass(frozen=True)
class Agreement:
    """The agreement of two models on the same sentences: the largest difference of teacher-forced logits
    (None for an engine without logits), and how many beam-5 translations, or labels of encoders, are the
    ``same``.
    """

    largest_logit_difference: float | None
    same: int
    sentences: int


def compare(
    sparse: Loaded,
    other: Engine,
    direction: Direction,
    sentences: Sequence[str],
    advance: Callable[[int], None] = lambda sentences: None,
) -> Agreement:
    """Compare the logits of both models along the sparse model's translations, and the translations
    themselves.

    A model with its own tokenizer encodes the sentences with it. ``advance`` is called with the numbers of
    sentences that a model has translated.
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
        translate_tokens(sparse, direction, sources, Search(), advance=advance),
        translate_tokens(other, direction, theirs, Search(), advance=advance),
    )
    same = sum(a.tokens == b.tokens for (a,), (b,) in zip(first, second, strict=True))
    if not isinstance(other, Loaded | Exported):
        return Agreement(None, same, len(sources))
    largest = 0.0
    for start in range(0, len(sources), BATCH):
        targets = [best.tokens for (best,) in first[start : start + BATCH]]
        logits = [
            _logits(model, direction, sources[start : start + BATCH], targets) for model in (sparse, other)
        ]
        both = min(each.shape[1] for each in logits)  # a grown model has additional tags at the end
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
    if isinstance(engine, Loaded):
        batch = engine.collate(sources, targets, direction)
    else:
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


def compare_labels(
    sparse: Loaded,
    other: Engine,
    direction: Direction,
    lines: Sequence[str],
    advance: Callable[[int], None] = lambda lines: None,
) -> Agreement:
    """Compare the logits and the labels of two encoders on the same lines."""
    assert isinstance(other, Labeller)
    both = _Noted(sparse), _Noted(other)
    first, second = (label_all(each, direction, lines, advance) for each in both)
    largest = max(float((a - b).abs().max()) for a, b in zip(both[0].logits, both[1].logits, strict=True))
    return Agreement(largest, sum(a == b for a, b in zip(first, second, strict=True)), len(lines))


def check_agreement(
    stored: Stored,
    to: str,
    direction: Direction | None,
    out: Path,
    check: int,
    route: str,
    average: Averaging,
    made: dict[str, Any],
    served: Collection[Direction] = (),
    base: Path | None = None,
) -> dict[str, Any]:
    """Compare both models on ``check`` held-out sentences, or return the reason why that is not possible.

    Without a ``direction``, sentences are spread evenly over all directions, or over those ``served`` by
    adapters. ``base`` is the folder of the adapters' base, if it is elsewhere.
    """
    if not check:
        return {}
    needed = 4 * (made["sparse_parameters"] + made["dense_parameters"])
    if needed > (free := psutil.virtual_memory().available):
        return {
            "not_checked": f"both models need {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
        }
    of_theirs = to == "huggingface" and is_theirs(find_model(out))
    for package in ["transformers", "peft"] if to == "peft" else ["transformers"] if of_theirs else []:
        if importlib.util.find_spec(package) is None:
            return {"not_checked": f"{package} is not installed: pip install {package}"}
    all_of = [each for each in stored.recipe.languages.directions if not served or each in served]
    directions = [direction] if direction else all_of
    try:
        data = PreparedData.of(stored.recipe, stored.home)
        shares = spread(check, len(directions))
        texts = {
            each: _held_out(data, _with_text(each, all_of), n)
            for each, n in zip(directions, shares, strict=True)
            if n
        }
    except UserError as error:
        return {"not_checked": f"no held-out text to compare on: {error}"}
    if not any(texts.values()):
        return {
            "not_checked": f"no held-out text to compare on: the dev and test sets in {data.folder} are empty"
        }
    # The run may continue to train meanwhile, so compare with this checkpoint.
    sparse, other = load(stored.weights_in, "cpu", route, average), _open(to, out, base)
    by = compare if stored.recipe.model.task == "translate" else compare_labels
    with progress("comparing both models", 2 * sum(map(len, texts.values()))) as advance:
        found = [
            by(sparse, other(each), each, sentences, advance)
            for each, sentences in texts.items()
            if sentences
        ]
    differences = [
        each.largest_logit_difference for each in found if each.largest_logit_difference is not None
    ]
    record: dict[str, Any] = {"largest_logit_difference": max(differences)} if differences else {}
    task = TASKS[stored.recipe.model.task]
    return record | {
        f"same_{task.results}": sum(each.same for each in found),
        f"{task.item}s": sum(each.sentences for each in found),
    }


def spread(count: int, over: int) -> list[int]:
    """Divide a count evenly: 3 over 5 is 0, 1, 0, 1, 1."""
    return [(i + 1) * count // over - i * count // over for i in range(over)]


def _open(kind: str, folder: Path, base: Path | None) -> Callable[[Direction], Engine]:
    """Load the written folder as users would; return a function that gives a direction's engine."""
    if kind == "peft":
        return open_adapted(find_model(folder), base)
    engine: Engine
    if kind == "huggingface" and is_theirs(stored := find_model(folder)):
        engine = Exported.open(stored)
    else:
        engine = load_engine(folder) if kind == "ctranslate2" else load(folder, "cpu")
    return lambda direction: engine


def is_theirs(stored: Stored) -> bool:
    """Tell whether to check a folder with transformers: not NLLB-MoE, which version 5 computes wrongly, so we
    load it ourselves.
    """
    return type_of(stored.recipe.model) != NLLB_MOE


def _with_text(direction: Direction, trained: Sequence[Direction]) -> Direction:
    """Return a direction with text in the same source language: itself if trained, otherwise another one."""
    others = (each for each in trained if each.source == direction.source)
    return direction if direction in trained else next(others, direction)


def _held_out(data: PreparedData, direction: Direction, count: int) -> list[str]:
    """Return up to ``count`` source sentences of the test set, or of the dev set if that is empty."""
    return data.text(direction, "test")[0][:count] or data.text(direction, "dev")[0][:count]

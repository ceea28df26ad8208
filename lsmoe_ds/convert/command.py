"""The conversion as the command does it: convert, load the result, compare it with what it came from, write that down."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lsmoe_ds.convert.folder import WEIGHTS, find_model
from lsmoe_ds.convert.subnetwork import convert_to_dense
from lsmoe_ds.data.batching import DirectionIds, collate
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import write_whole
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import cut_line, translate_tokens
from lsmoe_ds.languages import Direction, nearest

TARGETS = ("dense",)
BATCH = 16  # sentences whose logits are held at once


@dataclass(frozen=True)
class Agreement:
    """Two models on the same sentences: teacher-forced logits, and beam-5 translations."""

    largest_logit_difference: float
    same_translations: int
    sentences: int


def compare(sparse: Loaded, dense: Loaded, direction: Direction, sentences: Sequence[str]) -> Agreement:
    """Compares the logits of both models along the sparse model's translations, and the translations themselves."""
    sources = [part for line in sentences for part in cut_line(line, sparse)]
    first, second = (translate_tokens(model, direction, sources, Search()) for model in (sparse, dense))
    largest = 0.0
    for start in range(0, len(sources), BATCH):
        targets = [hypothesis.tokens for hypothesis in first[start : start + BATCH]]
        logits = [_logits(model, direction, sources[start : start + BATCH], targets) for model in (sparse, dense)]
        largest = max(largest, (logits[0] - logits[1]).abs().max().item())
    same = sum(a.tokens == b.tokens for a, b in zip(first, second, strict=True))
    return Agreement(largest, same, len(sources))


@torch.inference_mode()
def _logits(loaded: Loaded, direction: Direction, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> torch.Tensor:
    """Teacher-forced logits at all real positions of a batch [N, V], on the CPU."""
    number = loaded.languages.direction_id(direction)
    batch = collate(sources, targets, [number] * len(sources), DirectionIds.of(loaded.languages, loaded.vocabulary)).to(loaded.device)
    return loaded.model.logits(batch.source, batch.decoder_input, batch.ids)[batch.decoder_input != loaded.vocabulary.PAD].cpu()


def convert(run: str | Path, to: str, direction: Direction, out: str | Path, check: int = 100) -> dict[str, Any]:
    """Converts a run or checkpoint for one direction and writes ``conversion.json`` beside its recipe (see evaluation/report.py).

    The first ``check`` held-out sentences are translated by both models; without prepared data, or with 0, none are.
    Returns what was written. Raises UserError for a target, direction or folder that is not possible.
    """
    if to not in TARGETS:
        raise UserError(f"'{to}' is nothing to convert to{nearest(to, TARGETS)}: choose {', '.join(TARGETS)}")
    # The run may go on training meanwhile: from here on it is this checkpoint.
    source, out = find_model(run).weights_in, Path(out)
    began = time.perf_counter()
    provenance = convert_to_dense(source, direction, out)
    seconds = time.perf_counter() - began
    record: dict[str, Any] = {
        "direction": str(direction),
        "sparse_parameters": provenance["sparse_parameters"],
        "dense_parameters": provenance["dense_parameters"],
    }
    sparse = load(source, "cpu")
    if sentences := _held_out(sparse, direction, check):
        found = compare(sparse, load(out, "cpu"), direction, sentences)
        record |= {
            "largest_logit_difference": found.largest_logit_difference,
            "same_translations": found.same_translations,
            "sentences": found.sentences,
        }
    record |= {"dense_bytes": (out / WEIGHTS).stat().st_size, "seconds": round(seconds, 3), "dense_folder": str(out)}
    write_whole(sparse.home / "conversion.json", json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    return record


def _held_out(loaded: Loaded, direction: Direction, count: int) -> list[str]:
    """Up to ``count`` source sentences of the test set, or of dev; none where there is no prepared data."""
    if not count:
        return []
    try:
        data = PreparedData.open(loaded.recipe.prepared)
        return data.text(direction, "test")[0][:count] or data.text(direction, "dev")[0][:count]
    except UserError:
        return []

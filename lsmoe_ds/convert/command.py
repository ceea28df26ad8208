"""The conversion as the command does it: convert, load the result, compare it with what it came from, write that down."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
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
    logits = loaded.model.logits(batch.source, batch.decoder_input, batch.ids, loaded.route)
    return logits[batch.decoder_input != loaded.vocabulary.PAD].cpu()


def convert(
    run: str | Path, to: str, direction: Direction | None, out: str | Path, check: int = 100, route: str = "specific"
) -> dict[str, Any]:
    """Converts a run or checkpoint and writes ``conversion.json`` beside its recipe (see evaluation/report.py).

    For one direction, or by the shared route for all. The first ``check`` held-out sentences of the direction, or as many
    spread over all, are translated by both models; without prepared data, or with 0, none are.
    Returns what was written. Raises UserError for a target, direction, route or folder that is not possible.
    """
    if to not in TARGETS:
        raise UserError(f"'{to}' is nothing to convert to{nearest(to, TARGETS)}: choose {', '.join(TARGETS)}")
    # The run may go on training meanwhile: from here on it is this checkpoint.
    source, out = find_model(run).weights_in, Path(out)
    began = time.perf_counter()
    provenance = convert_to_dense(source, direction, out, route)
    seconds = time.perf_counter() - began
    record: dict[str, Any] = {
        "direction": provenance["direction"],
        "route": provenance["route"],
        "sparse_parameters": provenance["sparse_parameters"],
        "dense_parameters": provenance["dense_parameters"],
    }
    sparse = load(source, "cpu", route)
    directions = [direction] if direction else sparse.languages.directions
    texts = {each: _held_out(sparse, each, ceil(check / len(directions))) for each in directions}
    if any(texts.values()):
        dense = load(out, "cpu")
        found = [compare(sparse, dense, each, sentences) for each, sentences in texts.items() if sentences]
        record |= {
            "largest_logit_difference": max(each.largest_logit_difference for each in found),
            "same_translations": sum(each.same_translations for each in found),
            "sentences": sum(each.sentences for each in found),
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

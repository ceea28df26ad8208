"""Prepare what an engine loads: a folder in the cache, made when it is first requested, or the model itself.

A cache folder's name has a checksum of its source files, the version and the options. So a folder is reused,
also by another server, exactly as long as these are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsmoe_ds import __version__
from lsmoe_ds.checkpoint.stored import PROVENANCE, Stored, Weights, find_model, read_weights, write_folder
from lsmoe_ds.checkpoint.stored import write_files as write_dense
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export import ctranslate2
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.export.subnetwork import chosen_experts, expert_layers, extract_stored
from lsmoe_ds.folders import damage, locked, read_json, sha256
from lsmoe_ds.inference.engine import Engine
from lsmoe_ds.serve.models import Served
from lsmoe_ds.serve.settings import Settings

FLOAT = 4  # bytes of a number in torch
EXPERTS = "serving_experts"  # in the provenance of a cut


@dataclass(frozen=True)
class Ready:
    """A model that is ready to be loaded, its number of parameters, and the ``bytes`` of memory it needs.

    ``experts`` has, for each layer routed by task, its side, its number (from 1), and the numbers (from 0)
    and weights of the experts that serve the direction. ``cut`` tells whether the folder was made just now.
    """

    folder: Path
    bytes: int
    parameters: int
    step: int
    experts: list[dict[str, Any]]
    open: Callable[[], Engine]
    cut: bool = False


def prepare(
    served: Served, direction: Direction | None, settings: Settings, cache: Path, anew: bool = False
) -> Ready:
    """Return the model that serves a direction, or with None all directions.

    It is made if the cache lacks it, or again with ``anew``. Raises UserError if the source model is damaged,
    or the cache cannot be written.
    """
    stored = _there(served)
    if served.way == "whole":
        return _whole(served, stored, settings)
    weights = read_weights(stored)
    kind = "ctranslate2" if served.engine == "ctranslate2" else "dense"
    key = _key(stored, weights, direction, kind, settings)
    name = f"{served.name}-{weights.step}-{direction or 'all'}-{key}"
    folder, cut = cache / name, False
    # Not the lock of the folder's own name, which writing the folder takes.
    with locked(cache / f"{name}-cut", wait=True):
        if anew or not _is_whole(folder):
            _cut(stored, weights, direction, kind, settings, folder)
            cut = True
    provenance = read_json(folder / PROVENANCE) or {}
    parameters = int(provenance.get("dense_parameters", 0))
    held = (folder / "model.bin").stat().st_size if kind == "ctranslate2" else FLOAT * parameters
    experts = provenance.get(EXPERTS, [])
    return Ready(folder, held, parameters, weights.step, experts, lambda: load_engine(folder), cut)


def _there(served: Served) -> Stored:
    """Return the stored model; if a run in training has removed that checkpoint, its newest one."""
    return served.stored if served.stored.weights_in.exists() else find_model(served.path)


def _whole(served: Served, stored: Stored, settings: Settings) -> Ready:
    """Return a model that is loaded unchanged."""
    provenance = read_json(stored.home / PROVENANCE) or {}
    path = stored.weights_in if stored.kind == "sparse" else served.path

    def load() -> Engine:
        return load_engine(path, settings.route)

    if stored.kind == "ctranslate2":
        held = (stored.home / "model.bin").stat().st_size
        parameters, step = provenance.get("dense_parameters", 0), provenance.get("step", 0)
        return Ready(stored.home, held, int(parameters), int(step), [], load)
    weights = read_weights(stored)
    return Ready(stored.home, FLOAT * weights.parameters, weights.parameters, weights.step, [], load)


def _key(stored: Stored, weights: Weights, direction: Direction | None, kind: str, settings: Settings) -> str:
    """Return a checksum of everything that the cache folder depends on."""
    how = [__version__, kind, settings.quantization, settings.route, str(direction), weights.step]
    of = [weights.files, stored.recipe.to_yaml(), sha256(stored.vocabulary)]
    return hashlib.sha256(json.dumps([how, of], sort_keys=True).encode()).hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    """Tell whether the cache has a folder with all its files; loading it verifies their checksums."""
    provenance = read_json(folder / PROVENANCE)
    return provenance is not None and damage(folder, provenance.get("files"), verify=False) is None


def _cut(
    stored: Stored,
    weights: Weights,
    direction: Direction | None,
    kind: str,
    settings: Settings,
    folder: Path,
) -> None:
    """Write the sub-network of a direction, or a whole dense model, as a folder of this kind."""
    tensors, recipe, made = extract_stored(stored, direction, settings.route)
    experts = [] if direction is None else _experts(stored, weights, direction, settings)
    write, options = write_dense, {}
    if kind == "ctranslate2":
        write, options = ctranslate2.write_files, {"quantization": settings.quantization or "float32"}
        made |= options
    provenance = {"kind": kind, **made, EXPERTS: experts}
    try:
        write_folder(folder, tensors, recipe, stored.vocabulary, provenance, write=write, **options)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None


def _experts(
    stored: Stored, weights: Weights, direction: Direction, settings: Settings
) -> list[dict[str, Any]]:
    """Return the experts that serve a direction, by layer (:class:`Ready`)."""
    found = []
    languages = stored.recipe.languages
    for side, layer, moe in expert_layers(stored.recipe.model, settings.route):
        task = languages.task_id(moe.task, direction)
        at = f"{side}.{layer}.feed_forward."
        experts, gates = chosen_experts(weights.tensors, at, moe, languages, task)
        found.append(
            {
                "side": side,
                "layer": layer + 1,
                "of": moe.experts,
                "experts": [
                    {"expert": expert, "weight": round(float(gate), 4)}
                    for expert, gate in zip(experts, gates, strict=True)
                ],
            }
        )
    return found

"""The whole model out of a training checkpoint, whatever its layout: tensor-parallel parts joined, experts collected.

Optimizer states are not read, and of the weights one tensor at a time.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsmoe_ds.convert.tensors import Entry, Files, Tensors
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage
from lsmoe_ds.model.initialization import global_name

MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
EXPERT_FILE = re.compile(r"layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt")


@dataclass
class Consolidated:
    """A whole model by global parameter name (see :mod:`lsmoe_ds.model.initialization`); each tensor is read when it is asked for."""

    step: int
    weights: Tensors
    files: dict[str, str]  # name and sha256 of the files it is read from


def read_checkpoint(checkpoint: Path) -> Consolidated:
    """Opens ``checkpoints/step-N`` of a run: sizes of all its files are checked, and checksums of those that will be read.

    Raises UserError if it is missing or damaged.
    """
    manifest = _read_json(checkpoint / "manifest.json")
    state = _read_json(checkpoint / "state.json")
    try:
        described = manifest["files"]
        names = sorted(name for name in described if MODEL_FILE.fullmatch(name) or EXPERT_FILE.fullmatch(name))
        wrong = damage(checkpoint, described, verify=False) or damage(
            checkpoint, {name: described[name] for name in ["state.json", *names]}, verify=True
        )
        step, tensor, partition = int(state["step"]), int(state["tensor"]), dict(state["partition"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{checkpoint} is damaged: manifest.json or state.json lacks {error}") from None
    if wrong is not None:
        raise UserError(f"{checkpoint} is damaged: {wrong}")
    collector = _Collector(tensor, partition)
    for name in names:
        part = MODEL_FILE.fullmatch(name)
        collector.add(checkpoint / name, None if part is None else int(part.group(1)))
    if collector.ranks != set(range(tensor)):
        raise UserError(f"{checkpoint} is damaged: it holds the weights of {len(collector.ranks)} of {tensor} tensor-parallel ranks")
    return Consolidated(step, collector.tensors(checkpoint), {name: described[name]["sha256"] for name in names})


class _Part(NamedTuple):
    """A tensor in a file, by its name there."""

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass
class _Collector:
    tensor: int
    partition: dict[str, int]  # dimension that is spread over tensor-parallel ranks, by global name
    parts: dict[str, dict[int, _Part]] = field(default_factory=dict)  # by tensor-parallel rank
    ranks: set[int] = field(default_factory=set)
    files: Files[dict[str, Tensor]] = field(default_factory=lambda: Files(_load))

    def add(self, file: Path, rank: int | None) -> None:
        """A file of a tensor-parallel rank's weights, or without a rank one of experts."""
        if rank is not None:
            self.ranks.add(rank)
        for name, value in self.files.get(file).items():
            # DeepSpeed has put the global number of the expert into its names.
            whole = global_name(name, 0, 0) if rank is None else name
            # Of what all ranks hold alike the first is kept.
            number = (rank or 0) if whole in self.partition else 0
            self.parts.setdefault(whole, {}).setdefault(number, _Part(file, name, tuple(value.shape)))

    def tensors(self, checkpoint: Path) -> Tensors:
        entries = {}
        for name, parts in self.parts.items():
            shape = list(parts[min(parts)].shape)
            dimension = self.partition.get(name)
            if dimension is not None:
                alike = len({part.shape for part in parts.values()}) == 1
                if len(parts) != self.tensor or not alike or not (isinstance(dimension, int) and 0 <= dimension < len(shape)):
                    raise UserError(f"{checkpoint} is damaged: its {len(parts)} parts of {name} do not make a whole")
                shape[dimension] *= self.tensor
            entries[name] = self._entry(tuple(shape), dimension, [parts[rank] for rank in sorted(parts)])
        return Tensors(entries)

    def _entry(self, shape: tuple[int, ...], dimension: int | None, parts: list[_Part]) -> Entry:
        def make() -> Tensor:
            whole = torch.empty(shape)
            into = [whole] if dimension is None else whole.chunk(len(parts), dimension)
            for part, place in zip(parts, into, strict=True):
                place.copy_(self.files.get(part.file, 4 * place.numel())[part.name])
            return whole

        return Entry(shape, make)


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, mapped; without the empty extra state of Megatron's layers."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if isinstance(values, dict) and MODEL_FILE.fullmatch(path.name):
        values = values.get("module")
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no model")
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no whole checkpoint: it has no {path.name}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value

"""The whole model out of a training checkpoint, whatever its layout: tensor-parallel parts joined, experts collected.

Optimizer states are not read, and one file is open at a time.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage
from lsmoe_ds.model.initialization import global_name

MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
EXPERT_FILE = re.compile(r"layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt")


@dataclass
class Consolidated:
    """A whole model by global parameter name (see :mod:`lsmoe_ds.model.initialization`), in float32, on the CPU."""

    step: int
    weights: dict[str, Tensor]
    files: dict[str, str]  # name and sha256 of the files it was read from


def read_checkpoint(checkpoint: Path) -> Consolidated:
    """Reads ``checkpoints/step-N`` of a run: sizes of all its files are checked, and checksums of those that are read.

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
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint} is damaged: manifest.json or state.json lacks {error}") from None
    if wrong is not None:
        raise UserError(f"{checkpoint} is damaged: {wrong}")
    found = Consolidated(step, {}, {name: described[name]["sha256"] for name in names})
    collector = _Collector(tensor, partition, found.weights)
    for name in names:
        values = _load(checkpoint / name)
        part = MODEL_FILE.fullmatch(name)
        if part is None:
            # DeepSpeed has put the global number of the expert into its names.
            collector.add_experts(values)
        elif isinstance(values.get("module"), dict):
            collector.add_rank(int(part.group(1)), values["module"])
        else:
            raise UserError(f"{checkpoint / name} is damaged: it holds no model")
    if collector.ranks != set(range(tensor)):
        raise UserError(f"{checkpoint} is damaged: it holds the weights of {len(collector.ranks)} of {tensor} tensor-parallel ranks")
    return found


@dataclass
class _Collector:
    tensor: int
    partition: dict[str, int]  # dimension that is spread over tensor-parallel ranks, by global name
    weights: dict[str, Tensor]
    ranks: set[int] = field(default_factory=set)

    def add_experts(self, values: dict[str, Any]) -> None:
        for name, value in _tensors(values).items():
            self.weights[global_name(name, 0, 0)] = value.float().clone()

    def add_rank(self, rank: int, values: dict[str, Any]) -> None:
        self.ranks.add(rank)
        for name, value in _tensors(values).items():
            if name not in self.partition:
                # All ranks hold the same; the first is kept.
                self.weights.setdefault(name, value.float().clone())
                continue
            dimension = self.partition[name]
            if name not in self.weights:
                shape = list(value.shape)
                shape[dimension] *= self.tensor
                self.weights[name] = torch.empty(shape)
            size = value.shape[dimension]
            self.weights[name].narrow(dimension, rank * size, size).copy_(value)


def _tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    """Without the empty extra state of Megatron's layers."""
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _load(path: Path) -> dict[str, Any]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no weights")
    return values


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

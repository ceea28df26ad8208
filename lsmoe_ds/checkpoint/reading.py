"""Read the whole model from a training checkpoint of any layout: join tensor-parallel parts, collect experts.

Weights are read one tensor at a time; optimizer states are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.frozen import open_frozen
from lsmoe_ds.checkpoint.run_folder import FROZEN, frozen_damage
from lsmoe_ds.checkpoint.sparse import unpack
from lsmoe_ds.checkpoint.tensors import BUFFERS, KEPT, Files, LazyTensor, Tensors
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import checker, damage, is_count, read_fields
from lsmoe_ds.notices import counted
from lsmoe_ds.parallel.parameters import global_name

MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
EXPERT_FILE = re.compile(r"layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt")


@dataclass
class WholeCheckpoint:
    """A whole model by global parameter name (see :mod:`lsmoe_ds.model.initialization`); each tensor is read
    on demand.
    """

    step: int
    weights: Tensors
    files: dict[str, str]  # sha256 by name of the files that hold it
    frozen: frozenset[str] = frozenset()  # names of the weights that did not train


def read_checkpoint(checkpoint: Path) -> WholeCheckpoint:
    """Open ``checkpoints/step-N`` of a run. File sizes are checked now, a file's checksum when its first
    tensor is read.

    Raises UserError if it is missing or damaged.
    """
    described = read_fields(checkpoint / "manifest.json", files=dict)["files"]
    state = read_fields(checkpoint / "state.json", step=int, tensor=int, partition=dict)
    # Treat an unlisted file as an error, like a missing one.
    present = {path.name for path in checkpoint.iterdir()} | described.keys()
    names = sorted(name for name in present if MODEL_FILE.fullmatch(name) or EXPERT_FILE.fullmatch(name))
    wrong = damage(checkpoint, described | {name: described.get(name) for name in names}, verify=False)
    wrong = wrong or damage(checkpoint, {"state.json": described.get("state.json")}, verify=True)
    if wrong := wrong or frozen_damage(checkpoint, state, checksums=False):
        raise UserError(f"{checkpoint} is damaged: {wrong}")
    tensor = state["tensor"]
    buffers, files = state.get(BUFFERS, []), Files(_load, checker(checkpoint, described))
    if not isinstance(buffers, list):
        raise UserError(f"{checkpoint} is damaged: '{BUFFERS}' of state.json should be a list")
    collector = _Collector(tensor, state["partition"], buffers, files)
    for name in names:
        part = MODEL_FILE.fullmatch(name)
        collector.add(checkpoint / name, None if part is None else int(part.group(1)))
    if sorted(collector.ranks) != list(range(len(collector.ranks))) or len(collector.ranks) != tensor:
        ranks = f"{len(collector.ranks)} of {counted(tensor, 'tensor-parallel rank')}"
        raise UserError(f"{checkpoint} is damaged: it holds the weights of {ranks}")
    weights, sums = collector.tensors(checkpoint), {name: described[name]["sha256"] for name in names}
    if state.get(FROZEN) is None:
        return WholeCheckpoint(state["step"], weights, sums)
    frozen, sums_of_frozen = open_frozen(checkpoint.resolve().parent.parent)
    whole = Tensors(frozen.entries | weights.entries)
    return WholeCheckpoint(state["step"], whole, sums_of_frozen | sums, frozenset(frozen))


class _Part(NamedTuple):
    """A tensor in a file, by its name there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Collector:
    tensor: int
    partition: dict[str, int]  # dimension that is spread over tensor-parallel ranks, by global name
    buffers: list[str]
    files: Files[dict[str, Tensor]]
    parts: dict[str, dict[int, _Part]] = field(default_factory=dict)  # by tensor-parallel rank
    ranks: set[int] = field(default_factory=set)

    def add(self, file: Path, rank: int | None) -> None:
        """Add a file of a tensor-parallel rank's weights, or, if ``rank`` is None, a file of experts."""
        if rank is not None:
            self.ranks.add(rank)
        for name, value in self.files.get(file).items():
            # DeepSpeed has put the global number of the expert into its names.
            whole = global_name(name, 0, 0) if rank is None else name
            # Tensors that all ranks hold alike are read from the first.
            number = (rank or 0) if whole in self.partition else 0
            part = _Part(file, name, tuple(value.shape), value.dtype)
            self.parts.setdefault(whole, {}).setdefault(number, part)

    def tensors(self, checkpoint: Path) -> Tensors:
        entries = {}
        for name, parts in self.parts.items():
            shape = list(parts[min(parts)].shape)
            dimension = self.partition.get(name)
            if name in self.partition:
                alike = len({part.shape for part in parts.values()}) == 1
                if (
                    len(parts) != self.tensor
                    or not alike
                    or not is_count(dimension)
                    or dimension >= len(shape)
                ):
                    found = counted(len(parts), "part")
                    raise UserError(f"{checkpoint} is damaged: its {found} of {name} cannot make a whole")
                shape[dimension] *= self.tensor
            entry = self._entry(tuple(shape), dimension, [parts[rank] for rank in sorted(parts)])
            entries[name] = entry._replace(is_buffer=name in self.buffers)
        return Tensors(entries)

    def _entry(self, shape: tuple[int, ...], dimension: int | None, parts: list[_Part]) -> LazyTensor:
        dtype = parts[0].dtype if parts[0].dtype in KEPT.values() else torch.float32

        def make() -> Tensor:
            whole = torch.empty(shape, dtype=dtype)
            into = [whole] if dimension is None else whole.chunk(len(parts), dimension)
            for part, place in zip(parts, into, strict=True):
                place.copy_(self.files.get(part.file, place.nbytes)[part.name])
            return whole

        return LazyTensor(shape, make, dtype)


def _load(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file, memory-mapped, without the empty extra state of Megatron's layers."""
    with explain_damage(path):
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(values, dict) and MODEL_FILE.fullmatch(path.name):
        values = values.get("module")
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no model")
    values = unpack(values, path)
    return {
        name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)
    }


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turn any error in reading a file of ``torch.save`` into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        first = (str(error).splitlines() or [""])[0].partition(". ")[0]
        raise UserError(f"{path} is damaged: {first or type(error).__name__}") from None

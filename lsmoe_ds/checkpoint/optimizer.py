"""Read the optimizer's state of whole parameters from a checkpoint or consolidated folder, one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.reading import explain_damage
from lsmoe_ds.checkpoint.sparse import unpack
from lsmoe_ds.checkpoint.tensors import Files, open_tensors
from lsmoe_ds.config.optimizer import AVERAGED, averaged_partition, averaged_shape
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import checker, is_count, is_plain, read_fields
from lsmoe_ds.notices import counted
from lsmoe_ds.parallel import deepspeed_engine
from lsmoe_ds.parallel.deepspeed_engine import VALUES

PIECES = re.compile(r"pieces-rank-\d+\.json")
STATE, STEM = "state.json", "optimizer"  # of a consolidated folder


class OptimizerState(Protocol):
    """The optimizer's state of whole parameters, by global name.

    State tensors have the names that the optimizer gives them, and the shape of the parameter, unless they
    are averages (:data:`lsmoe_ds.config.optimizer.AVERAGED`). The float32 copy of a parameter's values, which
    it steps, is called :data:`lsmoe_ds.parallel.deepspeed_engine.VALUES`.
    """

    def keys(self, name: str) -> list[str]:
        """Return the names of a parameter's state tensors. Raises UserError if there are none."""
        ...

    def whole(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return each state tensor of a parameter whose whole shape is ``shape``. Raises UserError if
        anything is missing.
        """
        ...

    @property
    def step(self) -> float:
        """The optimizer's step, after all parameters were read. Raises UserError if their steps differ."""
        ...


def open_optimizer(folder: Path, verify: bool = False) -> OptimizerState:
    """Open the optimizer's state of a checkpoint or a consolidated folder.

    With ``verify`` the checksum of each file is compared before the file is read. Raises UserError if the
    folder holds no readable state.
    """
    consolidated = (folder / "provenance.json").exists()
    check = None
    if verify:
        files = read_fields(folder / ("provenance.json" if consolidated else "manifest.json"), files=dict)[
            "files"
        ]
        check = checker(folder, files)
        for path in folder.glob("*.json"):
            if path.name in files or PIECES.fullmatch(path.name) or path.name == STATE:
                check(path)
    return ConsolidatedOptimizer(folder, check) if consolidated else Pieces(folder, check)


class ConsolidatedOptimizer:
    """The optimizer's state in ``optimizer*.safetensors``, see :mod:`lsmoe_ds.export.consolidated`."""

    def __init__(self, folder: Path, check: Callable[[Path], None] | None = None) -> None:
        if not (folder / STATE).exists():
            raise UserError(
                f"{folder} holds no optimizer state: convert with --as consolidated --optimizer to keep it"
            )
        self.step = float(read_fields(folder / STATE, optimizer_step=float)["optimizer_step"])
        self._tensors = open_tensors(folder, STEM, check)
        self._keys: dict[str, list[str]] = {}
        for each in self._tensors:
            name, _, key = each.rpartition(".")
            self._keys.setdefault(name, []).append(key)

    def keys(self, name: str) -> list[str]:
        if name not in self._keys:
            raise UserError(f"the folder holds no optimizer state of {name}")
        return self._keys[name]

    def whole(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        found = {key: self._tensors[f"{name}.{key}"] for key in self.keys(name)}
        if any(tuple(value.shape) != state_shape(key, shape) for key, value in found.items()):
            raise UserError(f"the optimizer state holds nothing of {name} in the shape {tuple(shape)}")
        return found


def _read(path: Path) -> Any:
    with explain_damage(path):
        return deepspeed_engine.read_optimizer_file(path, unpack)


@dataclass(frozen=True)
class _Place:
    """The place in a file of ``length`` values, from ``start`` on, of a flattened tensor-parallel part."""

    start: int
    length: int
    file: Path
    number: int
    offset: int


class Pieces:
    """The optimizer's state in DeepSpeed's files, found by the ``pieces-rank-N.json`` beside them."""

    def __init__(self, checkpoint: Path, check: Callable[[Path], None] | None = None) -> None:
        """Open the state. Raises UserError if the checkpoint has no or wrong ``pieces-rank-N.json``."""
        self.places: dict[str, dict[int, dict[int, _Place]]] = {}  # by name, tensor-parallel part and start
        self.steps: set[float] = set()
        self.partition: dict[str, int] = read_fields(checkpoint / STATE, partition=dict)["partition"]
        listed = sorted(path for path in checkpoint.iterdir() if PIECES.fullmatch(path.name))
        if not listed:
            raise UserError(
                f"{checkpoint} cannot resume in another layout: it was written by a version that did not "
                "record where each parameter lies"
            )
        for path in listed:
            index = read_fields(path, file=str, pieces=dict)
            if not is_plain(index["file"]):
                raise UserError(f"{path} names the file '{index['file']}': only files beside it are read")
            for name, piece in index["pieces"].items():
                if not isinstance(piece, list) or len(piece) != 5 or not all(map(is_count, piece)):
                    raise UserError(f"{path} is damaged: of '{name}' it should have five counts")
                part, start, length, number, offset = piece
                # Several ranks may hold the same piece: use the first.
                place = _Place(start, length, checkpoint / index["file"], number, offset)
                self.places.setdefault(name, {}).setdefault(part, {}).setdefault(start, place)
        self._files = Files(_read, check)

    @property
    def step(self) -> float:
        if len(self.steps) != 1:
            raise UserError(
                f"the checkpoint is damaged: its optimizer states are of the steps {sorted(self.steps)}"
            )
        return next(iter(self.steps))

    @property
    def file_names(self) -> list[str]:
        """List the files that hold the state."""
        found = {
            place.file.name
            for parts in self.places.values()
            for places in parts.values()
            for place in places.values()
        }
        return sorted(found)

    def keys(self, name: str) -> list[str]:
        places = [place for part in self.places.get(name, {}).values() for place in part.values()]
        if not places:
            raise UserError(f"the checkpoint holds no optimizer state of {name}")
        return list(self._held(places[0], 0))

    def _held(self, place: _Place, to_read: int) -> dict[str, Tensor]:
        """Return the state tensors that contain a place, as the file stores them."""
        with explain_damage(place.file):
            states, holders = self._files.get(place.file, to_read)
            held = dict(states[place.number])
            if holders is not None:
                held[VALUES] = holders[place.number]
            step = float(held.pop("step"))
        if to_read:
            self.steps.add(step)
        return held

    def whole(self, name: str, shape: tuple[int, ...], only: str | None = None) -> dict[str, Tensor]:
        """Return the state tensors of a parameter, or ``only`` the one of this name, if it exists."""
        parts, dimension = self.places.get(name, {}), self.partition.get(name)
        sizes = list(shape)
        if name in self.partition and parts:
            if not is_count(dimension) or dimension >= len(sizes) or sizes[dimension] % len(parts):
                of = f"{counted(len(parts), 'part')} of the optimizer state of {name}"
                raise UserError(f"the checkpoint is damaged: its {of} cannot make a whole")
            sizes[dimension] //= len(parts)
        found = [self._part(name, parts[part], torch.Size(sizes), only) for part in sorted(parts)]
        if not found:
            raise UserError(f"the checkpoint holds no optimizer state of {name}")
        if dimension is None:
            return found[0]
        if len({frozenset(each) for each in found}) > 1:
            raise UserError(
                f"the checkpoint is damaged: parts of the optimizer state of {name} differ in kind"
            )
        spread = {
            key: averaged_partition(dimension, len(shape), AVERAGED[key]) if key in AVERAGED else dimension
            for key in found[0]
        }
        return {
            key: found[0][key] if along is None else torch.cat([each[key] for each in found], along)
            for key, along in spread.items()
        }

    def _part(
        self, name: str, places: dict[int, _Place], shape: torch.Size, only: str | None
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        filled = 0
        for _, place in sorted(places.items()):
            if place.start != filled:
                break
            held = self._held(place, 12 * place.length)
            with explain_damage(place.file):
                for key, value in held.items():
                    if only not in (None, key):
                        continue
                    if key in AVERAGED:
                        values[key] = value.float().view(state_shape(key, shape))
                        continue
                    whole = values.setdefault(key, torch.zeros(shape.numel()))
                    part = value.reshape(-1)[place.offset : place.offset + place.length]
                    whole[place.start : place.start + place.length] = part
            filled += place.length
        if filled != shape.numel():
            wanted = counted(shape.numel(), "value")
            raise UserError(f"the checkpoint holds the optimizer state of {filled:,} of {wanted} of {name}")
        return {key: value if key in AVERAGED else value.view(shape) for key, value in values.items()}


def state_shape(key: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a state tensor of a parameter of ``shape``. Raises UserError if there is none."""
    over = AVERAGED.get(key)
    if over is not None and len(shape) < 2:
        raise UserError(f"the optimizer state is damaged: {key} is of matrices, not of the shape {shape}")
    return averaged_shape(shape, over)

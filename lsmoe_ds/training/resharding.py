"""Going on in another layout: weights and optimizer state of a checkpoint, dealt anew to other ranks.

Each rank's checkpoint has ``pieces-rank-N.json``: which run of values of which parameter lies where in DeepSpeed's file of that
rank's optimizer state. By these the state of a whole parameter is put together, one parameter at a time, and each rank of the
new layout takes its own pieces. Random numbers begin anew, as no rank of the old layout is one of the new.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsmoe_ds.convert.consolidate import read_checkpoint
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import read_json, write_json
from lsmoe_ds.model.initialization import global_names, partition_dimension
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology

VALUES = "values"  # beside the optimizer's own names: the float32 values that it steps
PIECES = re.compile(r"pieces-rank-\d+\.json")


def write_pieces(engine: Any, folder: Path, topology: Topology) -> None:
    """Writes what this rank's file of optimizer state holds. Called by every rank."""
    local = {parameter: name for name, parameter in engine.module.named_parameters()}
    names, pieces = global_names(engine.module, topology), {}
    for piece in compat.optimizer_pieces(engine):
        # Of what all tensor-parallel ranks hold alike, the part is 0.
        part = topology.tensor_rank if partition_dimension(piece.parameter) is not None else 0
        pieces[names[local[piece.parameter]]] = [part, piece.start, piece.length, piece.number, piece.offset]
    file = compat.optimizer_file(engine, folder.name, topology.expert_rank)
    write_json(folder / f"pieces-rank-{topology.rank:05d}.json", {"file": file, "pieces": pieces})


@dataclass(frozen=True)
class _Place:
    """Of ``length`` values from ``start`` of a tensor-parallel part, flattened."""

    start: int
    length: int
    file: Path
    number: int
    offset: int


class OptimizerState:
    """The optimizer state in a checkpoint, of whole parameters by global name."""

    def __init__(self, checkpoint: Path) -> None:
        """Raises UserError if the checkpoint does not say where its parts lie."""
        self.places: dict[str, dict[int, dict[int, _Place]]] = {}  # by name, tensor-parallel part and start
        self.steps: set[float] = set()
        self.partition: dict[str, int] = (read_json(checkpoint / "state.json") or {}).get("partition", {})
        listed = sorted(path for path in checkpoint.iterdir() if PIECES.fullmatch(path.name))
        if not listed:
            raise UserError(f"{checkpoint} cannot go on in another layout: it was written by a version that did not note what lies where")
        for path in listed:
            index = read_json(path)
            try:
                assert index is not None
                for name, (part, start, length, number, offset) in index["pieces"].items():
                    # Ranks may hold the same: the first is taken.
                    place = _Place(start, length, checkpoint / Path(index["file"]).name, number, offset)
                    self.places.setdefault(name, {}).setdefault(part, {}).setdefault(start, place)
            except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
                raise UserError(f"{path} is damaged") from None
        self._read = functools.cache(compat.read_optimizer_file)

    def whole(self, name: str, shape: torch.Size) -> dict[str, Tensor]:
        """Each state tensor of a parameter, of its whole ``shape``. Raises UserError if anything is missing."""
        parts, dimension = self.places.get(name, {}), self.partition.get(name)
        sizes = list(shape)
        if dimension is not None and parts:
            sizes[dimension] //= len(parts)
        found = [self._part(name, parts[part], torch.Size(sizes)) for part in sorted(parts)]
        if not found:
            raise UserError(f"the checkpoint holds no optimizer state of {name}")
        if dimension is None:
            return found[0]
        return {key: torch.cat([each[key] for each in found], dimension) for key in found[0]}

    def _part(self, name: str, places: dict[int, _Place], shape: torch.Size) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        filled = 0
        for place in places.values():
            states, holders = self._read(place.file)
            held = {key: value for key, value in states[place.number].items() if key != "step"}
            self.steps.add(float(states[place.number]["step"]))
            if holders is not None:
                held[VALUES] = holders[place.number]
            for key, value in held.items():
                whole = values.setdefault(key, torch.empty(shape.numel()))
                whole[place.start : place.start + place.length] = value.reshape(-1)[place.offset : place.offset + place.length]
            filled += place.length
        if filled != shape.numel():
            raise UserError(f"the checkpoint holds the optimizer state of {filled} of {shape.numel()} values of {name}")
        return {key: value.view(shape) for key, value in values.items()}


@torch.no_grad()
def load_resharded(engine: Any, checkpoint: Path, topology: Topology) -> None:
    """Weights and optimizer state into an engine of any layout. Called by every rank; raises UserError for a damaged checkpoint."""
    model: nn.Module = engine.module
    weights, state = read_checkpoint(checkpoint).weights, OptimizerState(checkpoint)
    names = global_names(model, topology)
    for name, parameter in model.named_parameters():
        parameter.copy_(_own(weights[names[name]], parameter, topology))
    local = {parameter: name for name, parameter in model.named_parameters()}
    states = compat.optimizer_states(engine)
    for piece in compat.optimizer_pieces(engine):
        name = names[local[piece.parameter]]
        values = state.whole(name, weights[name].shape)
        if piece.holder is not piece.parameter:
            values.setdefault(VALUES, weights[name])
        held = states[piece.holder]
        for key, value in values.items():
            target = piece.holder if key == VALUES else held.setdefault(key, torch.zeros_like(piece.holder, dtype=torch.float32))
            own = _own(value, piece.parameter, topology).reshape(-1)[piece.start : piece.start + piece.length]
            target.view(-1)[piece.offset : piece.offset + piece.length] = own
    if len(state.steps) != 1:
        raise UserError(f"{checkpoint} is damaged: its optimizer states are of the steps {sorted(state.steps)}")
    (step,) = state.steps
    for held in states.values():
        held["step"] = torch.tensor(step, dtype=torch.float32, device=topology.device)


def _own(whole: Tensor, parameter: Tensor, topology: Topology) -> Tensor:
    """This rank's part of a whole parameter."""
    dimension = partition_dimension(parameter)
    return whole if dimension is None else whole.chunk(topology.tensor, dimension)[topology.tensor_rank]

"""Resume in another layout: reshard weights and optimizer state of a checkpoint to other ranks.

A checkpoint has a ``pieces-rank-N.json`` for each rank: the offsets, in DeepSpeed's file of that rank's
optimizer state, of each segment of each parameter. With these the state of a whole parameter is assembled,
one parameter at a time, and each rank of the new layout copies its own pieces. Random states start afresh,
because old ranks do not correspond to new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsmoe_ds.checkpoint.optimizer import OptimizerState
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.optimizer import AVERAGED, averaged_partition
from lsmoe_ds.folders import write_json
from lsmoe_ds.parallel import deepspeed_engine
from lsmoe_ds.parallel.parameters import global_names, named_state, partition_dimension
from lsmoe_ds.parallel.topology import Topology


def write_pieces(engine: Any, folder: Path, topology: Topology) -> None:
    """Write ``pieces-rank-N.json``, the content of this rank's optimizer file. Called by every rank."""
    local = {parameter: name for name, parameter in engine.module.named_parameters()}
    names, pieces = global_names(engine.module, topology), {}
    for piece in deepspeed_engine.optimizer_pieces(engine):
        # The part of a parameter that all tensor-parallel ranks hold alike is 0.
        part = topology.tensor_rank if partition_dimension(piece.parameter) is not None else 0
        pieces[names[local[piece.parameter]]] = [part, piece.start, piece.length, piece.number, piece.offset]
    file = deepspeed_engine.optimizer_file(engine, folder.name, topology.expert_rank)
    write_json(folder / f"pieces-rank-{topology.rank:05d}.json", {"file": file, "pieces": pieces})


@torch.no_grad()
def load_resharded(engine: Any, weights: Tensors, state: OptimizerState, topology: Topology) -> None:
    """Load weights and optimizer state into an engine of any layout. Called by every rank. Raises
    UserError for damaged files.
    """
    load_weights(engine, weights, topology)
    model: nn.Module = engine.module
    names = global_names(model, topology)
    local = {parameter: name for name, parameter in model.named_parameters()}
    pieces = deepspeed_engine.optimizer_pieces(engine)
    optimizer = deepspeed_engine.innermost_optimizer(engine)
    for piece in pieces:
        name, held = names[local[piece.parameter]], piece.state
        for key, value in state.whole(name, weights.shape(name)).items():
            if key in AVERAGED:
                dimension, dimensions = partition_dimension(piece.parameter), piece.parameter.dim()
                spread = averaged_partition(dimension, dimensions, AVERAGED[key])
                held[key].copy_(_part(value, spread, topology))
                continue
            target = piece.values if key == deepspeed_engine.VALUES else held.get(key)
            if target is None:
                device = deepspeed_engine.state_device(optimizer, key, piece.values.device)
                target = held[key] = torch.zeros_like(piece.values, dtype=torch.float32, device=device)
            _fill(target, value, piece, topology)
    device = deepspeed_engine.state_device(optimizer, "step", topology.device)
    for piece in pieces:
        piece.state["step"] = torch.tensor(state.step, dtype=torch.float32, device=device)


@torch.no_grad()
def load_weights(engine: Any, weights: Mapping[str, Tensor], topology: Topology) -> None:
    """Load whole weights and buffers, by global name, into an engine of any layout, and into the float32
    copies that its optimizer steps. Called by every rank.
    """
    model: nn.Module = engine.module
    names = global_names(model, topology)
    for name, value in named_state(model):
        value.copy_(_own(weights[names[name]], value, topology))
    local = {parameter: name for name, parameter in model.named_parameters()}
    for piece in deepspeed_engine.optimizer_pieces(engine):
        if piece.values is not piece.parameter:
            _fill(piece.values, weights[names[local[piece.parameter]]], piece, topology)


@torch.no_grad()
def load_frozen(engine: Any, weights: Mapping[str, Tensor], topology: Topology) -> None:
    """Load whole weights, by global name, into the frozen parameters of an engine. Called by every rank."""
    model: nn.Module = engine.module
    names = global_names(model, topology)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.copy_(_own(weights[names[name]], parameter, topology))


def _fill(target: Tensor, whole: Tensor, piece: deepspeed_engine.Piece, topology: Topology) -> None:
    """Copy the values of a piece from its whole parameter into ``target``, which has the layout of the
    piece's values.
    """
    own = _own(whole, piece.parameter, topology).reshape(-1)[piece.start : piece.start + piece.length]
    target.view(-1)[piece.offset : piece.offset + piece.length] = own


def _own(whole: Tensor, parameter: Tensor, topology: Topology) -> Tensor:
    """Return this rank's part of a whole parameter."""
    return _part(whole, partition_dimension(parameter), topology)


def _part(whole: Tensor, dimension: int | None, topology: Topology) -> Tensor:
    """Return this rank's part of a tensor that is spread along ``dimension``."""
    return whole if dimension is None else whole.chunk(topology.tensor, dimension)[topology.tensor_rank]

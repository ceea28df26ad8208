"""Pack tensors with many zeros, such as pruned matrices and their averages: store only the other values.

A packed tensor is a mapping: ``values``, the nonzero values in order; ``bits``, a bit for each value of the
tensor, 1 where it is not 0; and ``packed``, the tensor's shape. A packed boolean tensor has no ``values``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsmoe_ds.errors import UserError

SHAPE, BITS, VALUES = "packed", "bits", "values"
LEAST = 64  # smaller tensors are not packed
WORTHWHILE = 0.7  # share of values that are not 0, below which packing saves a quarter of the bytes or more
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size: as an integer, -0.0 is not 0


def pack(state: Any) -> Any:
    """Return nested containers with each tensor on the CPU packed where that saves space."""
    if isinstance(state, Tensor):
        return _pack(state)
    if isinstance(state, dict):
        return type(state)((key, pack(value)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(pack(value) for value in state)
    return state


def _pack(tensor: Tensor) -> Tensor | dict[str, Any]:
    if tensor.numel() < LEAST or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return tensor
    flat = tensor.detach().reshape(-1)
    if tensor.dtype == torch.bool:
        return {SHAPE: list(tensor.shape), BITS: to_bits(flat)}
    if not tensor.is_floating_point() or (kind := INTEGERS.get(tensor.element_size())) is None:
        return tensor
    there = flat.view(kind) != 0
    if int(there.count_nonzero()) > WORTHWHILE * len(flat):
        return tensor
    return {SHAPE: list(tensor.shape), BITS: to_bits(there), VALUES: flat[there]}


def to_bits(flags: Tensor) -> Tensor:
    """Pack booleans [N] into bytes, eight to a byte."""
    return torch.from_numpy(np.packbits(flags.numpy()))


def unpack(state: Any, path: object) -> Any:
    """Return nested containers with each packed tensor unpacked.

    Raises UserError, which names the file's ``path``, for a damaged tensor, and for one with more values than
    its file stores: with strides of 0 a small file could claim gigabytes.
    """
    size = Path(str(path)).stat().st_size
    for tensor in _stored(state):
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > size:
            raise UserError(f"{path} is damaged: it has a tensor larger than the file")
    return _unpacked(state, path)


def _stored(state: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, as they are stored."""
    if isinstance(state, Tensor):
        yield state
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    for part in parts:
        yield from _stored(part)


def _unpacked(state: Any, path: object) -> Any:
    if isinstance(state, dict):
        if SHAPE in state and BITS in state:
            return _unpack(state, path)
        return type(state)((key, _unpacked(value, path)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(_unpacked(value, path) for value in state)
    return state


def from_bits(bits: Any, shape: Any, path: object) -> Tensor:
    """Return the booleans of this ``shape`` that :func:`to_bits` packed.

    Raises UserError, which names the file's ``path``, if the number of bits does not fit the shape.
    """
    whole = isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)
    if not whole or not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.dim() != 1:
        raise UserError(f"{path} is damaged: it has a packed tensor without shape or bits")
    count = math.prod(shape)
    if len(bits) != (count + 7) // 8:
        raise UserError(f"{path} is damaged: it has {len(bits)} bytes of bits for {count} values")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool().view(shape)


def _unpack(packed: dict[str, Any], path: object) -> Tensor:
    there, values = from_bits(packed[BITS], packed[SHAPE], path), packed.get(VALUES)
    if values is None:
        return there
    if not isinstance(values, Tensor) or values.shape != (int(there.count_nonzero()),):
        raise UserError(f"{path} is damaged: a packed tensor has other values than its bits say")
    tensor = torch.zeros(there.shape, dtype=values.dtype)
    tensor[there] = values
    return tensor

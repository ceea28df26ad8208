"""Initial weights that do not depend on the parallel layout.

Every rank draws each whole parameter, from a generator seeded by the run's seed and the parameter's global
name, and keeps its own part. Experts are named by their global number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lsmoe_ds.checkpoint.tensors import LazyTensor
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods.base import Method
from lsmoe_ds.parallel.parameters import global_names, named_state, partition_dimension
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.model.base import Model


@torch.no_grad()
def initialize(model: Model, seed: int, topology: Topology) -> None:
    """Initialize all parameters of a model that do not come with pretrained weights.

    Linear weights are Xavier-uniform, embeddings normal with standard deviation H^-1/2, norms 1 and biases 0.
    Methods initialize their own parameters.
    """
    names = global_names(model, topology)
    for name, value in named_state(model):
        if model.is_loaded(names[name]):
            continue
        if not isinstance(value, nn.Parameter) and not is_drawn(names[name], model.methods):
            continue
        dimension = partition_dimension(value)
        shape = list(value.shape)
        if dimension is not None:
            shape[dimension] *= topology.tensor
        whole = draw(names[name], shape, seed, model.methods)
        if dimension is not None:
            whole = whole.chunk(topology.tensor, dimension)[topology.tensor_rank]
        value.copy_(whole)


def is_drawn(name: str, methods: Sequence[Method]) -> bool:
    """Tell whether one of the methods initializes the parameter or buffer with this global name."""
    return any(method.initial(name) is not None for method in methods)


def draw(name: str, shape: list[int], seed: int, methods: Sequence[Method] = ()) -> Tensor:
    """Return the initial value of the whole parameter with this global name."""
    value = torch.empty(shape)
    if name.endswith(".bias"):
        return value.zero_()
    if "norm" in name:
        return value.fill_(1.0)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if name.startswith("embedding."):
        return value.normal_(0.0, shape[-1] ** -0.5, generator=generator)
    for method in methods:
        if (fill := method.initial(name)) is not None:
            fill(value, generator)
            return value
    return nn.init.xavier_uniform_(value, generator=generator)


def drawn(name: str, value: Tensor, seed: int, methods: Sequence[Method]) -> LazyTensor:
    """Return the initial value of a parameter or buffer that a method adds to a trained model.

    ``value``, on any device, has its shape and type. Raises UserError if nothing defines its initial value.
    """
    is_buffer = not isinstance(value, nn.Parameter)
    if is_buffer and not is_drawn(name, methods):
        raise UserError(f"{name} cannot be added: nothing says what it begins as")
    shape = tuple(value.shape)
    return LazyTensor(
        shape, lambda: draw(name, list(shape), seed, methods).to(value.dtype), value.dtype, is_buffer
    )

"""Initial weights that do not depend on the parallel layout.

Every parameter is drawn whole, from a generator seeded by the run's seed and the parameter's global name; each rank
keeps its part. Experts are named by their global number.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lsmoe_ds.methods.base import Method
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.model.transformer import Transformer

LOCAL_EXPERT = re.compile(r"\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")


def global_name(name: str, local_experts: int, expert_rank: int) -> str:
    """Name of a parameter in the whole model: ``...deepspeed_moe.experts.deepspeed_experts.1.`` on expert rank 2 of a
    layer with 4 local experts is ``...experts.9.``."""
    return LOCAL_EXPERT.sub(lambda m: f".experts.{expert_rank * local_experts + int(m.group(1))}.", name)


def partition_dimension(parameter: Tensor) -> int | None:
    """The dimension that is spread over tensor-parallel ranks, or None."""
    return int(parameter.partition_dim) if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what is stored of a model: its parameters and persistent buffers, by local name."""
    yield from model.named_parameters()
    stored = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def global_names(model: nn.Module, topology: Topology) -> dict[str, str]:
    """Global name of each of the model's parameters and persistent buffers, by local name."""
    names = {}
    for name, _ in named_state(model):
        layer = name.split(".deepspeed_moe.")[0]
        local = model.get_submodule(layer).num_local_experts if ".deepspeed_moe." in name else 0
        names[name] = global_name(name, int(local), topology.expert_rank)  # type: ignore[arg-type]
    return names


def places(model: nn.Module, topology: Topology) -> dict[str, tuple[str, int]]:
    """Return local name and first expert-parallel rank of all parameters and persistent buffers that the
    ranks hold together, by global name.
    """
    found: dict[str, tuple[str, int]] = {}
    for rank in range(topology.expert):
        for local, name in global_names(model, replace(topology, expert_rank=rank)).items():
            found.setdefault(name, (local, rank))
    return found


@torch.no_grad()
def initialize(model: Transformer, seed: int, topology: Topology) -> None:
    """Draw linear weights Xavier-uniform, embeddings normal with deviation H^-1/2, norms 1, biases 0, and parameters
    of methods as these say.
    """
    names = global_names(model, topology)
    for name, value in named_state(model):
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
    """Tell whether one of the methods says how a parameter or buffer of this global name is drawn."""
    return any(method.initial(name) is not None for method in methods)


def draw(name: str, shape: list[int], seed: int, methods: Sequence[Method] = ()) -> Tensor:
    """Return the initial value of the whole parameter of this global name."""
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

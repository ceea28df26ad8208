"""The names of parameters in the whole model, and how parameters are split over ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from lsmoe_ds.parallel.topology import Topology

LOCAL_EXPERT = re.compile(r"\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")


def global_name(name: str, local_experts: int, expert_rank: int) -> str:
    """Return a parameter's name in the whole model.

    ``...deepspeed_moe.experts.deepspeed_experts.1.`` on expert rank 2 of a layer with 4 local experts becomes
    ``...experts.9.``.
    """
    return LOCAL_EXPERT.sub(lambda m: f".experts.{expert_rank * local_experts + int(m.group(1))}.", name)


def partition_dimension(parameter: Tensor) -> int | None:
    """Return the dimension that is spread over tensor-parallel ranks, or None."""
    return int(parameter.partition_dim) if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors of a model, parameters and persistent buffers, by local name."""
    yield from model.named_parameters()
    stored = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def global_names(model: nn.Module, topology: Topology) -> dict[str, str]:
    """Map the local name of each of the model's parameters and persistent buffers to its global name."""
    names = {}
    for name, _ in named_state(model):
        layer = name.split(".deepspeed_moe.")[0]
        local = model.get_submodule(layer).num_local_experts if ".deepspeed_moe." in name else 0
        names[name] = global_name(name, int(local), topology.expert_rank)  # type: ignore[arg-type]
    return names


def places(model: nn.Module, topology: Topology) -> dict[str, tuple[str, int]]:
    """Locate all parameters and persistent buffers of all ranks.

    Returns, by global name, the local name and the first expert-parallel rank that holds it.
    """
    found: dict[str, tuple[str, int]] = {}
    for rank in range(topology.expert):
        for local, name in global_names(model, replace(topology, expert_rank=rank)).items():
            found.setdefault(name, (local, rank))
    return found

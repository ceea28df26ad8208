"""Initial weights that do not depend on the parallel layout.

Every parameter is drawn whole, from a generator seeded by the run's seed and the parameter's global name; each rank
keeps its part. Experts are named by their global number.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn

from lsmoe_ds.parallel.topology import Topology

LOCAL_EXPERT = re.compile(r"\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")


def global_name(name: str, local_experts: int, expert_rank: int) -> str:
    """Name of a parameter in the whole model: ``...deepspeed_moe.experts.deepspeed_experts.1.`` on expert rank 2 of a
    layer with 4 local experts is ``...experts.9.``."""
    return LOCAL_EXPERT.sub(lambda m: f".experts.{expert_rank * local_experts + int(m.group(1))}.", name)


def partition_dimension(parameter: Tensor) -> int | None:
    """The dimension that is spread over tensor-parallel ranks, or None."""
    return int(parameter.partition_dim) if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def global_names(model: nn.Module, topology: Topology) -> dict[str, str]:
    """Global name of each of the model's parameters, by local name."""
    names = {}
    for name, _ in model.named_parameters():
        layer = name.split(".deepspeed_moe.")[0]
        local = model.get_submodule(layer).num_local_experts if ".deepspeed_moe." in name else 0
        names[name] = global_name(name, int(local), topology.expert_rank)  # type: ignore[arg-type]
    return names


@torch.no_grad()
def initialize(model: nn.Module, seed: int, topology: Topology) -> None:
    """Linear weights Xavier-uniform, embeddings normal with deviation H^-1/2, norms 1, biases 0, routers normal 0.1; of low-rank
    banks flat matrices 0, and vertical ones normal 0.1; of CLSR projections the identity: with either a model begins as it would
    without them."""
    names = global_names(model, topology)
    for name, parameter in model.named_parameters():
        dimension = partition_dimension(parameter)
        shape = list(parameter.shape)
        if dimension is not None:
            shape[dimension] *= topology.tensor
        whole = draw(names[name], shape, seed)
        if dimension is not None:
            whole = whole.chunk(topology.tensor, dimension)[topology.tensor_rank]
        parameter.copy_(whole)


def draw(name: str, shape: list[int], seed: int) -> Tensor:
    """The initial value of the whole parameter of this global name."""
    value = torch.empty(shape)
    if name.endswith((".bias", "_low_rank.flat")):
        return value.zero_()
    if "norm" in name:
        return value.fill_(1.0)
    if name.endswith(("_clsr.specific", "_clsr.shared")):
        value.zero_().view(-1, shape[1], shape[1]).diagonal(dim1=1, dim2=2).fill_(1.0)
        return value
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if name.startswith("embedding."):
        return value.normal_(0.0, shape[-1] ** -0.5, generator=generator)
    if ".router." in name or name.endswith("_low_rank.vertical"):
        return value.normal_(0.0, 0.1, generator=generator)
    return nn.init.xavier_uniform_(value, generator=generator)

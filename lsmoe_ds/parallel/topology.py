"""The parallel layout: every group, size and rank of a run, in one object.

World = tensor x data. Experts are spread over ``expert`` consecutive ranks of the world, which may include
tensor-parallel peers. Example: world 4, tensor 2, expert 2 has tensor groups [0,1] [2,3], data groups [0,2]
[1,3], expert groups [0,1] [2,3] and expert-data groups [0,2] [1,3].

If ``node`` ranks of an expert group share a machine and others do not, two more kinds of groups exist: the
ranks of an expert group on one machine, and those with the same number on each of its machines. Example:
expert 4, node 2 has node groups [0,1] [2,3] and across groups [0,2] [1,3].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from lsmoe_ds.config.layout import check_world
from lsmoe_ds.parallel import compat


def ranks_by_machine(world: int, expert: int, node: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ranks of the node groups, and those of the across groups."""
    of_machine = [[*range(first, first + node)] for first in range(0, world, node)]
    across = [
        [*range(start + number, start + expert, node)]
        for start in range(0, world, expert)
        for number in range(node)
    ]
    return of_machine, across


@dataclass(frozen=True)
class Topology:
    """The sizes, ranks and groups of a run. A group is None exactly if its size is 1 and none was built."""

    world: int = 1
    rank: int = 0
    tensor: int = 1
    tensor_rank: int = 0
    data: int = 1
    data_rank: int = 0
    expert: int = 1
    expert_rank: int = 0
    tensor_group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None
    expert_group: dist.ProcessGroup | None = None
    node: int = 1  # ranks of an expert group on one machine
    node_group: dist.ProcessGroup | None = None  # this one and the next exist only if 1 < node < expert
    across_group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Topology:
        """Return the topology of one process without process groups, for inference and conversion."""
        return cls(device=torch.device(device))

    @classmethod
    def build(
        cls, tensor: int = 1, expert: int = 1, device: torch.device | str = "cpu", node: int = 1
    ) -> Topology:
        """Build the groups of the initialized world in Megatron and pass the expert groups to DeepSpeed."""
        world = dist.get_world_size()
        check_world(world, tensor, expert)
        state = compat.initialize_megatron(tensor, expert)
        expert_group = state.get_expert_model_parallel_group()
        compat.adopt_expert_groups(expert, expert_group, state.get_expert_data_parallel_group())
        node_group = across_group = None
        if 1 < node < expert:
            node_group, across_group = map(compat.new_groups, ranks_by_machine(world, expert, node))
        return cls(
            world=world,
            rank=dist.get_rank(),
            tensor=tensor,
            tensor_rank=state.get_tensor_model_parallel_rank(),
            data=state.get_data_parallel_world_size(),
            data_rank=state.get_data_parallel_rank(),
            expert=expert,
            expert_rank=dist.get_rank(expert_group),
            tensor_group=state.get_tensor_model_parallel_group(),
            data_group=state.get_data_parallel_group(),
            expert_group=expert_group,
            node=node,
            node_group=node_group,
            across_group=across_group,
            device=torch.device(device),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

"""Replicas: lend the experts of busy tasks to every expert-parallel rank for one forward and backward pass.

The owner of an expert broadcasts its weights, each rank computes its own rows with them, and the backward
pass sums the gradients of all ranks on the owner. Parameters, optimizer state and checkpoints stay where they
are: a replica is no parameter. So a step computes what it computes without replicas, to rounding, and a
learned router may change its mind about which experts a task uses ("FasterMoE", He et al., 2022, calls this
shadowing; there the tokens of each batch choose the experts, here the shares of tasks).

N copied experts, P tensors of an expert, S tokens, E experts, K top-k, R expert-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from lsmoe_ds.moe.routers import DROPPED
from lsmoe_ds.parallel.collectives import Traffic
from lsmoe_ds.parallel.topology import Topology


class Replica:
    """An expert with given weights that computes as ``like`` does, of whatever rank."""

    def __init__(self, like: nn.Module, weights: dict[str, Tensor]) -> None:
        self._like, self._weights = like, weights
        for name, value in weights.items():  # what a grouped product reads
            layer, _, kind = name.rpartition(".")
            vars(self).setdefault(layer, SimpleNamespace())
            setattr(vars(self)[layer], kind, value)

    def __call__(self, rows: Tensor) -> Tensor:
        out: Tensor = functional_call(self._like, self._weights, (rows,))
        return out


@dataclass
class _Loan:
    """Which experts are lent: by owner, in rank order, the numbers of its experts among its local ones."""

    local: list[tuple[int, list[int]]]
    topology: Topology
    traffic: Traffic
    shapes: list[torch.Size] = field(default_factory=list)  # [P]

    @classmethod
    def of(cls, numbers: Sequence[int], each: int, topology: Topology, traffic: Traffic) -> _Loan:
        """Group global numbers, ascending, of experts of which every rank has ``each``."""
        owners = groupby(numbers, key=lambda number: number // each)
        local = [(owner, [number % each for number in of_owner]) for owner, of_owner in owners]
        return cls(local, topology, traffic)

    def exchange(self, messages: list[Tensor], back: bool) -> None:
        """Broadcast the owners' messages, or, on the way ``back``, sum all ranks' on the owners."""
        group, mine = self.topology.expert_group, self.topology.expert_rank
        assert group is not None
        with self.traffic.timing(messages[0].device):
            works = []
            for (owner, _), message in zip(self.local, messages, strict=True):
                rank = dist.get_global_rank(group, owner)
                call = dist.reduce if back else dist.broadcast
                works.append(call(message, rank, group=group, async_op=True))
                leaving = (owner != mine) if back else (owner == mine) * (self.topology.expert - 1)
                self.traffic.bytes += leaving * message.nbytes
            for work in works:
                work.wait()


class _Lend(torch.autograd.Function):
    """Return the tensors of the lent experts [N P], expert by expert, from those of all local ones [E/R P].

    All local parameters are arguments although few are read: their gradients then wait for this backward pass
    on every rank. Otherwise the owner's would arrive later than those of its peers, and the collectives by
    which DeepSpeed reduces gradients would meet this one in another order.
    """

    @staticmethod
    def forward(ctx: Any, loan: _Loan, kinds: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        loan.shapes = [each.shape for each in parameters[:kinds]]
        size = sum(map(math.prod, loan.shapes))
        messages = []
        for owner, local in loan.local:
            if owner == loan.topology.expert_rank:
                flat = [each.reshape(-1) for e in local for each in parameters[e * kinds : (e + 1) * kinds]]
                messages.append(torch.cat(flat))
            else:
                messages.append(parameters[0].new_empty(len(local) * size))
        loan.exchange(messages, back=False)
        ctx.loan, ctx.kinds, ctx.total = loan, kinds, len(parameters)
        ctx.dtype = parameters[0].dtype
        # The experts of a layer train together, so what holds for those of one holds for all, on every rank.
        ctx.trained = ctx.needs_input_grad[2 : 2 + kinds]
        lent = tuple(
            part.view(shape)
            for message in messages
            for expert in message.split(size)
            for part, shape in zip(expert.split(list(map(math.prod, loan.shapes))), loan.shapes, strict=True)
        )
        trained = ctx.trained * (len(lent) // kinds)
        ctx.mark_non_differentiable(*(each for each, is_one in zip(lent, trained, strict=True) if not is_one))
        return lent

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        loan, kinds = ctx.loan, ctx.kinds
        wanted = [kind for kind in range(kinds) if ctx.trained[kind]]
        left, messages = list(gradients), []
        for _, local in loan.local:
            of_owner, left = left[: len(local) * kinds], left[len(local) * kinds :]
            # In 16 bits a sum over ranks would soon lose what is added to it.
            flat = [of_owner[e * kinds + k].reshape(-1).float() for e in range(len(local)) for k in wanted]
            messages.append(torch.cat(flat))
        loan.exchange(messages, back=True)
        found: list[Tensor | None] = [None] * ctx.total
        for (owner, local), message in zip(loan.local, messages, strict=True):
            if owner == loan.topology.expert_rank:
                parts = iter(message.split([math.prod(loan.shapes[k]) for _ in local for k in wanted]))
                for e in local:
                    for k in wanted:
                        found[e * kinds + k] = next(parts).view(loan.shapes[k]).to(ctx.dtype)
        return None, None, *found


def lend(
    experts: nn.ModuleList, numbers: Sequence[int], topology: Topology, traffic: Traffic
) -> list[Replica]:
    """Return replicas of the experts with these global ``numbers``, ascending, on every rank of the
    expert-parallel group, all of which must call it. ``experts`` are the local ones.
    """
    names = [name for name, _ in experts[0].named_parameters()]
    parameters = [each for expert in experts for _, each in expert.named_parameters()]
    loan = _Loan.of(numbers, len(experts), topology, traffic)
    lent = _Lend.apply(loan, len(names), *parameters)
    of_each = [lent[start : start + len(names)] for start in range(0, len(lent), len(names))]
    return [Replica(experts[0], dict(zip(names, values, strict=True))) for values in of_each]


def split(experts: Tensor, numbers: Sequence[int], total: int) -> tuple[Tensor, Tensor]:
    """Divide choices [S, K] into those of replicas, as indices into ``numbers``, and those of other experts.

    In either result the choices of the other are DROPPED.
    """
    index = torch.tensor(numbers, dtype=torch.int64).to(experts.device, non_blocking=True)
    place = torch.full((total + 1,), DROPPED, dtype=experts.dtype, device=experts.device)
    place[index] = torch.arange(len(index), device=experts.device)
    here = place[experts]  # DROPPED is the last place, which is never filled
    return here, experts.masked_fill(here != DROPPED, DROPPED)

"""Replicas: lend the experts of busy tasks to every expert-parallel rank for one forward and backward pass.

The owner of an expert broadcasts its weights, each rank computes its own rows with them, and the backward
pass sums the gradients of all ranks on the owner. A replica is not a parameter, so parameters, optimizer
state and checkpoints do not change. Up to rounding, a step computes the same as without replicas, and a
learned router may still change which experts a task uses. "FasterMoE" (He et al., 2022) calls this shadowing;
there the tokens of each batch decide which experts are lent, here the shares of tasks.

N copied experts, P tensors of an expert, S tokens, E experts, K top-k, R expert-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """An expert with the given weights, from any rank, that computes like the local expert ``like``."""

    def __init__(self, like: nn.Module, weights: dict[str, Tensor]) -> None:
        self._like, self._weights = like, weights
        for name, value in weights.items():  # attributes such as expand.weight, which grouped products read
            layer, _, kind = name.rpartition(".")
            vars(self).setdefault(layer, SimpleNamespace())
            setattr(vars(self)[layer], kind, value)

    def __call__(self, rows: Tensor) -> Tensor:
        out: Tensor = functional_call(self._like, self._weights, (rows,))
        return out


class Loan:
    """Lend the experts with these global ``numbers``, ascending, to every rank of the expert-parallel group.

    All ranks construct a Loan, which starts to send the weights, and later call :meth:`replicas`. Other
    communication may happen in between. ``experts`` are the local experts.
    """

    def __init__(
        self, experts: nn.ModuleList, numbers: Sequence[int], topology: Topology, traffic: Traffic
    ) -> None:
        self.experts, self.topology, self.traffic = experts, topology, traffic
        self.names = [name for name, _ in experts[0].named_parameters()]  # [P]
        self.shapes = [each.shape for each in experts[0].parameters()]  # [P]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        each = len(experts)
        owners = groupby(numbers, key=lambda number: number // each)
        # For each owner, in rank order, the local numbers of the experts that it lends.
        self.local = [(owner, [number % each for number in of_owner]) for owner, of_owner in owners]
        self.messages = [self._message(*pair) for pair in self.local]
        self._works = self._exchange(self.messages, back=False)

    @torch.no_grad()
    def _message(self, owner: int, local: list[int]) -> Tensor:
        own = [each for expert in self.experts for each in expert.parameters()]
        if owner != self.topology.expert_rank:
            return own[0].new_empty(len(local) * sum(self.sizes))
        kinds = len(self.names)
        flat = [each.reshape(-1) for e in local for each in own[e * kinds : (e + 1) * kinds]]
        return torch.cat(flat)

    def _exchange(self, messages: list[Tensor], back: bool) -> list[Any]:
        """Start to broadcast the owners' messages; with ``back``, to sum all ranks' messages on owners."""
        group, mine, works = self.topology.expert_group, self.topology.expert_rank, []
        assert group is not None
        for (owner, _), message in zip(self.local, messages, strict=True):
            rank = dist.get_global_rank(group, owner)
            call = dist.reduce if back else dist.broadcast
            works.append(call(message, rank, group=group, async_op=True))
            copies = int(owner != mine) if back else (owner == mine) * (self.topology.expert - 1)
            self.traffic.bytes += copies * message.nbytes
        return works

    def _wait(self, works: list[Any]) -> None:
        with self.traffic.timing(self.topology.device):
            for work in works:
                work.wait()

    def received(self) -> list[Tensor]:
        """Return the tensors of the lent experts, expert by expert, [N P]."""
        self._wait(self._works)
        # The autograd graph holds this object, and must not keep the weights of layers that are recomputed.
        messages, self.messages, self._works = self.messages, [], []
        return [
            part.view(shape)
            for message in messages
            for expert in message.split(sum(self.sizes))
            for part, shape in zip(expert.split(self.sizes), self.shapes, strict=True)
        ]

    def returned(self, gradients: Sequence[Tensor], trained: Sequence[bool]) -> dict[tuple[int, int], Tensor]:
        """Sum the gradients [N P] over the ranks, for the tensors of an expert that are ``trained`` [P].

        Returns the sums for this rank's experts, by local expert number and index in [P].
        """
        kinds = len(self.names)
        wanted, messages, start = [kind for kind in range(kinds) if trained[kind]], [], 0
        for _, local in self.local:
            rows = [gradients[start + e * kinds :][:kinds] for e in range(len(local))]
            # A sum over ranks in 16 bits would lose small summands.
            messages.append(torch.cat([row[kind].reshape(-1).float() for row in rows for kind in wanted]))
            start += len(local) * kinds
        self._wait(self._exchange(messages, back=True))
        found: dict[tuple[int, int], Tensor] = {}
        for (owner, local), message in zip(self.local, messages, strict=True):
            if owner == self.topology.expert_rank:
                parts = message.split([self.sizes[kind] for _ in local for kind in wanted])
                places = [(e, kind) for e in local for kind in wanted]
                found |= dict(zip(places, parts, strict=True))
        return found

    def replicas(self) -> list[Replica]:
        """Return the lent experts, after waiting for their weights."""
        lent = _Lend.apply(self, *[each for expert in self.experts for each in expert.parameters()])
        kinds = len(self.names)
        of_each = [lent[start : start + kinds] for start in range(0, len(lent), kinds)]
        return [Replica(self.experts[0], dict(zip(self.names, of_one, strict=True))) for of_one in of_each]


class _Lend(torch.autograd.Function):
    """Return the tensors of the lent experts [N P]; the arguments are those of all local experts [E/R P].

    Few or none of the local experts are lent. All are arguments so that the result has a gradient on every
    rank, and so that the gradients of local experts come after this backward pass: its collective and those
    by which DeepSpeed reduces gradients must have the same order on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, loan: Loan, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.loan, ctx.like = loan, parameters
        # All experts of a layer train alike, so the flags of the first expert hold for all, on every rank.
        kinds = len(loan.names)
        ctx.trained = ctx.needs_input_grad[1 : 1 + kinds]
        lent = loan.received()
        trained = ctx.trained * (len(lent) // kinds)
        ctx.mark_non_differentiable(*(each for each, is_one in zip(lent, trained, strict=True) if not is_one))
        return tuple(lent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kinds = len(ctx.loan.names)
        found: list[Tensor | None] = [None] * len(ctx.like)
        for (expert, kind), gradient in ctx.loan.returned(gradients, ctx.trained).items():
            place = expert * kinds + kind
            found[place] = gradient.view_as(ctx.like[place]).to(ctx.like[place].dtype)
        return None, *found


def split(experts: Tensor, numbers: Sequence[int], total: int) -> tuple[Tensor, Tensor]:
    """Split choices [S, K] into choices of replicas, as indices into ``numbers``, and those of other experts.

    Each result has DROPPED where the other has a choice.
    """
    index = torch.tensor(numbers, dtype=torch.int64).to(experts.device, non_blocking=True)
    place = torch.full((total + 1,), DROPPED, dtype=experts.dtype, device=experts.device)
    place[index] = torch.arange(len(index), device=experts.device)
    here = place[experts]  # DROPPED is the last place, which is never filled
    return here, experts.masked_fill(here != DROPPED, DROPPED)

"""Dispatch: tokens to their experts and back. No token is padded, and none is dropped that the router has not dropped.

With expert parallelism a token travels once to each rank that holds any of its experts, with the numbers and weights of
these; there its experts' outputs are added with their weights, and one row travels back. Counts are exchanged once, rows
by uneven all-to-all. Tensor-parallel peers, which hold the same tokens, each dispatch a share of them.

S tokens, H hidden, E experts, K top-k, R expert-parallel ranks; on one rank n rows with N choices of a local expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsmoe_ds.moe.routers import DROPPED
from lsmoe_ds.parallel.collectives import Traffic, all_to_all, exchange_counts, join_rows, split_rows
from lsmoe_ds.parallel.compat import mark_expert_parameter
from lsmoe_ds.parallel.topology import Topology


@dataclass
class Assignment:
    """Which copy of which row goes to which expert. Copies are sorted by expert; a choice is a place in [n K]."""

    counts: list[int]  # copies of each local expert
    choices: Tensor  # [N]: the choice of each copy
    copies: Tensor  # [n, K]: the copy of each choice; 0 where the choice is none
    real: Tensor | None  # [n, K]: whether the choice is one; None where all are

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Assignment:
        """``chosen`` [n, K]: local expert numbers, or DROPPED."""
        flat = chosen.reshape(-1)
        counts = torch.bincount(flat + 1, minlength=experts + 1).tolist()  # DROPPED first
        choices = flat.argsort(stable=True)[counts[0] :]
        copies = torch.zeros_like(flat)
        copies[choices] = torch.arange(choices.shape[0], device=flat.device)
        return cls(counts[1:], choices, copies.view_as(chosen), chosen != DROPPED if counts[0] else None)


class _Gather(torch.autograd.Function):
    """Rows [n, H] -> a copy for each choice [N, H]. The gradient is gathered too: scattering it would be several times slower."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        return rows.index_select(0, assignment.choices // assignment.copies.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _pick(gradients[0], ctx.assignment).sum(1), None


class _Combine(torch.autograd.Function):
    """Copies [N, H], weights [n, K] -> the weighted sum of each row's copies [n, H]."""

    @staticmethod
    def forward(ctx: Any, copies: Tensor, weights: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        ctx.save_for_backward(copies, weights)
        return torch.bmm(weights[:, None].to(copies.dtype), _pick(copies, assignment)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        assignment: Assignment = ctx.assignment
        (gradient,), (copies, weights) = gradients, ctx.saved_tensors
        of_weights = torch.bmm(_pick(copies, assignment), gradient[:, :, None]).squeeze(2).to(weights.dtype)
        each = weights.reshape(-1)[assignment.choices][:, None].to(gradient.dtype)
        return gradient.index_select(0, assignment.choices // assignment.copies.shape[1]) * each, of_weights, None


def _pick(copies: Tensor, assignment: Assignment) -> Tensor:
    """[N, H] -> the copy of each choice [n, K, H], zero where the choice is none."""
    if not copies.shape[0]:
        return copies.new_zeros(*assignment.copies.shape, copies.shape[1])
    picked = copies.index_select(0, assignment.copies.reshape(-1)).view(*assignment.copies.shape, -1)
    return picked if assignment.real is None else picked.masked_fill(~assignment.real[:, :, None], 0)


class Experts(nn.Module):
    """The local experts. Kept as separate parameters: indexing one stacked parameter would make autograd write a
    gradient of full size for every expert. The name ``deepspeed_experts`` is how DeepSpeed files their weights."""

    def __init__(self, experts: list[nn.Module], topology: Topology) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(experts)
        # Where ranks reduce gradients together, every parameter must have one on every rank, so in training an expert
        # without tokens runs over zero rows. One rank alone fills in the missing ones once a step, which is cheaper.
        self.run_idle = topology.world > 1
        for parameter in self.parameters():
            mark_expert_parameter(parameter, topology.expert)

    def forward(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Rows [n, H], local expert numbers or DROPPED [n, K], weights [n, K] -> weighted sums of the outputs [n, H]."""
        assignment = Assignment.of(chosen, len(self.deepspeed_experts))
        idle = self.training and self.run_idle
        parts = _Gather.apply(rows, assignment).split(assignment.counts)
        outputs = [expert(part) for expert, part in zip(self.deepspeed_experts, parts, strict=True) if idle or len(part)]
        out: Tensor = _Combine.apply(torch.cat(outputs) if outputs else rows[:0], weights, assignment)
        return out


class Dispatcher(nn.Module):
    """Sends tokens to their experts, wherever these live, and combines what comes back."""

    def __init__(self, experts: list[nn.Module], total: int, topology: Topology) -> None:
        super().__init__()
        self.experts = Experts(experts, topology)
        self.local = total // topology.expert
        self.topology = topology
        self.traffic = Traffic()

    def forward(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Tokens [S, H], expert numbers or DROPPED [S, K], weights [S, K] -> the weighted sum of the experts' outputs [S, H]."""
        group = self.topology.tensor_group
        if self.topology.tensor == 1 or group is None:
            return self._dispatch(tokens, experts, weights)
        own = self._dispatch(split_rows(tokens, group), split_rows(experts, group), split_rows(weights, group))
        return join_rows(own, tokens.shape[0], group)

    def _dispatch(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        if self.topology.expert == 1:
            out: Tensor = self.experts(tokens, experts, weights)
            return out
        group, ranks, top_k = self.topology.expert_group, self.topology.expert, experts.shape[1]
        assert group is not None
        rank_of = torch.where(experts == DROPPED, ranks, experts // self.local)  # [S, K]
        wanted = torch.zeros(experts.shape[0], ranks + 1, dtype=torch.bool, device=experts.device).scatter_(1, rank_of, True)
        ranks_of_rows, rows = wanted[:, :ranks].t().nonzero(as_tuple=True)  # by rank, then token
        send_counts = torch.bincount(ranks_of_rows, minlength=ranks)
        receive_counts = exchange_counts(send_counts, group, self.traffic)
        send, receive = send_counts.tolist(), receive_counts.tolist()
        self.traffic.rows += sum(send) - send[self.topology.expert_rank]

        # Of each row that travels: the numbers of its experts on the rank it goes to, or DROPPED, and their weights.
        here = rank_of[rows] == ranks_of_rows[:, None]
        local = torch.where(here, experts[rows] % self.local, DROPPED)
        told = torch.cat([local.float(), weights.float().index_select(0, rows)], 1)  # whole numbers are exact in float32
        told = all_to_all(told, send, receive, group, self.traffic)
        arrived = all_to_all(tokens.index_select(0, rows), send, receive, group, self.traffic)
        outputs = self.experts(arrived, told[:, :top_k].detach().long(), told[:, top_k:])
        returned = all_to_all(outputs, receive, send, group, self.traffic)
        return torch.zeros_like(tokens).index_add(0, rows, returned)

"""Collectives with gradients that neither torch, Megatron nor DeepSpeed offers on every backend.

S tokens, H hidden, R ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[R, N] integers, row r for rank r -> [R, N], row r from rank r."""
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = tokens.new_empty((sum(receive), *tokens.shape[1:]))
        dist.all_to_all_single(received, tokens.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        returned = gradient.new_empty((sum(ctx.send), *gradient.shape[1:]))
        dist.all_to_all_single(returned, gradient.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return returned, None, None, None


def all_to_all(tokens: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Uneven exchange: ``send[r]`` rows of [S, H] go to rank r, ``receive[r]`` rows come from it, in rank order.

    The gradient takes the same way back. Any count may be zero; every rank of the group must call it.
    """
    out: Tensor = _AllToAll.apply(tokens, send, receive, group)
    return out


def share(total: int, ranks: int, rank: int) -> tuple[int, int]:
    """First and last-plus-one of the contiguous share of ``total`` items that belongs to ``rank`` of ``ranks``."""
    return total * rank // ranks, total * (rank + 1) // ranks


def _gather_rows(part: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenates the ranks' uneven shares; padded to the largest, since gloo gathers only equal shapes."""
    ranks = dist.get_world_size(group)
    bounds = [share(total, ranks, r) for r in range(ranks)]
    longest = max(end - start for start, end in bounds)
    padded = part.new_zeros((longest, *part.shape[1:]))
    padded[: part.shape[0]] = part
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([p[: end - start] for p, (start, end) in zip(parts, bounds, strict=True)])


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.total, ctx.group = rows.shape[0], group
        start, end = share(ctx.total, dist.get_world_size(group), dist.get_rank(group))
        return rows[start:end].contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather_rows(gradients[0].contiguous(), ctx.total, ctx.group), None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.total, ctx.group = total, group
        return _gather_rows(part.contiguous(), total, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        start, end = share(ctx.total, dist.get_world_size(ctx.group), dist.get_rank(ctx.group))
        return gradients[0][start:end].contiguous(), None, None


def split_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of rows [S, ...] that all ranks of the group hold alike; the gradient is gathered back."""
    out: Tensor = _SplitRows.apply(rows, group)
    return out


def join_rows(part: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
    """Inverse of :func:`split_rows`: all [S, ...] rows on every rank, from each rank's share."""
    out: Tensor = _JoinRows.apply(part, total, group)
    return out

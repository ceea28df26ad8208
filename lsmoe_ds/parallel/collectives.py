"""Collectives with gradients that neither torch, Megatron nor DeepSpeed offers on every backend.

S tokens, H hidden, R ranks of the group.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lsmoe_ds.errors import SharedError, UserError

T = TypeVar("T")


def make_event(device: torch.device) -> Any:
    """Return an event that the device times; None if the host's clock tells when its work is done."""
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None


@dataclass
class Traffic:
    """What this rank has sent to other ranks, and the seconds that it spent in the exchanges.

    ``seconds`` includes the wait for the slowest rank. On a GPU it is the time between two events in the
    stream of the model's work, which waits for the exchange; they are read when both have passed, so that
    nothing waits for the device.
    """

    bytes: int = 0
    rows: int = 0  # sent in forward passes, also by layers that are computed again
    seconds: float = 0.0
    pending: list[tuple[Any, Any]] = field(
        default_factory=list, repr=False
    )  # events that may not have passed

    @contextmanager
    def timing(self, device: torch.device) -> Iterator[None]:
        """Time an exchange of tensors on a device."""
        before, after = make_event(device), make_event(device)
        if before is None:
            begun = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - begun
        else:
            before.record()
            yield
            after.record()
            self.pending.append((before, after))

    @classmethod
    def sum(cls, parts: Iterable[Traffic]) -> Traffic:
        """Add up several records."""
        total = cls()
        for part in parts:
            total.bytes, total.rows, total.seconds = (
                total.bytes + part.bytes,
                total.rows + part.rows,
                total.seconds + part.seconds,
            )
        return total

    def take(self) -> Traffic:
        """Return the traffic since the last call, and reset it. The seconds of an exchange that the device
        has yet to make are left for the next call.
        """
        passed = [after.query() for _, after in self.pending]
        for (before, after), done in zip(self.pending, passed, strict=True):
            self.seconds += before.elapsed_time(after) / 1000 if done else 0.0
        taken = Traffic(self.bytes, self.rows, self.seconds)
        self.bytes, self.rows, self.seconds = 0, 0, 0.0
        self.pending = [pair for pair, done in zip(self.pending, passed, strict=True) if not done]
        return taken


def _exchange(
    tensor: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, traffic: Traffic
) -> Tensor:
    received = tensor.new_empty((sum(receive), *tensor.shape[1:]))
    with traffic.timing(tensor.device):
        dist.all_to_all_single(received, tensor.contiguous(), receive, send, group=group)
    leaving = sum(send) - send[dist.get_rank(group)]
    traffic.bytes += leaving * tensor.element_size() * math.prod(tensor.shape[1:])
    return received


def exchange_counts(counts: Tensor, group: dist.ProcessGroup, traffic: Traffic) -> Tensor:
    """Send one row of integers ``counts`` [R, ...] to each rank; return those received [R, ...]."""
    ones = [1] * counts.shape[0]
    return _exchange(counts, ones, ones, group, traffic)


def _exchange_together(
    parts: Sequence[Tensor], send: list[int], receive: list[int], group: dist.ProcessGroup, traffic: Traffic
) -> tuple[Tensor, ...]:
    """Exchange several tensors [S, ...], of any types, in one message of bytes."""
    if len(parts) == 1:
        return (_exchange(parts[0], send, receive, group, traffic),)
    sent = [_bytes(part.flatten(1)) for part in parts]
    message = _exchange(torch.cat(sent, 1), send, receive, group, traffic)
    received = message.split([each.shape[1] for each in sent], 1)
    return tuple(
        _view(each, part.dtype).unflatten(1, part.shape[1:])
        for each, part in zip(received, parts, strict=True)
    )


def _bytes(rows: Tensor) -> Tensor:
    """View rows [S, N] as bytes [S, N B]. A single row or column may be contiguous with any stride."""
    if not rows.is_contiguous() or rows.stride(1) != 1:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.uint8)


def _view(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Read columns of bytes as numbers, without a copy if each row begins where such a number may."""
    if columns.storage_offset() % dtype.itemsize or columns.stride(0) % dtype.itemsize:
        columns = columns.clone(memory_format=torch.contiguous_format)
    return columns.view(dtype)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        send: list[int],
        receive: list[int],
        group: dist.ProcessGroup,
        traffic: Traffic,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.way_back = receive, send, group, traffic
        out = _exchange_together(parts, send, receive, group, traffic)
        known = zip(out, ctx.needs_input_grad[4:], strict=True)
        ctx.mark_non_differentiable(*(each for each, is_needed in known if not is_needed))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[4:]
        leaving = [each for each, is_needed in zip(gradients, needed, strict=True) if is_needed]
        arrived = iter(_exchange_together(leaving, *ctx.way_back))
        return None, None, None, None, *(next(arrived) if is_needed else None for is_needed in needed)


def all_to_all(
    parts: Sequence[Tensor],
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    traffic: Traffic,
) -> tuple[Tensor, ...]:
    """Send ``send[r]`` rows to each rank r and receive ``receive[r]`` rows from it, in rank order.

    A row is that of each of the ``parts`` [S, ...], which may have different types and travel in one message.
    The gradients of those that need one travel back in one, too; each must need one on all ranks or on none.
    Any count may be zero. Every rank of the group must call it. Adds to ``traffic``.
    """
    out: tuple[Tensor, ...] = _AllToAll.apply(send, receive, group, traffic, *parts)
    return out


def share(total: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the bounds, first and last plus one, of the contiguous share of ``total`` items of one rank."""
    return total * rank // ranks, total * (rank + 1) // ranks


def _gather_rows(part: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' uneven shares, padded to the largest, since gloo gathers only equal shapes."""
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
    """Return this rank's share of rows [S, ...] that are equal on all ranks of the group.

    The backward pass gathers the gradient from all ranks.
    """
    out: Tensor = _SplitRows.apply(rows, group)
    return out


def join_rows(part: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
    """Return all rows [S, ...] on every rank, from each rank's share: the inverse of :func:`split_rows`."""
    out: Tensor = _JoinRows.apply(part, total, group)
    return out


def _sum_over(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Sum each of several tensors over the ranks, by one all-reduce."""
    message = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(message, group=group)
    parts = message.split([tensor.numel() for tensor in tensors])
    return tuple(part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True))


class _CopyTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_sum_over(gradients, ctx.group)


class _SumTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _sum_over(tensors, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *gradients


def copy_together(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Return tensors that are equal on all ranks; the backward pass sums their gradients, by one all-reduce.

    Each rank computes its own part of a result with them. Tensors that need no gradient take no part.
    """
    copies = iter(_CopyTogether.apply(group, *[tensor for tensor in tensors if tensor.requires_grad]))
    return tuple(next(copies) if tensor.requires_grad else tensor for tensor in tensors)


def sum_together(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Sum tensors over the ranks, by one all-reduce; the backward pass leaves the gradients as they are.

    Each rank holds one summand.
    """
    out: tuple[Tensor, ...] = _SumTogether.apply(group, *tensors)
    return out


def on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result, or raise its UserError, on all ranks. Called by every
    rank.
    """
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = function()
        except UserError as error:
            told[1] = str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(told)
    if told[1] is not None:
        raise SharedError(told[1])
    value: T = told[0]
    return value

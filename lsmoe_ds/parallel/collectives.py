"""Differentiable collectives that neither torch, Megatron nor DeepSpeed offers on every backend.

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
    """Return a timing event of the device; None if the device's work ends when the call returns (CPU)."""
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None


@dataclass
class Traffic:
    """What this rank has sent to other ranks, and the seconds that it spent in the exchanges.

    ``seconds`` includes the wait for the slowest rank. Of an exchange that overlaps with computation it is
    only what this rank waits for. On a GPU it is the time between two events in the model's stream, which
    waits for the exchange. Events are read only after both have passed, so nothing waits for the device.
    """

    bytes: int = 0
    rows: int = 0  # sent in forward passes, including those of recomputed layers
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
        """Return the traffic since the last call, and reset it.

        The seconds of exchanges that the device has not finished are left for the next call.
        """
        passed = [after.query() for _, after in self.pending]
        for (before, after), done in zip(self.pending, passed, strict=True):
            self.seconds += before.elapsed_time(after) / 1000 if done else 0.0
        taken = Traffic(self.bytes, self.rows, self.seconds)
        self.bytes, self.rows, self.seconds = 0, 0, 0.0
        self.pending = [pair for pair, done in zip(self.pending, passed, strict=True) if not done]
        return taken


@dataclass
class _Message:
    """One message to each rank; overlapped exchanges last until :meth:`end` is called."""

    received: Tensor
    sent: Tensor | None  # the exchange reads it until it has ended
    work: Any  # None if the exchange has ended
    traffic: Traffic

    def end(self) -> Tensor:
        """Wait until all rows have arrived, and return them. Only an overlapped exchange is timed here."""
        if self.work is not None:
            with self.traffic.timing(self.received.device):
                self.work.wait()
        self.work = self.sent = None
        return self.received


def _begin(
    tensor: Tensor,
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    traffic: Traffic,
    overlapped: bool = False,
) -> _Message:
    received = tensor.new_empty((sum(receive), *tensor.shape[1:]))
    message = _Message(received, tensor.contiguous(), None, traffic)
    arguments = received, message.sent, receive, send
    if overlapped:
        message.work = dist.all_to_all_single(*arguments, group=group, async_op=True)
    else:
        with traffic.timing(tensor.device):
            dist.all_to_all_single(*arguments, group=group)
    leaving = sum(send) - send[dist.get_rank(group)]
    traffic.bytes += leaving * tensor.element_size() * math.prod(tensor.shape[1:])
    return message


def exchange_counts(counts: Tensor, group: dist.ProcessGroup, traffic: Traffic) -> Tensor:
    """Send one row of integers ``counts`` [R, ...] to each rank; return those received [R, ...]."""
    ones = [1] * counts.shape[0]
    return _begin(counts, ones, ones, group, traffic).end()


def _bytes(rows: Tensor) -> Tensor:
    """View rows [S, N] as bytes [S, N B]. A single row or column counts as contiguous with any stride."""
    if not rows.is_contiguous() or rows.stride(1) != 1:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.uint8)


def _view(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """View columns of bytes as numbers of type ``dtype``; copies them only if rows are not aligned for it."""
    if columns.storage_offset() % dtype.itemsize or columns.stride(0) % dtype.itemsize:
        columns = columns.clone(memory_format=torch.contiguous_format)
    return columns.view(dtype)


class _Rows:
    """The rows of several tensors [S, ...], of any types, which travel in one message of bytes.

    One object serves the way there and the way back of gradients, one after the other.
    """

    def __init__(
        self,
        send: list[int],
        receive: list[int],
        group: dist.ProcessGroup,
        traffic: Traffic,
        overlapped: bool,
    ) -> None:
        self.there, self.back = (send, receive), (receive, send)
        self.group, self.traffic, self.overlapped = group, traffic, overlapped
        self.needed: tuple[bool, ...] = ()  # which parts need a gradient
        self._kinds: list[tuple[torch.dtype, torch.Size]] = []
        self._message: _Message | None = None

    def begin(self, parts: Sequence[Tensor], counts: tuple[list[int], list[int]]) -> None:
        self._kinds = [(part.dtype, part.shape[1:]) for part in parts]
        one = parts[0] if len(parts) == 1 else torch.cat([_bytes(part.flatten(1)) for part in parts], 1)
        self._message = _begin(one, *counts, self.group, self.traffic, self.overlapped)

    def end(self) -> tuple[Tensor, ...]:
        assert self._message is not None
        # The autograd graph holds this object, and must not keep the rows of layers that are recomputed.
        received, self._message = self._message.end(), None
        if len(self._kinds) == 1:
            return (received,)
        widths = [dtype.itemsize * math.prod(shape) for dtype, shape in self._kinds]
        parts = zip(received.split(widths, 1), self._kinds, strict=True)
        return tuple(_view(part, dtype).unflatten(1, shape) for part, (dtype, shape) in parts)


class _Begin(torch.autograd.Function):
    """Begin to send rows. The result is empty: it ties :class:`_End` to the rows' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: _Rows, *parts: Tensor) -> Tensor:
        ctx.rows, rows.needed = rows, ctx.needs_input_grad[1:]
        rows.begin(parts, rows.there)
        return torch.empty(0, device=parts[0].device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        arrived = iter(ctx.rows.end())
        return None, *(next(arrived) if is_needed else None for is_needed in ctx.rows.needed)


class _End(torch.autograd.Function):
    """Return the rows that have arrived. The backward pass begins to send their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: _Rows, begun: Tensor) -> tuple[Tensor, ...]:
        ctx.rows, out = rows, rows.end()
        known = zip(out, rows.needed, strict=True)
        ctx.mark_non_differentiable(*(each for each, is_needed in known if not is_needed))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        rows: _Rows = ctx.rows
        needed = zip(gradients, rows.needed, strict=True)
        rows.begin([each for each, is_needed in needed if is_needed], rows.back)
        return None, torch.empty(0, device=gradients[0].device)


def begin_all_to_all(
    parts: Sequence[Tensor],
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    traffic: Traffic,
    overlapped: bool = True,
) -> Callable[[], tuple[Tensor, ...]]:
    """Begin to send rows as :func:`all_to_all` does; return a function that waits for those received.

    If ``overlapped``, whatever is computed before that function is called may overlap with the exchange; in
    the backward pass, what was computed between the two calls overlaps with the way back of the gradients.
    Ranks must begin exchanges in the same order. Otherwise each exchange ends before the call returns.
    """
    rows = _Rows(send, receive, group, traffic, overlapped)
    begun = _Begin.apply(rows, *parts)
    return lambda: _End.apply(rows, begun)


def all_to_all(
    parts: Sequence[Tensor],
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    traffic: Traffic,
) -> tuple[Tensor, ...]:
    """Send ``send[r]`` rows to each rank r and receive ``receive[r]`` rows from it, in rank order.

    A row consists of the rows of all ``parts`` [S, ...], which may have different types and travel in one
    message. The gradients of parts that need one travel back in one message; a part must need a gradient on
    all ranks or on none. Any count may be zero. Every rank of the group must call this. Adds to ``traffic``.
    """
    return begin_all_to_all(parts, send, receive, group, traffic, overlapped=False)()


def share(total: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the bounds (start, stop) of one rank's contiguous share of ``total`` items."""
    return total * rank // ranks, total * (rank + 1) // ranks


def _gather_rows(part: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' uneven shares. They are sent padded, since gloo gathers only equal shapes."""
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
    """Sum each tensor over the ranks, all in one all-reduce."""
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
    """Return tensors that are equal on all ranks; the backward pass sums their gradients in one all-reduce.

    Use this where each rank computes its own part of a result with them. Tensors that need no gradient are
    not reduced.
    """
    copies = iter(_CopyTogether.apply(group, *[tensor for tensor in tensors if tensor.requires_grad]))
    return tuple(next(copies) if tensor.requires_grad else tensor for tensor in tensors)


def sum_together(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Sum tensors over the ranks in one all-reduce; the backward pass returns the gradients unchanged.

    Each rank holds one summand.
    """
    out: tuple[Tensor, ...] = _SumTogether.apply(group, *tensors)
    return out


def on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0, and return its result or raise its UserError on all ranks.

    Every rank must call this.
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

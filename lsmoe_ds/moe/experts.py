"""The experts of one rank: sort rows by expert, apply the experts, sum the outputs with their weights.

On a Hopper GPU in bfloat16 one grouped product per linear layer computes all experts. On a CPU each thread
computes other experts (:mod:`lsmoe_ds.moe.on_cpu`). Elsewhere they run one after another.

n rows with N choices of a local expert, K top-k, H hidden, F feed-forward width, E local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.moe import on_cpu
from lsmoe_ds.moe.routers import DROPPED
from lsmoe_ds.parallel.compat import mark_expert_parameter
from lsmoe_ds.parallel.grouped import ALIGNMENT, grouped_mm, has_kernel
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.moe.replicas import Replica


@dataclass
class Assignment:
    """Map copies of rows to experts. Copies are sorted by expert; a choice is an index into [n K]."""

    experts: Tensor  # [N]: the local expert of each copy, ascending
    ends: Tensor  # [E] int32: where each expert's copies end; the last is N
    choices: Tensor  # [N]: the choice of each copy
    copies: Tensor  # [n, K]: the copy of each choice; 0 where the choice is DROPPED
    real: Tensor | None  # [n, K]: false where the choice is DROPPED; None if none is

    @classmethod
    def of(cls, chosen: Tensor, experts: int, count: int | None) -> Assignment:
        """Sort the choices by expert.

        ``chosen`` [n, K] holds local expert numbers or DROPPED. ``count`` is N, the number of choices that
        are not DROPPED; with None the device computes it, which waits for the device.
        """
        flat = chosen.reshape(-1)
        numbers, choices = flat.sort(stable=True)  # DROPPED first
        ends = torch.searchsorted(
            numbers, torch.arange(DROPPED, experts, device=flat.device), right=True, out_int32=True
        )
        none = int(ends[0]) if count is None else len(flat) - count
        numbers, choices = numbers[none:], choices[none:]
        copies = torch.zeros_like(flat)
        copies[choices] = torch.arange(choices.shape[0], device=flat.device)
        return cls(
            numbers, ends[1:] - none, choices, copies.view_as(chosen), chosen != DROPPED if none else None
        )

    def with_one_row(self) -> Assignment:
        """Return this assignment, which has no copies, with one row of padding for the last expert."""
        experts, ends = self.experts.new_full((1,), len(self.ends) - 1), self.ends.clone()
        ends[-1] = 1
        return replace(self, experts=experts, ends=ends)

    def counts(self) -> list[int]:
        """Count the copies that go to each local expert. Waits for the device."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()


class _Gather(torch.autograd.Function):
    """Copy rows [n, H] once for each choice: [N, H].

    The backward pass gathers as well: scattering the gradient would be several times slower.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        return rows.index_select(0, assignment.choices // assignment.copies.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _pick(gradients[0], ctx.assignment).sum(1), None


class _Combine(torch.autograd.Function):
    """Sum the copies [N, H] of each row with weights [n, K]: [n, H]."""

    @staticmethod
    def forward(ctx: Any, copies: Tensor, weights: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        ctx.save_for_backward(copies, weights)
        return torch.bmm(weights[:, None].to(copies.dtype), _pick(copies, assignment)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        assignment: Assignment = ctx.assignment
        (gradient,), (copies, weights) = gradients, ctx.saved_tensors
        grad_copies = grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_weights = torch.bmm(_pick(copies, assignment), gradient[:, :, None]).squeeze(2)
            grad_weights = grad_weights.to(weights.dtype)
        if ctx.needs_input_grad[0]:
            each = weights.reshape(-1)[assignment.choices][:, None].to(gradient.dtype)
            rows = assignment.choices // assignment.copies.shape[1]
            grad_copies = gradient.index_select(0, rows) * each
        return grad_copies, grad_weights, None


def _pick(copies: Tensor, assignment: Assignment) -> Tensor:
    """Return the copy of each choice, [n, K, H] from copies [N, H]; zero where the choice was dropped."""
    if not copies.shape[0]:
        return copies.new_zeros(*assignment.copies.shape, copies.shape[1])
    picked = copies.index_select(0, assignment.copies.reshape(-1)).view(*assignment.copies.shape, -1)
    return picked if assignment.real is None else picked.masked_fill(~assignment.real[:, :, None], 0)


class _Stack(torch.autograd.Function):
    """Stack E tensors of one shape: [E, ...].

    The result is a view if the tensors have equal distances in one storage, as with DeepSpeed's ZeRO or after
    :meth:`Experts.lay_together`; otherwise it is a copy, which autograd keeps.
    """

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        first, distance = parts[0], _distance(parts)
        if distance is None:
            return torch.stack(parts)
        return first.as_strided((len(parts), *first.shape), (distance, *first.stride()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0].unbind(0)


def _distance(parts: tuple[Tensor, ...]) -> int | None:
    """Return the distance, in elements, from the start of each part to the start of the next.

    None if no aligned view can hold all parts.
    """
    first, places = parts[0], [part.data_ptr() for part in parts]
    distances = {after - before for before, after in pairwise(places)} or {first.nbytes}
    distance, storage = distances.pop(), first.untyped_storage()
    if distances or distance < first.nbytes or distance % ALIGNMENT or places[0] % ALIGNMENT:
        return None
    # Separate storages can have equal distances by chance; a view must not leave the first storage.
    if places[-1] + first.nbytes > storage.data_ptr() + storage.nbytes() or not all(
        part.is_contiguous() for part in parts
    ):
        return None
    return distance // first.element_size()


class _AddBias(torch.autograd.Function):
    """Add to each row [N, F] the bias of its expert [E, F], in place.

    The gradient is a grouped product with ones: an indexed add would make thousands of rows contend for the
    same few addresses.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, biases: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        ctx.mark_dirty(rows)
        return rows.add_(biases.index_select(0, assignment.experts))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gradient = gradients[0].contiguous()
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        ones = gradient.new_ones(
            gradient.shape[0], ALIGNMENT // gradient.element_size()
        )  # the fewest columns that are aligned
        return gradient, grouped_mm(ones.t(), gradient, offs=ctx.assignment.ends)[:, 0], None


def use_grouped(experts: Iterable[nn.Module], rows: Tensor) -> bool:
    """Tell whether :func:`grouped` computes these experts for rows [N, H].

    The answer depends on types and device alone, never on N. If it differed between ranks, gradients would
    arrive in different orders.
    """
    return has_kernel(rows.device, rows.dtype) and all(_fits(expert, rows.dtype) for expert in experts)


def _fits(expert: nn.Module, dtype: torch.dtype) -> bool:
    if not _is_plain(expert, dtype):
        return False
    weight = expert.get_parameter("expand.weight")  # [F, H]
    return not any(size * weight.element_size() % ALIGNMENT for size in weight.shape)


def _is_plain(expert: Any, dtype: torch.dtype) -> bool:
    """Tell whether an expert is relu between two linear layers in this type, and need not be called."""
    if not vars(type(expert)).get("is_plain"):  # a subclass may compute something else
        return False
    layers = expert.expand, expert.contract
    # Hooks may load weights, or read what is computed.
    hooked = any(each._forward_pre_hooks or each._forward_hooks for each in (expert, *layers))
    return not hooked and all(type(each) is nn.Linear for each in layers) and layers[0].weight.dtype == dtype


def grouped(experts: Iterable[Any], rows: Tensor, assignment: Assignment) -> Tensor:
    """Apply the experts to rows [N, H], sorted by expert: [N, H]. Every expert gets a gradient."""
    if not rows.shape[0]:
        # The kernel rejects products over zero rows. So one row of zeros goes to the last expert and its
        # output is dropped: all gradients are zero, and arrive in the same order as on ranks with rows.
        padding = rows.new_zeros(1, rows.shape[1])
        return grouped(experts, torch.cat([rows, padding]), assignment.with_one_row())[:0]
    expand, contract = [[getattr(expert, part) for expert in experts] for part in ("expand", "contract")]
    return _linear(contract, F.relu(_linear(expand, rows, assignment)), assignment)


def _linear(parts: list[Any], rows: Tensor, assignment: Assignment) -> Tensor:
    weights, biases = (
        _Stack.apply(*[part.weight for part in parts]),
        _Stack.apply(*[part.bias for part in parts]),
    )
    # The kernel would leave rows after the last end uninitialized, also in gradients; there are no such rows.
    out: Tensor = _AddBias.apply(
        grouped_mm(rows, weights.transpose(1, 2), offs=assignment.ends), biases, assignment
    )
    return out


class Experts(nn.Module):
    """The local experts, as separate parameters.

    DeepSpeed saves and reduces each expert separately, under the name ``deepspeed_experts``. Also, indexing a
    stacked parameter would make autograd write a full-size gradient for every expert.
    """

    def __init__(self, experts: list[nn.Module], topology: Topology) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(experts)
        # When several ranks reduce gradients, every parameter needs a gradient on every rank, so in training
        # an expert without tokens runs over zero rows, unless all are frozen. A single rank fills in the
        # missing gradients once a step, which is cheaper.
        self.run_idle = topology.world > 1
        for parameter in self.parameters():
            mark_expert_parameter(parameter, topology.expert)

    def pack(self) -> None:
        """Move the experts' parameters into common storages, for inference."""
        self.lay_together(lambda parameter: True)

    @torch.no_grad()
    def lay_together(self, may_move: Callable[[Tensor], bool]) -> None:
        """Move each parameter of all experts into one storage, which a grouped product reads without a copy.

        Parameters are not moved if they have that layout already (as in ZeRO's buffers), if no grouped
        product reads them, or if ``may_move`` returns false because an optimizer owns their storage.
        """
        experts = list(self.deepspeed_experts)
        first = next(self.parameters())
        if not has_kernel(first.device, first.dtype) or not all(_fits(each, first.dtype) for each in experts):
            return
        for name, _ in experts[0].named_parameters():
            parts = tuple(expert.get_parameter(name) for expert in experts)
            if all(map(may_move, parts)) and _distance(parts) is None:
                for part, place in zip(parts, torch.stack(parts), strict=True):
                    part.data = place

    def forward(
        self,
        rows: Tensor,
        chosen: Tensor,
        weights: Tensor,
        count: int | None = None,
        replicas: Sequence[Replica] | None = None,
    ) -> Tensor:
        """Return the weighted sum of each row's expert outputs [n, H].

        ``rows`` [n, H]; ``chosen`` [n, K] has local expert numbers or DROPPED; ``weights`` [n, K]; ``count``:
        see :meth:`Assignment.of`. With ``replicas``, they are used instead of the local experts, and
        ``chosen`` has indices into them.
        """
        local = self.deepspeed_experts
        computing: Sequence[Any] = list(local) if replicas is None else replicas
        assignment = Assignment.of(chosen, len(computing), count)
        copies = _Gather.apply(rows, assignment)
        compute = grouped if use_grouped(local, copies) else self._separately
        out: Tensor = _Combine.apply(compute(computing, copies, assignment), weights, assignment)
        return out

    def _separately(self, experts: Sequence[Any], rows: Tensor, assignment: Assignment) -> Tensor:
        # The parameters come last: to go through those of 128 experts takes longer than a token's decoding.
        idle = self.training and self.run_idle and any(each.requires_grad for each in self.parameters())
        counts = assignment.counts()
        working = [number for number, count in enumerate(counts) if idle or count]
        if not working:
            return rows
        parts, sizes = [experts[number] for number in working], [counts[number] for number in working]
        # If experts without rows compute as well, the answer must be the same on all ranks, whichever have
        # rows. Replicas compute like the local experts.
        like = parts if isinstance(parts[0], nn.Module) and not idle else self.deepspeed_experts
        if on_cpu.computes(rows) and all(_is_plain(expert, rows.dtype) for expert in like):
            return on_cpu.compute(parts, rows, sizes)
        return torch.cat([expert(part) for expert, part in zip(parts, rows.split(sizes), strict=True)])

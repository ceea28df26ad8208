"""Multiply tokens by the matrices of their languages.

A parameter [R, width] holds the matrices of all languages or directions, stacked along the rows. Tokens are
grouped by the matrix that multiplies them, and all groups are multiplied together
(:mod:`lsmoe_ds.parallel.grouped`), so the number of kernels does not depend on the number of languages.

S rows (tokens), R rows of the parameter, G matrices, r rank, B sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsmoe_ds.methods.context import Chooser, LanguageContext
from lsmoe_ds.parallel.grouped import Groups, aligned

# Matrices of rank up to SMALL_RANK share a stack. Above it there is a stack for each power of two: ranks in
# (2^(k-1), 2^k].
SMALL_RANK = 16


@dataclass(eq=False)
class Stack:
    """Matrices of a parameter, padded to their largest rank and multiplied as one tensor [G, r, width]."""

    places: list[slice]  # the rows of each matrix in the parameter, ascending
    pads: bool  # whether r may be larger than the largest rank, for alignment
    _index: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rank(self, like: Tensor) -> int:
        """Return r, rounded up if grouped products in the type and on the device of ``like`` need that."""
        largest = max(place.stop - place.start for place in self.places)
        return aligned(largest, like) if self.pads else largest

    def of(self, matrix: Tensor, groups: Groups) -> Tensor:
        """Return the matrices that the groups read; a view of ``matrix`` [R, width] if none is padded."""
        rank, chosen = self.rank(matrix), self._read_by(groups)
        if _are_adjacent(chosen, rank):
            return matrix[chosen[0].start : chosen[-1].stop].unflatten(0, (len(chosen), rank))
        if len(chosen) == 1:
            own = matrix[chosen[0]]
            return F.pad(own, (0, 0, 0, rank - len(own))).unsqueeze(0)
        rows, padded = self._rows(rank, matrix.device)
        stacked = matrix.new_zeros(len(chosen) * rank, matrix.shape[1])
        return stacked.index_copy_(0, padded, matrix.index_select(0, rows)).unflatten(0, (len(chosen), rank))

    def is_all_of(self, gradient: Tensor, whole: Tensor) -> bool:
        """Tell whether the gradient of :meth:`of`, only reshaped, is the gradient of the whole parameter."""
        return gradient.numel() == whole.numel() and _are_adjacent(self.places, gradient.shape[1])

    def put(self, gradient: Tensor, whole: Tensor, groups: Groups) -> None:
        """Copy the gradient of :meth:`of` into ``whole`` [R, width], the gradient of the parameter."""
        chosen = self._read_by(groups)
        if _are_adjacent(chosen, gradient.shape[1]):
            whole[chosen[0].start : chosen[-1].stop] = gradient.flatten(0, 1)
        elif len(chosen) == 1:
            whole[chosen[0]] = gradient[0, : chosen[0].stop - chosen[0].start]
        else:
            rows, padded = self._rows(gradient.shape[1], whole.device)
            whole.index_copy_(0, rows, gradient.flatten(0, 1).index_select(0, padded))

    def _read_by(self, groups: Groups) -> list[slice]:
        return self.places[groups.first : groups.first + groups.count]

    def _rows(self, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows of all matrices in the parameter, and in the stack viewed as [G r, width]."""
        if (rank, device) not in self._index:
            both = [
                (row, i * rank + row - place.start)
                for i, place in enumerate(self.places)
                for row in range(place.start, place.stop)
            ]
            rows, padded = torch.tensor(both, device=device).unbind(1)
            self._index[rank, device] = rows.contiguous(), padded.contiguous()
        return self._index[rank, device]


def _are_adjacent(places: Sequence[slice], rank: int) -> bool:
    """Tell whether all matrices have this rank and are stacked without a gap."""
    starts = range(places[0].start, places[0].start + len(places) * rank, rank)
    return all(
        (place.start, place.stop) == (start, start + rank)
        for place, start in zip(places, starts, strict=True)
    )


_layouts: dict[tuple[tuple[int, int] | None, ...], int] = {}


class Matrices:
    """The layout of the matrices in a parameter [R, width]; ``places`` has the rows of each language.

    Several languages may share one matrix. The products of a language without rows are 0. With ``pads``
    products may be padded with columns of zeros.
    """

    def __init__(self, places: Sequence[slice], pads: bool = False) -> None:
        ranks = {(place.start, place.stop): place.stop - place.start for place in places}
        by_limit: dict[int, list[slice]] = {}
        for (start, stop), rank in sorted(ranks.items()):
            if rank:
                limit = max(SMALL_RANK, 1 << (rank - 1).bit_length())
                by_limit.setdefault(limit, []).append(slice(start, stop))
        self.stacks = [Stack(by_limit[limit], pads) for limit in sorted(by_limit)]
        number = {
            (place.start, place.stop): (which, i)
            for which, stack in enumerate(self.stacks)
            for i, place in enumerate(stack.places)
        }
        self._numbers = tuple(number.get((place.start, place.stop)) for place in places)
        # Layers that group languages in the same way have the same number, and share the groups of a batch.
        self.layout = _layouts.setdefault(self._numbers, len(_layouts))

    def rank(self, like: Tensor) -> int:
        """Return the largest r of the stacks."""
        return max((stack.rank(like) for stack in self.stacks), default=0)

    def groups(self, context: LanguageContext, kind: str | Chooser, rows: Tensor) -> list[Groups]:
        """Group the rows of a batch [S, ...] by matrix, for each stack.

        ``kind`` says which language of a sentence selects the matrix: see :meth:`LanguageContext.segments`.
        """
        return context.once((self.layout, kind, len(rows)), lambda: self._groups(context, kind, rows))

    def _groups(self, context: LanguageContext, kind: str | Chooser, rows: Tensor) -> list[Groups]:
        spans: list[list[tuple[int, int, int]]] = [[] for _ in self.stacks]
        for language, start, stop in context.spans(kind, len(rows)):
            if (found := self._numbers[language]) is not None:
                which, number = found
                spans[which].append((number, start, stop))
        return [
            Groups(own, len(stack.places), len(rows), rows.device, stack.rank(rows))
            for stack, own in zip(self.stacks, spans, strict=True)
        ]

    def gradient(
        self, parts: Sequence[Tensor], matrix: Tensor, groups: list[Groups], columns: slice
    ) -> Tensor:
        """Assemble the gradient of a parameter [R, width] from the gradients of its stacks on ``columns``."""
        if len(parts) == 1 and self.stacks[0].is_all_of(parts[0], matrix):
            return parts[0].reshape(matrix.shape)
        whole = torch.zeros_like(matrix)
        for stack, part, own in zip(self.stacks, parts, groups, strict=True):
            stack.put(part, whole[:, columns], own)
        return whole


def _join(parts: Sequence[Tensor], groups: list[Groups], like: Tensor, columns: int) -> Tensor:
    """Return the rows of all groups to their places: [S, columns]. Rows in no group are zero."""
    if len(parts) == 1 and parts[0].shape[1] == columns:
        return groups[0].put(parts[0])
    whole = like.new_zeros(len(like), columns)
    for part, own in zip(parts, groups, strict=True):
        whole[:, : part.shape[1]].index_copy_(0, own.order, part)
    return whole


class Multiply(torch.autograd.Function):
    """Multiply each token by the matrix of its group: x [S, inputs], matrix [R, inputs] -> z [S, r].

    r is :meth:`Matrices.rank`; columns beyond the rank of a token's matrix are 0. Only ``columns`` of the
    matrix are used, with the same number of first inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, matrices: Matrices, groups: list[Groups], columns: slice
    ) -> Tensor:
        ctx.save_for_backward(x, matrix)
        ctx.given = matrices, groups, columns
        read, used = x[:, : columns.stop - columns.start], matrix[:, columns]
        parts = [
            own.multiply(own.take(read), stack.of(used, own), transpose=True)
            for stack, own in zip(matrices.stacks, groups, strict=True)
        ]
        return _join(parts, groups, x, matrices.rank(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x, matrix), (matrices, groups, columns) = ctx.saved_tensors, ctx.given
        read, used = x[:, : columns.stop - columns.start], matrix[:, columns]
        given = [
            own.take(gradients[0][:, : stack.rank(x)])
            for stack, own in zip(matrices.stacks, groups, strict=True)
        ]
        grad_x = grad_matrix = None
        if ctx.needs_input_grad[0]:
            parts = [
                own.multiply(part, stack.of(used, own))
                for stack, own, part in zip(matrices.stacks, groups, given, strict=True)
            ]
            grad_x = _join(parts, groups, x, x.shape[1])
        if ctx.needs_input_grad[1]:
            parts = [own.outer(part, own.take(read)) for own, part in zip(groups, given, strict=True)]
            grad_matrix = matrices.gradient(parts, matrix, groups, columns)
        return grad_x, grad_matrix, None, None, None


class Add(torch.autograd.Function):
    """Add to y, in place, the product of each token's z with the matrix of its group.

    y [S, outputs], z [S, r], matrix [R, outputs]. Only ``columns`` of the matrix are used, for the same
    number of first outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z: Tensor,
        matrix: Tensor,
        matrices: Matrices,
        groups: list[Groups],
        columns: slice,
    ) -> Tensor:
        ctx.save_for_backward(z, matrix)
        ctx.given = matrices, groups, columns
        ctx.mark_dirty(y)
        part, used = y[:, : columns.stop - columns.start], matrix[:, columns]
        for stack, own in zip(matrices.stacks, groups, strict=True):
            own.add(part, own.take(z[:, : stack.rank(z)]), stack.of(used, own))
        return y

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        (z, matrix), (matrices, groups, columns) = ctx.saved_tensors, ctx.given
        part, used = gradients[0][:, : columns.stop - columns.start], matrix[:, columns]
        given = [own.take(part) for own in groups]
        grad_z = grad_matrix = None
        if ctx.needs_input_grad[1]:
            parts = [
                own.multiply(each, stack.of(used, own), transpose=True)
                for stack, own, each in zip(matrices.stacks, groups, given, strict=True)
            ]
            grad_z = _join(parts, groups, z, z.shape[1])
        if ctx.needs_input_grad[2]:
            parts = [
                own.outer(own.take(z[:, : stack.rank(z)]), each)
                for stack, own, each in zip(matrices.stacks, groups, given, strict=True)
            ]
            grad_matrix = matrices.gradient(parts, matrix, groups, columns)
        return gradients[0], grad_z, grad_matrix, None, None, None

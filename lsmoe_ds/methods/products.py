"""Products of tokens with the matrices of their languages, in two ways.

Small matrices are gathered for each sentence, padded to the largest rank, and all sentences are multiplied in
one batched product. Large ones stay where they are: neighboring sentences with the same choice form a
*segment*, whose rows are multiplied together, in place. Batches are sorted by language, so that segments are
few.

S rows (tokens), r rank, R the sum of the ranks of all matrices of a bank, B sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds.methods.context import Chooser, LanguageContext

Slices = list[tuple[slice, slice]]  # rows of the bank's matrix, and the tokens that they multiply


class _Rows:
    """Build the gradient of a bank's matrix [R, ...] from products, without first filling it with zeros.

    ``columns`` are those that the products are of; the others stay 0.
    """

    def __init__(self, matrix: Tensor, columns: slice) -> None:
        whole = columns == slice(0, matrix.shape[1])
        self.whole = torch.empty_like(matrix) if whole else torch.zeros_like(matrix)
        self.part = self.whole[:, columns]
        self.written: list[tuple[int, int]] = []

    def add(self, rows: slice, a: Tensor, b: Tensor) -> None:
        """Add the product of a and b to ``rows``, which must equal earlier rows or not overlap them."""
        if (rows.start, rows.stop) in self.written:
            self.part[rows].addmm_(a, b)
        else:
            torch.mm(a, b, out=self.part[rows])
            self.written.append((rows.start, rows.stop))

    def done(self) -> Tensor:
        """Zero the rows that no product wrote, and return the gradient."""
        end = 0
        for start, stop in [*sorted(self.written), (self.whole.shape[0],) * 2]:
            if end < start:
                self.part[end:start] = 0
            end = max(end, stop)
        return self.whole


def _blank(like: Tensor, columns: int, slices: Slices) -> Tensor:
    """Return [S, columns] to be filled: zeros if the slices leave out any of the S rows of ``like``."""
    count = sum(tokens.stop - tokens.start for _, tokens in slices)
    shape = like.shape[0], columns
    return like.new_empty(shape) if count == like.shape[0] else like.new_zeros(shape)


class MultiplySegments(torch.autograd.Function):
    """Multiply each token by its segment's rows of ``flat``: x [S, inputs], flat [R, inputs] -> z [S, r].

    r is the largest rank; columns beyond the rank of a token's segment are 0, and so is a token that is in
    none of the ``slices``. Only ``columns`` of ``flat`` are used, by default all, with as many first inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, flat: Tensor, slices: Slices, rank: int, columns: slice | None = None
    ) -> Tensor:
        ctx.save_for_backward(x, flat)
        ctx.slices, ctx.columns = slices, columns or slice(0, flat.shape[1])
        read, used = x[:, : ctx.columns.stop - ctx.columns.start], flat[:, ctx.columns]
        z = _blank(x, rank, slices)
        for rows, tokens in slices:
            own = rows.stop - rows.start
            torch.mm(read[tokens], used[rows].t(), out=z[tokens, :own])
            if own < rank:
                z[tokens, own:] = 0
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,), (x, flat) = gradients, ctx.saved_tensors
        width = ctx.columns.stop - ctx.columns.start
        read, used = x[:, :width], flat[:, ctx.columns]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _blank(x, x.shape[1], ctx.slices) if width == x.shape[1] else torch.zeros_like(x)
        grad_flat = _Rows(flat, ctx.columns) if ctx.needs_input_grad[1] else None
        for rows, tokens in ctx.slices:
            given = gradient[tokens, : rows.stop - rows.start]
            if grad_x is not None:
                torch.mm(given, used[rows], out=grad_x[tokens, :width])
            if grad_flat is not None:
                grad_flat.add(rows, given.t(), read[tokens])
        return grad_x, None if grad_flat is None else grad_flat.done(), None, None, None


class AddVertical(torch.autograd.Function):
    """Add z V to y in place: y [S, outputs], z [S, r], vertical [R, outputs] (each V transposed).

    Only ``columns`` of ``vertical`` are used, for as many first outputs.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, vertical: Tensor, slices: Slices, columns: slice) -> Tensor:
        ctx.save_for_backward(z, vertical)
        ctx.slices, ctx.columns = slices, columns
        ctx.mark_dirty(y)
        part, used = y[:, : columns.stop - columns.start], vertical[:, columns]
        for rows, tokens in slices:
            part[tokens].addmm_(z[tokens, : rows.stop - rows.start], used[rows])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (gradient,), (z, vertical) = gradients, ctx.saved_tensors
        part, used = gradient[:, : ctx.columns.stop - ctx.columns.start], vertical[:, ctx.columns]
        grad_z = _blank(z, z.shape[1], ctx.slices) if ctx.needs_input_grad[1] else None
        grad_vertical = _Rows(vertical, ctx.columns) if ctx.needs_input_grad[2] else None
        for rows, tokens in ctx.slices:
            rank = rows.stop - rows.start
            if grad_z is not None:
                torch.mm(part[tokens], used[rows].t(), out=grad_z[tokens, :rank])
                if rank < grad_z.shape[1]:
                    grad_z[tokens, rank:] = 0
            if grad_vertical is not None:
                grad_vertical.add(rows, z[tokens, :rank].t(), part[tokens])
        return gradient, grad_z, None if grad_vertical is None else grad_vertical.done(), None, None


@dataclass(frozen=True)
class SentenceRows:
    """The rows of a bank's matrix that each of B sentences uses, padded to the largest rank r."""

    index: Tensor  # [B, r]
    real: Tensor  # [B, 1, r]: 1, or 0 where a rank is smaller

    def take(self, matrix: Tensor) -> Tensor:
        """Return each sentence's matrix [B, r, columns] out of a bank's [R, columns]."""
        return matrix.index_select(0, self.index.view(-1)).view(*self.index.shape, matrix.shape[1])

    def add_up(self, gradient: Tensor, matrix: Tensor, columns: slice) -> Tensor:
        """Add up the gradients [B, r, columns] of the sentences' matrices into that of the bank's."""
        whole = torch.zeros_like(matrix)
        whole[:, columns].index_add_(0, self.index.view(-1), gradient.flatten(0, 1))
        return whole


class MultiplySentences(torch.autograd.Function):
    """Multiply as :class:`MultiplySegments` does, all sentences in one batched product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flat: Tensor, rows: SentenceRows, columns: slice) -> Tensor:
        ctx.save_for_backward(x, flat)
        ctx.rows, ctx.columns = rows, columns
        read = x[:, : columns.stop - columns.start].unflatten(0, (len(rows.index), -1))
        z = torch.bmm(read, rows.take(flat[:, columns]).transpose(1, 2))
        return z.mul_(rows.real).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x, flat), rows, columns = ctx.saved_tensors, ctx.rows, ctx.columns
        width, sentences = columns.stop - columns.start, (len(rows.index), -1)
        given = gradients[0].unflatten(0, sentences) * rows.real
        grad_x = grad_flat = None
        if ctx.needs_input_grad[0]:
            used = rows.take(flat[:, columns])
            if width == x.shape[1]:
                grad_x = torch.bmm(given, used).flatten(0, 1)
            else:
                grad_x = torch.zeros_like(x)
                grad_x[:, :width] = torch.bmm(given, used).flatten(0, 1)
        if ctx.needs_input_grad[1]:
            products = torch.bmm(given.transpose(1, 2), x[:, :width].unflatten(0, sentences))
            grad_flat = rows.add_up(products, flat, columns)
        return grad_x, grad_flat, None, None


class AddSentences(torch.autograd.Function):
    """Add as :class:`AddVertical` does, all sentences in one batched product."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, vertical: Tensor, rows: SentenceRows, columns: slice
    ) -> Tensor:
        ctx.save_for_backward(z, vertical)
        ctx.rows, ctx.columns = rows, columns
        ctx.mark_dirty(y)
        sentences = (len(rows.index), -1)
        part = y[:, : columns.stop - columns.start].unflatten(0, sentences)
        part.baddbmm_(z.unflatten(0, sentences), rows.take(vertical[:, columns]))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (gradient,), (z, vertical), rows, columns = gradients, ctx.saved_tensors, ctx.rows, ctx.columns
        sentences = (len(rows.index), -1)
        part = gradient[:, : columns.stop - columns.start].unflatten(0, sentences)
        grad_z = grad_vertical = None
        if ctx.needs_input_grad[1]:
            used = rows.take(vertical[:, columns])
            grad_z = torch.bmm(part, used.transpose(1, 2)).mul_(rows.real).flatten(0, 1)
        if ctx.needs_input_grad[2]:
            products = torch.bmm(z.unflatten(0, sentences).transpose(1, 2), part)
            grad_vertical = rows.add_up(products, vertical, columns)
        return gradient, grad_z, grad_vertical, None, None


def sentence_rows(
    places: Sequence[slice], context: LanguageContext, kind: str | Chooser, largest: int, device: Any
) -> SentenceRows:
    """Return the rows that each sentence uses, by its "source" or "target" language, unless its rank is above
    ``largest``.

    ``places`` are the rows of each language.
    """
    ranks = [rank for place in places if (rank := place.stop - place.start) <= largest]
    index, real = [], []
    for segment in context.segments(kind):
        place = places[segment.language]
        own = [*range(place.start, place.stop)] if place.stop - place.start <= largest else []
        padding = max(ranks) - len(own)
        count = segment.stop - segment.start
        index += [own + [0] * padding] * count
        real += [[1.0] * len(own) + [0.0] * padding] * count
    return SentenceRows(torch.tensor(index, device=device), torch.tensor(real, device=device).unsqueeze(1))


def slices_of(places: list[slice], context: LanguageContext, kind: str | Chooser, rows: Tensor) -> Slices:
    """Return for each segment of equal "source" or "target" language its rows of the matrix, and its tokens.

    ``places`` are the rows of each language. ``rows`` [S, ...] holds equally many tokens of each sentence.
    """
    segments = context.segments(kind)
    each = rows.shape[0] // segments[-1].stop if segments else 0
    return [
        (places[segment.language], slice(segment.start * each, segment.stop * each)) for segment in segments
    ]

"""The low-rank bank: language-specific matrices beside a linear layer ("Condensing Multilingual Knowledge",
equation 1).

    y = (W + V_i F_j) x

V_i [outputs, r] is the *vertical* and F_j [r, inputs] the *flat* matrix. The variants differ only in how a
sentence chooses i and j (:func:`indexes`). The product V F is never formed; the bank computes ``V (F x)``.
Neighboring sentences with the same choice form a *segment*: their rows are multiplied together, in place,
without gathering any weights. Batches are sorted by language, so that segments are few.

With tensor parallelism a column-parallel layer shards V by its rows and a row-parallel layer shards F by its
columns. The bank's own sum over ranks, r numbers per token, travels in the same all-reduce as the layer's.

S rows (tokens), r rank, R the sum of the ranks of all matrices of a bank.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.config.shapes import LinearShape, SideName
from lsmoe_ds.languages import Languages
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.low_rank.settings import LowRank
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.collectives import copy_together, sum_together
from lsmoe_ds.parallel.topology import Topology

NAME = "low_rank"
FLAT, VERTICAL = f"_{NAME}.flat", f"_{NAME}.vertical"  # after the name of the linear layer
Slices = list[tuple[slice, slice]]  # rows of the bank's matrix, and the tokens that they multiply


class _Rows:
    """Build the gradient of a bank's matrix [R, ...] from products, without first filling it with zeros."""

    def __init__(self, matrix: Tensor) -> None:
        self.whole = torch.empty_like(matrix)
        self.written: list[tuple[int, int]] = []

    def add(self, rows: slice, a: Tensor, b: Tensor) -> None:
        """Add the product of a and b to ``rows``, which must equal earlier rows or not overlap them."""
        if (rows.start, rows.stop) in self.written:
            self.whole[rows].addmm_(a, b)
        else:
            torch.mm(a, b, out=self.whole[rows])
            self.written.append((rows.start, rows.stop))

    def done(self) -> Tensor:
        """Zero the rows that no product wrote, and return the gradient."""
        end = 0
        for start, stop in [*sorted(self.written), (self.whole.shape[0],) * 2]:
            if end < start:
                self.whole[end:start] = 0
            end = stop
        return self.whole


class MultiplySegments(torch.autograd.Function):
    """Multiply each token by its segment's rows of ``flat``: x [S, inputs], flat [R, inputs] -> z [S, r].

    r is the largest rank. Columns beyond the rank of a token's segment stay uninitialized; readers of z must
    use only the first ones. ``slices`` must cover all tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, flat: Tensor, slices: Slices, rank: int) -> Tensor:
        ctx.save_for_backward(x, flat)
        ctx.slices = slices
        z = x.new_empty(x.shape[0], rank)
        for rows, tokens in slices:
            torch.mm(x[tokens], flat[rows].t(), out=z[tokens, : rows.stop - rows.start])
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,), (x, flat) = gradients, ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_flat = _Rows(flat) if ctx.needs_input_grad[1] else None
        for rows, tokens in ctx.slices:
            given = gradient[tokens, : rows.stop - rows.start]
            if grad_x is not None:
                torch.mm(given, flat[rows], out=grad_x[tokens])
            if grad_flat is not None:
                grad_flat.add(rows, given.t(), x[tokens])
        return grad_x, None if grad_flat is None else grad_flat.done(), None, None


class _AddVertical(torch.autograd.Function):
    """Add z V to y in place: y [S, outputs], z [S, r], vertical [R, outputs] (each V transposed)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, vertical: Tensor, slices: Slices) -> Tensor:
        ctx.save_for_backward(z, vertical)
        ctx.slices = slices
        ctx.mark_dirty(y)
        for rows, tokens in slices:
            y[tokens].addmm_(z[tokens, : rows.stop - rows.start], vertical[rows])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (gradient,), (z, vertical) = gradients, ctx.saved_tensors
        grad_z = torch.empty_like(z) if ctx.needs_input_grad[1] else None
        grad_vertical = _Rows(vertical) if ctx.needs_input_grad[2] else None
        for rows, tokens in ctx.slices:
            if grad_z is not None:
                torch.mm(gradient[tokens], vertical[rows].t(), out=grad_z[tokens, : rows.stop - rows.start])
            if grad_vertical is not None:
                grad_vertical.add(rows, z[tokens, : rows.stop - rows.start].t(), gradient[tokens])
        return gradient, grad_z, None if grad_vertical is None else grad_vertical.done(), None


def slices_of(places: list[slice], context: LanguageContext, kind: str, rows: Tensor) -> Slices:
    """Return for each segment of equal "source" or "target" language its rows of the matrix, and its tokens.

    ``places`` are the rows of each language. ``rows`` [S, ...] holds equally many tokens of each sentence.
    """
    segments = context.segments(kind)
    each = rows.shape[0] // segments[-1].stop if segments else 0
    return [
        (places[segment.language], slice(segment.start * each, segment.stop * each)) for segment in segments
    ]


def indexes(settings: LowRank, side: SideName) -> tuple[str, str]:
    """Return which language of a sentence chooses its vertical and its flat matrix: "source" or "target"
    (section 2.1).

    Pair-wise V[source] F[target]; language-wise both by the source in the encoder and by the target in the
    decoder.
    """
    if settings.index == "pair":
        return "source", "target"
    return ("target", "target") if side == "decoder" else ("source", "source")


def rows_of(settings: LowRank, languages: Languages) -> list[slice]:
    """Return the rows of each language's matrix in a bank [R, ...]; the shared matrix's rows come last."""
    ranks = [settings.rank_of(code) for code in languages.codes] + [
        settings.shared_rank
    ] * settings.fuse_distillation
    return [slice(end - rank, end) for rank, end in zip(ranks, accumulate(ranks), strict=True)]


class LowRankBank(nn.Module):
    """The language-specific matrices of one linear layer, which each call passes as ``base``."""

    def __init__(
        self, site: LinearShape, settings: LowRank, languages: Languages, topology: Topology
    ) -> None:
        super().__init__()
        self.rows = rows_of(settings, languages)
        self.rank, total = max(rows.stop - rows.start for rows in self.rows), self.rows[-1].stop
        self.vertical_of, self.flat_of = indexes(settings, site.side)
        self.topology, self.split = topology, site.split
        tensor, inputs, outputs = topology.tensor, site.inputs, site.outputs
        self.flat = nn.Parameter(torch.empty(total, inputs // tensor if self.split == "row" else inputs))
        self.vertical = nn.Parameter(
            torch.empty(total, outputs // tensor if self.split == "column" else outputs)
        )
        if tensor > 1:
            compat.mark_tensor_parallel(self.flat if self.split == "row" else self.vertical, 1)

    def forward(self, base: nn.Module, x: Tensor, context: LanguageContext) -> Tensor:
        """Apply the linear layer ``base`` with this bank beside it: x [..., inputs] -> [..., outputs].

        The rows of ``x`` are in the order of the context's sentences.
        """
        rows = x.reshape(-1, x.shape[-1])
        z = MultiplySegments.apply(
            rows, self.flat, slices_of(self.rows, context, self.flat_of, rows), self.rank
        )
        group = self.topology.tensor_group
        if group is None or self.topology.tensor == 1:
            y = base(rows)
        elif self.split == "column":
            rows, z = copy_together((rows, z), group)
            y = F.linear(rows, base.weight, base.bias)  # type: ignore[arg-type]
        else:
            y, z = sum_together((F.linear(rows, base.weight), z), group)  # type: ignore[arg-type]
            y = torch.add(y, base.bias)  # type: ignore[arg-type]
        y = _AddVertical.apply(y, z, self.vertical, slices_of(self.rows, context, self.vertical_of, rows))
        out: Tensor = y.view(*x.shape[:-1], y.shape[-1])
        return out

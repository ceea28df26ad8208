"""The low-rank bank: language-specific matrices beside a linear layer ("Condensing Multilingual Knowledge",
equation 1; "Exploring Intrinsic Language-specific Subspaces", equations 3 and 4).

    y = (W + V_i F_j) x                                 one pair of matrices
    y = W x + w_s V_s F_s x + w_t V_t F_t x             learned: of the source and of the target language

V_i [outputs, r] is the *vertical* and F_j [r, inputs] the *flat* matrix (B and A of LoRA). The variants
differ only in how a sentence chooses i and j (:meth:`lsmoe_ds.methods.low_rank.settings.LowRank.choices`).
The product V F is never formed; the bank computes ``V (F x)``. Neighboring sentences with the same choice
form a *segment*: their rows are multiplied together, in place, without gathering any weights. Batches are
sorted by language, so that segments are few.

With tensor parallelism a column-parallel layer shards V by its rows and a row-parallel layer shards F by its
columns. The bank's own sum over ranks, r numbers per token, travels in the same all-reduce as the layer's. If
the recipe's ``columns`` cut that side, its matrix is whole on every rank, which multiplies the columns that
it holds of the layer.

S rows (tokens), r rank, R the sum of the ranks of all matrices of a bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.config.shapes import LinearShape
from lsmoe_ds.languages import Languages
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.low_rank.settings import Choice, LowRank
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.collectives import copy_together, sum_together
from lsmoe_ds.parallel.topology import Topology

NAME = "low_rank"
FLAT, VERTICAL = "flat", "vertical"
MASK = "_mask"  # after the name of a matrix: which of its values are not pruned
FORM: str | None = None  # "segments" or "sentences" where benchmarks and tests choose
SMALL_RANK = 16  # up to which all sentences are multiplied in one batched product
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


class MultiplySegments(torch.autograd.Function):
    """Multiply each token by its segment's rows of ``flat``: x [S, inputs], flat [R, inputs] -> z [S, r].

    r is the largest rank; columns beyond the rank of a token's segment are 0. ``slices`` must cover all
    tokens. Only ``columns`` of ``flat`` are used, by default all, with as many first inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, flat: Tensor, slices: Slices, rank: int, columns: slice | None = None
    ) -> Tensor:
        ctx.save_for_backward(x, flat)
        ctx.slices, ctx.columns = slices, columns or slice(0, flat.shape[1])
        read, used = x[:, : ctx.columns.stop - ctx.columns.start], flat[:, ctx.columns]
        z = x.new_empty(x.shape[0], rank)
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
            grad_x = torch.empty_like(x) if width == x.shape[1] else torch.zeros_like(x)
        grad_flat = _Rows(flat, ctx.columns) if ctx.needs_input_grad[1] else None
        for rows, tokens in ctx.slices:
            given = gradient[tokens, : rows.stop - rows.start]
            if grad_x is not None:
                torch.mm(given, used[rows], out=grad_x[tokens, :width])
            if grad_flat is not None:
                grad_flat.add(rows, given.t(), read[tokens])
        return grad_x, None if grad_flat is None else grad_flat.done(), None, None, None


class _AddVertical(torch.autograd.Function):
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
        grad_z = torch.empty_like(z) if ctx.needs_input_grad[1] else None
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
        return matrix.index_select(0, self.index.view(-1)).view(*self.index.shape, -1)

    def add_up(self, gradient: Tensor, matrix: Tensor, columns: slice) -> Tensor:
        """Add up the gradients [B, r, columns] of the sentences' matrices into that of the bank's."""
        whole = torch.zeros_like(matrix)
        whole[:, columns].index_add_(0, self.index.view(-1), gradient.reshape(-1, gradient.shape[2]))
        return whole


class _MultiplySentences(torch.autograd.Function):
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


class _AddSentences(torch.autograd.Function):
    """Add as :class:`_AddVertical` does, all sentences in one batched product."""

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


def sentence_rows(places: Sequence[slice], context: LanguageContext, kind: str, device: Any) -> SentenceRows:
    """Return the rows that each sentence uses, by its "source" or "target" language.

    ``places`` are the rows of each language.
    """
    largest = max(place.stop - place.start for place in places)
    index, real = [], []
    for segment in context.segments(kind):
        place = places[segment.language]
        own = [*range(place.start, place.stop)]
        padding = largest - len(own)
        count = segment.stop - segment.start
        index += [own + [0] * padding] * count
        real += [[1.0] * len(own) + [0.0] * padding] * count
    return SentenceRows(torch.tensor(index, device=device), torch.tensor(real, device=device).unsqueeze(1))


def slices_of(places: list[slice], context: LanguageContext, kind: str, rows: Tensor) -> Slices:
    """Return for each segment of equal "source" or "target" language its rows of the matrix, and its tokens.

    ``places`` are the rows of each language. ``rows`` [S, ...] holds equally many tokens of each sentence.
    """
    segments = context.segments(kind)
    each = rows.shape[0] // segments[-1].stop if segments else 0
    return [
        (places[segment.language], slice(segment.start * each, segment.stop * each)) for segment in segments
    ]


def rows_of(settings: LowRank, languages: Languages) -> list[slice]:
    """Return the rows of each language's matrix in a bank [R, ...]; the shared matrix's rows come last."""
    ranks = [settings.rank_of(code, languages) for code in languages.codes] + [
        settings.shared_rank
    ] * settings.fuse_distillation
    return [slice(end - rank, end) for rank, end in zip(ranks, accumulate(ranks), strict=True)]


class LowRankBank(nn.Module):
    """One pair of matrices of each language beside one linear layer, which each call passes as ``base``.

    A matrix that is pruned has a mask beside it: 0 where a value is pruned. Those values are 0 and get no
    gradient.
    """

    def __init__(
        self, site: LinearShape, settings: LowRank, choice: Choice, languages: Languages, topology: Topology
    ) -> None:
        super().__init__()
        self.choice, self.topology, self.split = choice, topology, site.split
        self.rows = rows_of(settings, languages)
        self.rank, total = max(rows.stop - rows.start for rows in self.rows), self.rows[-1].stop
        spread = {FLAT: site.split == "row", VERTICAL: site.split == "column"}
        self.columns: dict[str, slice] = {}
        self.is_cut = settings.is_cut(site) and topology.tensor > 1
        for (name, width), all_columns in zip(
            zip((FLAT, VERTICAL), settings.size(site), strict=True), (site.inputs, site.outputs), strict=True
        ):
            own, part = width, slice(0, width)
            if spread[name] and self.is_cut:
                each = all_columns // topology.tensor
                first, end = (min(width, each * (topology.tensor_rank + i)) for i in (0, 1))
                part = slice(first, end)
            elif spread[name]:
                own = width // topology.tensor
                part = slice(0, own)
            self.columns[name] = part
            self.register_parameter(name, nn.Parameter(torch.empty(total, own)))
            self._prepare(name, spread[name] and topology.tensor > 1 and not self.is_cut, settings)

    def _prepare(self, name: str, spread: bool, settings: LowRank) -> None:
        """Mark a matrix that is spread over ranks, and give one that will be pruned its mask."""
        matrix = self.get_parameter(name)
        tensors = [matrix]
        if settings.prune is not None and name in settings.prune.pruned:
            mask = torch.ones(matrix.shape, dtype=torch.bool)
            self.register_buffer(f"{name}{MASK}", mask)
            tensors.append(self.get_buffer(f"{name}{MASK}"))  # type: ignore[arg-type]
            matrix.register_hook(lambda given: given.masked_fill(~self.get_buffer(f"{name}{MASK}"), 0.0))
        if spread:
            for tensor in tensors:
                compat.mark_tensor_parallel(tensor, 1)

    def by_sentence(self, context: LanguageContext, kind: str, x: Tensor) -> SentenceRows | None:
        """Return the rows that each sentence uses if batched products are faster; None if segments are.

        Small products, one after another, cost more than their arithmetic; padding to the largest rank costs
        little while that is small.
        """
        if FORM == "segments" or (FORM is None and self.rank > SMALL_RANK):
            return None
        rows = context.once(
            (NAME, kind, self.rank), lambda: sentence_rows(self.rows, context, kind, x.device)
        )
        return rows if rows.real.dtype == x.dtype else SentenceRows(rows.index, rows.real.to(x.dtype))

    def multiply(self, x: Tensor, context: LanguageContext) -> Tensor:
        """Multiply tokens by their flat matrices: x [S, inputs] -> z [S, r]."""
        flat = self._to_read(FLAT)
        if (rows := self.by_sentence(context, self.choice.flat, x)) is not None:
            by_sentence: Tensor = _MultiplySentences.apply(x, flat, rows, self.columns[FLAT])
            return by_sentence
        slices = slices_of(self.rows, context, self.choice.flat, x)
        z: Tensor = MultiplySegments.apply(x, flat, slices, self.rank, self.columns[FLAT])
        return z

    def add(self, y: Tensor, z: Tensor, context: LanguageContext) -> Tensor:
        """Add the products of z [S, r] and the vertical matrices to y [S, outputs], in place."""
        if (rows := self.by_sentence(context, self.choice.vertical, y)) is not None:
            by_sentence: Tensor = _AddSentences.apply(
                y, z, self._to_read(VERTICAL), rows, self.columns[VERTICAL]
            )
            return by_sentence
        slices = slices_of(self.rows, context, self.choice.vertical, y)
        out: Tensor = _AddVertical.apply(y, z, self._to_read(VERTICAL), slices, self.columns[VERTICAL])
        return out

    def _to_read(self, name: str) -> Tensor:
        """Return a matrix; the gradient of one that ``columns`` cut is summed over the ranks that read it."""
        matrix = self.get_parameter(name)
        group = self.topology.tensor_group
        if group is None or not self.is_cut or name != (FLAT if self.split == "row" else VERTICAL):
            return matrix
        return copy_together((matrix,), group)[0]

    def forward(self, base: nn.Module, x: Tensor, context: LanguageContext) -> Tensor:
        """Apply the linear layer ``base`` with this bank beside it: x [..., inputs] -> [..., outputs].

        The rows of ``x`` are in the order of the context's sentences.
        """
        return _beside(base, x, context, [self])


class SideWeights(nn.Module):
    """Two numbers of each layer of a side, ``index`` [layers, 2], from which softmax makes the weights of the
    source's and the target's matrices (equation 4 of "Exploring Intrinsic Language-specific Subspaces").
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.index = nn.Parameter(torch.empty(layers, 2))


class LearnedBanks(nn.Module):
    """The banks of the source and of the target language beside one linear layer, weighted by its layer."""

    def __init__(self, source: LowRankBank, target: LowRankBank, side: SideWeights, layer: int) -> None:
        super().__init__()
        self.source, self.target, self.layer = source, target, layer
        self._side = (side,)  # in a tuple, so that torch does not register the side's parameter once more

    def forward(self, base: nn.Module, x: Tensor, context: LanguageContext) -> Tensor:
        """Apply the linear layer ``base`` with both banks beside it: x [..., inputs] -> [..., outputs]."""
        return _beside(base, x, context, [self.source, self.target], self._side[0].index[self.layer])


def _beside(
    base: nn.Module,
    x: Tensor,
    context: LanguageContext,
    banks: Sequence[LowRankBank],
    index: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer with banks beside it, weighted by the softmax of ``index`` if there is one.

    The products z are weighted where they are whole on every rank, so that the gradient of ``index`` is, too.
    """

    def weigh(products: Sequence[Tensor]) -> Sequence[Tensor]:
        if index is None:
            return products
        return [product * weight for product, weight in zip(products, index.softmax(0), strict=True)]

    rows = x.reshape(-1, x.shape[-1])
    z: Sequence[Tensor] = [bank.multiply(rows, context) for bank in banks]
    group = banks[0].topology.tensor_group
    if group is None or banks[0].topology.tensor == 1:
        y, z = base(rows), weigh(z)
    elif banks[0].split == "column":
        rows, *z = copy_together((rows, *weigh(z)), group)
        y = F.linear(rows, base.weight, base.bias)  # type: ignore[arg-type]
    else:
        y, *z = sum_together((F.linear(rows, base.weight), *z), group)  # type: ignore[arg-type]
        y, z = torch.add(y, base.bias), weigh(z)  # type: ignore[arg-type]
    for bank, product in zip(banks, z, strict=True):
        y = bank.add(y, product, context)
    return y.view(*x.shape[:-1], y.shape[-1])

"""The low-rank bank: language-specific matrices beside a linear layer ("Condensing Multilingual Knowledge",
equation 1; "Exploring Intrinsic Language-specific Subspaces", equations 3 and 4; "Towards Modular
Fine-tuning", equations 2 to 5).

    y = (W + V_i F_j) x                                 one pair of matrices
    y = W x + w_s V_s F_s x + w_t V_t F_t x             learned: of the source and of the target language

V_i [outputs, r] is the *vertical* and F_j [r, inputs] the *flat* matrix (B and A of LoRA). The variants
differ only in how a sentence chooses i and j (:meth:`lsmoe_ds.methods.low_rank.settings.LowRank.choices`).
The product V F is never formed; the bank computes ``V (F x)``.
How tokens are multiplied is in :mod:`lsmoe_ds.methods.products`.

With tensor parallelism a column-parallel layer shards V by its rows and a row-parallel layer shards F by its
columns. The bank's own sum over ranks, r numbers per token, travels in the layer's all-reduce. If the
recipe's ``columns`` cut that side, every rank holds the whole matrix and multiplies only the columns that
belong to its part of the layer.

S rows (tokens), r rank, R the sum of the ranks of all matrices of a bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.config.shapes import LinearShape
from lsmoe_ds.directions import Languages
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.low_rank.modular import Chosen, only_used, weigh
from lsmoe_ds.methods.low_rank.settings import Choice, LowRank
from lsmoe_ds.methods.products import Add, Matrices, Multiply
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.collectives import copy_together, sum_together
from lsmoe_ds.parallel.topology import Topology

NAME = "low_rank"
FLAT, VERTICAL = "flat", "vertical"
MASK = "_mask"  # suffix of the name of a matrix's mask, which is false where a value is pruned


def rows_of(settings: LowRank, languages: Languages) -> list[slice]:
    """Return the rows of each language's matrix in a bank [R, ...]; the shared matrix's rows come last."""
    ranks = [settings.rank_of(code, languages) for code in languages.codes] + [
        settings.shared_rank
    ] * settings.fuse_distillation
    ranks += [0] * settings.is_modular  # no rows, for sentences that use no matrix
    return [slice(end - rank, end) for rank, end in zip(ranks, accumulate(ranks), strict=True)]


class LowRankBank(nn.Module):
    """One pair of matrices for each language beside one linear layer, which each call passes as ``base``.

    A matrix that is pruned has a mask, 0 where a value is pruned. Pruned values are 0 and get no gradient.
    """

    def __init__(
        self, site: LinearShape, settings: LowRank, choice: Choice, languages: Languages, topology: Topology
    ) -> None:
        super().__init__()
        self.choice, self.topology, self.split = choice, topology, site.split
        self.kinds: dict[str, str | Chosen] = {kind: kind for kind in choice.kinds}
        if settings.is_modular:
            pivot, learned = languages.id(settings.pivot), settings.merge is not None
            self.kinds = {kind: Chosen(kind, pivot, learned) for kind in ("in", "out")}
        self.rows = rows_of(settings, languages)
        self.matrices, total = Matrices(self.rows, pads=True), self.rows[-1].stop
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

    def multiply(self, x: Tensor, context: LanguageContext) -> Tensor:
        """Multiply tokens by their flat matrices: x [S, inputs] -> z [S, r], for :meth:`add`."""
        groups = self.matrices.groups(context, self.kinds[self.choice.flat], x)
        z: Tensor = Multiply.apply(x, self._to_read(FLAT), self.matrices, groups, self.columns[FLAT])
        return z

    def add(self, y: Tensor, z: Tensor, context: LanguageContext) -> Tensor:
        """Add the products of z and the vertical matrices to y [S, outputs], in place."""
        groups = self.matrices.groups(context, self.kinds[self.choice.vertical], y)
        out: Tensor = Add.apply(y, z, self._to_read(VERTICAL), self.matrices, groups, self.columns[VERTICAL])
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
    """Two learned numbers, ``index`` [layers, 2], for each layer of a side.

    Their softmax gives the weights of the source's and the target's matrices (equation 4 of "Exploring
    Intrinsic Language-specific Subspaces"). In modular LoRA each direction has its own: [directions, layers,
    2].
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.index = nn.Parameter(torch.empty(*shape, 2))


class LearnedBanks(nn.Module):
    """The banks of the source and of the target language beside a linear layer, with its layer's weights."""

    def __init__(self, source: LowRankBank, target: LowRankBank, side: SideWeights, layer: int) -> None:
        super().__init__()
        self.source, self.target, self.layer = source, target, layer
        self._side = (side,)  # in a tuple, so that torch does not register the side's parameter twice

    def forward(self, base: nn.Module, x: Tensor, context: LanguageContext) -> Tensor:
        """Apply the linear layer ``base`` with both banks beside it: x [..., inputs] -> [..., outputs]."""
        weights = self._side[0].index[self.layer].softmax(0)

        def weigh(products: Sequence[Tensor]) -> Sequence[Tensor]:
            return [product * weight for product, weight in zip(products, weights, strict=True)]

        return _beside(base, x, context, [self.source, self.target], weigh)


class ModularBanks(nn.Module):
    """The input bank (of the source) and the output bank (of the target) beside one linear layer.

    The route says how they are merged (:mod:`lsmoe_ds.methods.low_rank.modular`).
    """

    def __init__(
        self, banks: Sequence[LowRankBank], pivot: int, side: SideWeights | None, layer: int
    ) -> None:
        super().__init__()
        for bank in banks:
            self.add_module(bank.choice.name, bank)
        self._banks, self.pivot, self.layer, self._side = tuple(banks), pivot, layer, (side,)

    def forward(self, base: nn.Module, x: Tensor, context: LanguageContext) -> Tensor:
        """Apply the linear layer ``base`` with both banks beside it: x [..., inputs] -> [..., outputs]."""
        (side,) = self._side
        index = None if side is None else side.index[:, self.layer]
        if not torch.is_grad_enabled() and index is None:  # in training both need a gradient, even of 0
            only = context.once((NAME, "only", self.pivot), lambda: only_used(context, self.pivot))
            if only is not None:
                return _beside(base, x, context, [self._banks[only]])
        return _beside(base, x, context, self._banks, lambda z: weigh(z, context, self.pivot, index))


def _beside(
    base: nn.Module,
    x: Tensor,
    context: LanguageContext,
    banks: Sequence[LowRankBank],
    weigh: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda products: products,
) -> Tensor:
    """Apply a linear layer with banks beside it; ``weigh`` multiplies their products by weights.

    It does so after the products z are summed over ranks, so that the gradient of the weights is whole, too.
    """
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

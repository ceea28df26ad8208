"""Low-rank matrices as a method: where banks are added, how they are initialized, pruned and merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.shapes import LinearShape, SideName, shapes_of
from lsmoe_ds.directions import Direction
from lsmoe_ds.methods.base import Draw, Method, Product
from lsmoe_ds.methods.context import SHARED, Route
from lsmoe_ds.methods.findings import Findings
from lsmoe_ds.methods.low_rank.analysis import ANALYSES, why_not
from lsmoe_ds.methods.low_rank.bank import (
    FLAT,
    MASK,
    NAME,
    VERTICAL,
    LearnedBanks,
    LowRankBank,
    ModularBanks,
    SideWeights,
    rows_of,
)
from lsmoe_ds.methods.low_rank.masks import is_untrained, smallest
from lsmoe_ds.methods.low_rank.modular import Merge, parse_route, weights_of
from lsmoe_ds.methods.low_rank.settings import LowRank
from lsmoe_ds.methods.sites import LinearSite
from lsmoe_ds.parallel.parameters import partition_dimension
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe

SIDES: tuple[SideName, ...] = ("encoder", "decoder")


class Matrices(NamedTuple):
    """One pair of matrices of two languages, or of one: W + weight V F.

    ``at`` is the prefix of its parameters' global names; the slices are the rows of V and of F in the bank.
    """

    at: str
    vertical_rows: slice
    flat_rows: slice

    @property
    def rank(self) -> int:
        return int(self.flat_rows.stop - self.flat_rows.start)


class LowRankMatrices(Method):
    """Add banks beside the linear layers that ``at`` names; layers of experts have none."""

    name = NAME
    by_direction = True
    adds_products = True
    analyses = tuple(ANALYSES)

    section: LowRank

    def __init__(self, section: LowRank, recipe: Recipe, topology: Topology) -> None:
        super().__init__(section, recipe, topology)
        self.sides: dict[str, SideWeights] = {}
        self.banks: list[tuple[LinearSite, LowRankBank]] = []  # in the order of their sites
        self._has_pruned = False  # in this process
        self._waiting: list[tuple[nn.Parameter, slice]] = []  # untrained matrices, which pruning skipped
        self.shapes = {site.at: site for site in shapes_of(recipe.model) if isinstance(site, LinearShape)}

    def shared_modules(self) -> list[tuple[str, nn.Module]]:
        model = self.recipe.model
        for side, settings in zip(SIDES, (model.encoder, model.decoder), strict=True):
            if self.section.learns(model, side):
                each = (len(self.languages.directions),) if self.section.is_modular else ()
                self.sides[side] = SideWeights(*each, settings.layers)
        return [(f"{side}_{NAME}", weights) for side, weights in self.sides.items()]

    def make(self, site: LinearSite) -> LowRankBank | LearnedBanks | ModularBanks:
        """Return the bank of one linear layer, or the module that weights its two banks."""
        banks = [
            LowRankBank(site, self.section, choice, self.languages, self.topology)
            for choice in self.section.choices(site)
        ]
        self.banks += [(site, bank) for bank in banks]
        if len(banks) == 1:
            return banks[0]
        if self.section.is_modular:
            pivot = self.languages.id(self.section.pivot)
            return ModularBanks(banks, pivot, self.sides.get(site.side), site.layer)
        source, target = banks
        return LearnedBanks(source, target, self.sides[site.side], site.layer)

    def spread_along(self, name: str) -> int | None:
        """Return 1 for the matrix that tensor-parallel ranks split, otherwise None.

        That is the vertical matrix of a column-parallel layer or the flat one of a row-parallel layer, unless
        ``columns`` cut it.
        """
        at, _, matrix = name.partition(f"_{NAME}.")
        site = self.shapes.get(at)
        if site is None or self.section.is_cut(site):
            return None
        return 1 if matrix.rpartition(".")[2] == (VERTICAL if site.split == "column" else FLAT) else None

    def matrices(self, at: str, direction: Direction | None, route: Route = "specific") -> list[Matrices]:
        """Return the pairs of matrices that a direction, or the shared route, uses beside a linear layer."""
        numbers = {"source": SHARED, "target": SHARED}
        if route != "shared" and direction is not None:
            source, target = (self.languages.id(code) for code in (direction.source, direction.target))
            numbers = {"source": source, "target": target, "in": source, "out": target}
        rows = rows_of(self.section, self.languages)
        return [
            Matrices(
                f"{at}_{NAME}.{choice.name}{'.' if choice.name else ''}",
                rows[numbers[choice.vertical]],
                rows[numbers[choice.flat]],
            )
            for choice in self.section.choices(self.shapes[at])
        ]

    def merge_of(self, weights: Tensors, at: str, direction: Direction | None, route: Route) -> Merge:
        """Return how the two pairs of matrices beside a linear layer are merged."""
        site, modular = self.shapes[at], self.section.is_modular
        if (merge := parse_route(route) if modular else None) is not None:
            return merge
        if modular and self.section.merge is None:
            assert direction is not None
            codes = (direction.source, direction.target, self.section.pivot)
            return Merge("outputs", weights_of(*(self.languages.id(code) for code in codes)))
        index = weights[f"{site.side}_{NAME}.index"]
        if modular:
            assert direction is not None
            index = index[self.languages.direction_id(direction)]
        first, second = index[site.layer].softmax(0).tolist()
        return Merge("outputs", (first, second))

    def merge_at(
        self, weights: Tensors, at: str, direction: Direction | None, route: Route
    ) -> dict[str, LazyTensor]:
        """Return the merged weight W + V F of the linear layer ``at``; of two pairs, their weighted sum."""
        if at not in self.shapes:  # the weights of a side
            return {}
        base, product = self.weight_at(at), self.product(weights, at, direction, route)

        def make() -> Tensor:
            down, up = product.make()
            merged = weights[base].clone()
            merged[: product.outputs, : product.inputs].addmm_(up, down)
            return merged

        return {base: LazyTensor(weights.shape(base), make)}

    def weight_at(self, at: str) -> str:
        """Return the global name of the weight of a linear layer."""
        model = self.recipe.model
        if model.huggingface is None:
            return f"{at}.weight"
        from lsmoe_ds.config.host_outline import read_outline

        return f"host.{read_outline(model.huggingface, model.task).modules[at]}.weight"

    def product(self, weights: Tensors, at: str, direction: Direction | None, route: Route) -> Product:
        """Return the product V F that a direction, or the shared route, adds to a linear layer.

        Two weighted pairs of matrices become one pair that includes the weights. Its rank is the sum of
        theirs; if the route merges the matrices themselves, it is that of a single pair.
        """
        pairs, merge, shares = self.matrices(at, direction, route), None, list[float]()
        if len(pairs) == 2:
            merge = self.merge_of(weights, at, direction, route)
            used = [each for each in zip(pairs, merge.weights, strict=True) if each[1]]
            used = [each for each in used if each[0].rank] or used[:1]  # the pivot has none
            pairs, shares = [pair for pair, _ in used], [share for _, share in used]
        joint = merge is not None and merge.by == "matrices" and len(pairs) == 2

        def make() -> tuple[Tensor, Tensor]:
            down = [weights[each.at + FLAT][each.flat_rows] for each in pairs]
            up = [weights[each.at + VERTICAL][each.vertical_rows] for each in pairs]
            if merge is None:
                return torch.cat(down), torch.cat(up).t()
            if joint:
                down, up = (
                    [each * root for each, root in zip(side, merge.roots, strict=True)] for side in (down, up)
                )
                return down[0] + down[1], (up[0] + up[1]).t()
            weighted = [each * share for each, share in zip(up, shares, strict=True)]
            return torch.cat(down), torch.cat(weighted).t()

        def kept() -> int:
            count = product.values
            for each in pairs:
                for name, rows in ((FLAT, each.flat_rows), (VERTICAL, each.vertical_rows)):
                    if (mask := f"{each.at}{name}{MASK}") in weights:
                        count -= int((~weights[mask][rows].bool()).sum())
            return count

        ranks = [each.rank for each in pairs]
        rank = ranks[0] if joint else sum(ranks)
        product = Product(rank, *self.section.size(self.shapes[at]), make, kept)
        return product

    def products(self, weights: Tensors, direction: Direction | None, route: Route) -> dict[str, Product]:
        return {
            at: self.product(weights, at, direction, route)
            for at, site in self.shapes.items()
            if self.section.is_at(site)
        }

    def adapters(self) -> dict[str, tuple[Direction, Route]]:
        """Return the adapter of each language as input and as output, if the matrices are modular."""
        if not self.section.is_modular:
            return {}
        pivot, found = self.section.pivot, dict[str, tuple[Direction, Route]]()
        for each in self.languages.directions:
            if each.target == pivot:
                found[f"in-{each.source}"] = each, "in"
            elif each.source == pivot:
                found[f"out-{each.target}"] = each, "out"
        return found

    @property
    def chosen_by(self) -> set[str]:
        choices = [
            choice
            for site in self.shapes.values()
            if self.section.is_at(site)
            for choice in self.section.choices(site)
        ]
        names = {"in": "source", "out": "target"}
        return {names.get(kind, kind) for choice in choices for kind in choice.kinds}

    def language_rows(self, name: str, width: int) -> dict[str, slice]:
        last = name.removesuffix(MASK).rpartition(".")[2]
        if last == "index" and self.section.is_modular:
            return {str(each): slice(i, i + 1) for i, each in enumerate(self.languages.directions)}
        if last not in (FLAT, VERTICAL):
            return {}
        return dict(
            zip([*self.languages.codes, "shared"], rows_of(self.section, self.languages), strict=False)
        )

    def initial(self, name: str) -> Draw | None:
        """Initialize one matrix of each pair to 0, so that adding the pair does not change the output.

        The other is drawn from a normal distribution with standard deviation ``init_std``. Learned weights
        begin equal; nothing is pruned.
        """
        if not self.owns(name):
            return None
        last = name.rpartition(".")[2]
        if last.endswith(MASK):
            return lambda value, generator: value.fill_(1)
        if last == "index":
            return lambda value, generator: value.fill_(float(self.section.is_modular))
        if last == self.section.zero:
            return lambda value, generator: value.zero_()
        return lambda value, generator: value.normal_(0.0, self.section.init_std, generator=generator)

    def before_step(self, model: nn.Module, number: int, steps: int) -> dict[nn.Parameter, Tensor]:
        """Prune when the ratio grows, when a matrix is no longer 0, and in the first step of this process.

        The last is for a run that resumes with fewer steps: it may be past the epochs in which the ratio
        grows. Pruning by the same ratio again changes nothing.
        """
        prune = self.section.prune
        if prune is None:
            return {}
        ratio = prune.ratio_at(prune.epoch(number, steps))
        grown = ratio != prune.ratio_at(prune.epoch(number - 1, steps))
        if self._has_pruned and not grown and not self._has_begun():
            return {}
        self._has_pruned = True
        return self.prune(ratio)

    @torch.no_grad()
    def _has_begun(self) -> bool:
        """Tell whether a matrix that pruning skipped, because it was still 0, has been trained since."""
        if not self._waiting:
            return False
        begun = torch.stack([matrix[rows].count_nonzero() for matrix, rows in self._waiting])
        if self.topology.tensor > 1:  # each rank sees its part
            dist.all_reduce(begun, group=self.topology.tensor_group)
        return bool(begun.any())

    @torch.no_grad()
    def prune(self, ratio: float) -> dict[nn.Parameter, Tensor]:
        """Update the masks so that ``ratio`` of the values in each group are pruned; return them by matrix.

        An untrained matrix is skipped, since all its values are 0 and cannot be ranked. Tensor-parallel ranks
        gather whole matrices, so that they prune the same values as one process.
        """
        prune = self.section.prune
        assert prune is not None
        whole: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        groups: dict[tuple[object, ...], list[tuple[int, str, slice]]] = {}
        self._waiting = []
        for number, (site, bank) in enumerate(self.banks):
            for name in prune.pruned:
                matrix = bank.get_parameter(name)
                if not matrix.requires_grad:
                    continue  # a frozen matrix is stored only once per run, so it must not change
                whole[number, name] = self._whole(bank, name), self._whole(bank, f"{name}{MASK}")
                for code, rows in self._pruned_rows(bank):
                    if is_untrained(*(each[rows] for each in whole[number, name])):
                        self._waiting.append((matrix, rows))
                        continue
                    keys = {
                        "matrix": (number, code),
                        "layer": (site.side, site.layer),
                        "language": (code,),
                    }
                    groups.setdefault((name, *keys[prune.over]), []).append((number, name, rows))
        for members in groups.values():
            values = [whole[number, name][0][rows] for number, name, rows in members]
            masks = [whole[number, name][1][rows] for number, name, rows in members]
            for (number, name, rows), mask in zip(members, smallest(values, masks, ratio), strict=True):
                whole[number, name][1][rows] = mask
        changed = {}
        for (number, name), (_, mask) in whole.items():
            bank = self.banks[number][1]
            own = bank.get_buffer(f"{name}{MASK}")
            if partition_dimension(own) is not None:
                mask = mask.chunk(self.topology.tensor, 1)[self.topology.tensor_rank]
            own.copy_(mask)
            changed[bank.get_parameter(name)] = own
        return changed

    def _pruned_rows(self, bank: LowRankBank) -> Iterator[tuple[str, slice]]:
        """Yield each language that is pruned, with its rows in a bank."""
        prune = self.section.prune
        assert prune is not None
        for code, rows in zip(self.languages.codes, bank.rows, strict=False):
            if rows.start < rows.stop and prune.prunes(code, self.languages):
                yield code, rows

    def _whole(self, bank: LowRankBank, name: str) -> Tensor:
        """Gather a whole matrix or mask [R, ...] from all tensor-parallel ranks."""
        own: Tensor = getattr(bank, name)
        if partition_dimension(own) is None:
            return own.clone()
        sent = own.to(torch.uint8) if own.dtype == torch.bool else own.contiguous()  # gloo sends no bool
        parts = [torch.empty_like(sent) for _ in range(self.topology.tensor)]
        dist.all_gather(parts, sent, group=self.topology.tensor_group)
        return torch.cat(parts, 1).to(own.dtype)

    def why_not(self, kind: str, weights: Tensors) -> str | None:
        return why_not(kind, self.recipe, self.section, weights)

    def analyze(self, kind: str, weights: Tensors) -> Findings:
        return ANALYSES[kind](self.recipe, self.section, weights)

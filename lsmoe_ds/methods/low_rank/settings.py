"""The section ``model.low_rank`` of a recipe, and the costs of low-rank matrices.

R is the sum of the ranks r of a bank's matrices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from lsmoe_ds.config.method import Held, MethodSection
from lsmoe_ds.config.places import PlaceList, Places, check_named, is_in, patterns_of
from lsmoe_ds.config.section import Positive
from lsmoe_ds.config.shapes import Count, LinearShape, MatrixProduct, Shape, SideName, shapes_of
from lsmoe_ds.directions import GROUPS, Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods.low_rank.checks import (
    check_index,
    check_modular,
    check_pivot,
    check_places,
    check_pruned,
    check_ranks,
    learns_weights_alone,
    notices_of,
)
from lsmoe_ds.methods.low_rank.pruning import Pruning

if TYPE_CHECKING:
    from lsmoe_ds.config.model import Model
    from lsmoe_ds.config.recipe import Recipe, Training

Kind = Literal["source", "target", "in", "out"]
Index = Literal["pair", "language", "source", "target", "learned", "modular"]
Rank = Annotated[int, Field(ge=0, lt=2**31)]
CHOSEN = {
    "pair": "pair",
    "language": "language",
    "source": "source language",
    "target": "target language",
    "learned": "source and each target language, weighted by layer",
    "modular": "language as input and each as output",
}


NOTHING_TO_WEIGHT = (
    "'training.trainable' names the weights of 'low_rank' alone, by which trained matrices are merged, but "
    "these would begin untrained, with a product of 0"
)


class Choice(NamedTuple):
    """One pair of matrices beside a linear layer, and which languages of a sentence choose them.

    ``name`` distinguishes two pairs beside one layer; it is empty for a single pair.
    """

    name: str
    vertical: Kind
    flat: Kind

    @property
    def kinds(self) -> tuple[Kind, Kind]:
        return self.vertical, self.flat


class LowRank(MethodSection):
    """Low-rank language-specific matrices beside linear layers: LMS ("Condensing Multilingual Knowledge",
    section 2) and language-specific LoRA ("Exploring Intrinsic Language-specific Subspaces", section 3).

    ``index`` says which languages choose the matrices: ``pair``, the source the vertical and the target the
    flat one; ``language``, the source in the encoder and the target in the decoder; ``source`` or ``target``;
    ``learned``, both, each with matrices of its own and weighted by two learned numbers of each layer;
    ``modular``, both, of which a direction into or out of ``pivot`` trains one alone, to be merged at
    translation (:mod:`lsmoe_ds.methods.low_rank.modular`) or by weights that ``merge: learned`` trains. Or a
    mapping of these to patterns (:mod:`lsmoe_ds.config.places`), of which the first that names a linear layer
    decides. ``rank`` is one number or, unless the index is ``pair``, one for each language or each of
    ``data.groups``; 0 gives none, and ``pivot`` has none. ``at`` places them, by patterns too, in every
    ``every``-th layer. ``columns`` limits them to the first inputs and outputs of a layer.

    Before training the matrices ``zero`` are 0 and the others are normal with the deviation ``init_std``.
    ``prune`` removes values during training. With ``fuse_distillation`` all languages share one more matrix
    pair, which learns from the specific ones (section 4 of the first paper).
    """

    name: ClassVar[str] = "low_rank"
    shared_route: ClassVar[str | None] = "fuse_distillation"
    by_language: ClassVar[tuple[str, ...]] = ("rank", "prune.languages")
    in_hosts: ClassVar[bool] = True

    rank: Rank | dict[str, Rank]
    index: Index | dict[Index, PlaceList] = "pair"
    at: Places = "feed_forward"
    every: Positive = 1
    columns: Positive | None = None
    pivot: str = "en"
    merge: Literal["learned"] | None = None
    zero: Literal["flat", "vertical"] = "flat"
    init_std: Annotated[float, Field(gt=0.0)] = 0.1
    prune: Pruning | None = None
    fuse_distillation: bool = False

    @property
    def ranks(self) -> list[int]:
        """List the ranks that the recipe gives."""
        return [self.rank] if isinstance(self.rank, int) else list(self.rank.values())

    @property
    def is_modular(self) -> bool:
        """Whether each language has input and output matrices (``index: modular``)."""
        return self.index == "modular"

    @property
    def needs_groups(self) -> bool:
        """Whether ranks are given for resource groups."""
        by_group = isinstance(self.rank, dict) and bool(self.rank.keys() & set(GROUPS))
        return by_group or (self.prune is not None and self.prune.needs_groups)

    def rank_of(self, code: str, languages: Languages) -> int:
        """Return the rank of a language's matrices; the pivot of modular LoRA has none."""
        if self.is_modular and code == self.pivot:
            return 0
        if isinstance(self.rank, int):
            return self.rank
        return self.rank[code if code in self.rank else languages.groups[code]]

    @property
    def shared_rank(self) -> int:
        """Return the rank of the shared matrices: the largest of all."""
        return max(self.ranks)

    def is_at(self, site: Shape) -> bool:
        """Tell whether a site has matrices beside it."""
        return (
            isinstance(site, LinearShape)
            and (site.layer + 1) % self.every == 0
            and is_in(site, patterns_of(self.at))
        )

    def index_at(self, site: LinearShape) -> Index:
        """Return the index of a site. Raises ValueError if no pattern names it."""
        return self.pattern_at(site)[0]

    def pattern_at(self, site: LinearShape) -> tuple[Index, str]:
        """Return the index of a site and the first pattern that gives it, or raise ValueError."""
        if not isinstance(self.index, dict):
            return self.index, "all"
        for index, patterns in self.index.items():
            for pattern in patterns:
                if is_in(site, [pattern]):
                    return index, pattern
        raise ValueError(
            f"'index' does not say which languages choose the matrices of {site.at}: add a pattern"
        )

    def choices(self, site: LinearShape) -> tuple[Choice, ...]:
        """Return the pairs of matrices beside a site: two if their weights are learned, otherwise one."""
        index = self.index_at(site)
        if index == "pair":
            return (Choice("", "source", "target"),)
        if index == "learned":
            return Choice("source", "source", "source"), Choice("target", "target", "target")
        if index == "modular":
            return Choice("in", "in", "in"), Choice("out", "out", "out")
        if index == "language":
            index = "target" if site.side == "decoder" else "source"
        return (Choice("", index, index),)

    def size(self, site: LinearShape) -> tuple[int, int]:
        """Return how many inputs a site's flat matrices read, and how many outputs its vertical ones have."""
        limit = self.columns or max(site.inputs, site.outputs)
        return min(site.inputs, limit), min(site.outputs, limit)

    def is_cut(self, site: LinearShape) -> bool:
        """Tell whether ``columns`` cuts the side of a site that tensor-parallel ranks split.

        Every rank then holds that side's matrix whole, because not every rank has a part of those columns.
        """
        inputs, outputs = self.size(site)
        return outputs < site.outputs if site.split == "column" else inputs < site.inputs

    @model_validator(mode="after")
    def _ranks(self) -> LowRank:
        if not self.ranks:
            raise ValueError("'rank' names no language: give one number, or one for each language or group")
        if not any(self.ranks):
            raise ValueError(
                "'rank' is 0 everywhere, which adds nothing: give a rank, or leave 'low_rank' out"
            )
        indexes = set(self.index) if isinstance(self.index, dict) else {self.index}
        if isinstance(self.rank, dict) and "pair" in indexes:
            raise ValueError(
                "'rank' differs by language, but with 'index: pair' any two languages meet: give one number, "
                "or 'index: language'"
            )
        if self.fuse_distillation and "learned" in indexes:
            raise ValueError(
                "'index: learned' and 'fuse_distillation' exclude each other: the shared matrices would have "
                "no language to be weighted by; leave one out"
            )
        if "modular" in indexes:
            check_modular(self)
        elif self.merge is not None:
            raise ValueError("'merge' is for 'index: modular': leave it out")
        elif self.pivot != "en":  # stored recipes have this default with every index
            raise ValueError("'pivot' is for 'index: modular': leave it out")
        if self.fuse_distillation and self.prune is not None:
            raise ValueError("'prune' and 'fuse_distillation' exclude each other: leave one out")
        return self

    def takes(self, route: str) -> bool:
        """Tell whether a route names a way to merge modular matrices."""
        from lsmoe_ds.methods.low_rank.modular import parse_route  # needs torch

        merge = parse_route(route) if self.is_modular else None
        return merge is not None and (merge.by == "outputs" or len({*self.ranks}) == 1)

    @property
    def own_routes(self) -> tuple[str, ...]:
        same = ("matrices-W-W",) if len({*self.ranks}) == 1 else ()
        return ("in", "out", "outputs-W-W", *same) if self.is_modular else ()

    def check(self, model: Model) -> None:
        linears = [site for site in shapes_of(model) if isinstance(site, LinearShape)]
        sites = [site for site in linears if self.is_at(site)]
        check_places(self, sites, model)
        indexed = [*self.index.values()] if isinstance(self.index, dict) else []
        check_named(chain(patterns_of(self.at), *indexed), linears, "linear layer", model)
        check_index(self, sites)
        if model.teaches:
            raise ValueError(
                "'low_rank' and 'moe.fuse_distillation' exclude each other: low-rank matrices distill by "
                "another loss, or have nothing for the shared route: leave one out"
            )

    def check_languages(self, languages: Languages) -> None:
        check_pivot(self, languages)
        if self.prune is not None:
            self.prune.check_languages(languages)
        if self.needs_groups and not languages.groups:
            return  # 'data.groups' has thresholds: groups are known once data are prepared
        check_ranks(self, languages)
        if self.prune is not None:
            check_pruned(self, self.prune, languages)

    def stand_in(self, direction: Direction, languages: Languages) -> Direction | None:
        """Return None: languages choose matrices. Raises ValueError if weights are learned per direction."""
        if self.is_modular and self.merge is not None:
            raise ValueError("'merge: learned' has no weights for it: merge by a route, as in outputs-1-1")
        return None

    def notices(self, recipe: Recipe) -> Iterator[str]:
        return notices_of(self, recipe)

    def choosing(self, model: Model) -> Any:
        return {
            site.at: (self.size(site), [tuple(choice) for choice in self.choices(site)])
            for site in shapes_of(model)
            if isinstance(site, LinearShape) and self.is_at(site)
        }

    def holdings(self, languages: Languages) -> dict[str, int]:
        return {code: self.rank_of(code, languages) for code in languages.codes}

    def check_training(self, training: Training) -> None:
        if training.start_from is None and learns_weights_alone(self, training):
            raise ValueError(f"{NOTHING_TO_WEIGHT}: give the trained model as 'training.start_from'")
        if self.prune is not None and self.prune.epochs is None:
            self.prune.check_end(training.steps, "'training.steps'")

    def check_takes_over(self, trained: LowRank) -> None:
        was = () if trained.prune is None else trained.prune.pruned
        if lost := set(was) - set(() if self.prune is None else self.prune.pruned):
            raise UserError(
                f"its {' and '.join(sorted(lost))} matrices are pruned, which those of the recipe would not "
                "be: give it a 'low_rank.prune' of the same 'matrices'"
            )

    def check_begin(self, recipe: Recipe) -> None:
        if learns_weights_alone(self, recipe.training):
            raise UserError(f"{NOTHING_TO_WEIGHT}, and the model in 'training.start_from' has none")

    def build(self, recipe: Recipe, topology: Any) -> Any:
        from lsmoe_ds.methods.low_rank.method import LowRankMatrices

        return LowRankMatrices(self, recipe, topology)

    def rank_sum(self, languages: Languages, held: Held = "all") -> int:
        """Return R, the sum of the ranks of the ``held`` matrices (LMS, sections 2.2 and 4)."""
        codes = languages.codes if held in ("all", "specific") else ()
        specific = sum(self.rank_of(code, languages) for code in codes)
        return specific + (self.shared_rank if self.fuse_distillation and held in ("all", "shared") else 0)

    def count(self, site: LinearShape, languages: Languages, held: Held = "all") -> Count:
        """Count flat, R inputs, and vertical, R outputs, of each pair of matrices.

        Tensor parallelism splits the vertical matrix of a column-parallel layer and the flat one of a
        row-parallel layer.
        """
        total = self.rank_sum(languages, held) * len(self.choices(site))
        inputs, outputs = self.size(site)
        split, whole = (outputs, inputs) if site.split == "column" else (inputs, outputs)
        return (
            Count(whole=total * (split + whole)) if self.is_cut(site) else Count(total * split, total * whole)
        )

    def count_masks(self, site: LinearShape, languages: Languages) -> Count:
        """Count the mask values of prunable matrices, split over ranks as in :meth:`count`."""
        total, found = self.rank_sum(languages) * len(self.choices(site)), Count()
        for name, width, split in zip(("flat", "vertical"), self.size(site), ("row", "column"), strict=True):
            if self.prune is not None and name in self.prune.pruned:
                is_split = site.split == split and not self.is_cut(site)
                found += Count(split=total * width) if is_split else Count(whole=total * width)
        return found

    def learns(self, model: Model, side: SideName) -> bool:
        """Tell whether layers of this side learn the weights of two pairs of matrices."""
        if self.is_modular and self.merge is None:
            return False
        sites = (site for site in shapes_of(model) if site.side == side and self.is_at(site))
        return any(isinstance(site, LinearShape) and len(self.choices(site)) > 1 for site in sites)

    def count_side(self, side: SideName, model: Model, languages: Languages) -> Count:
        """Count the two weights of each layer; in modular LoRA, of each layer and direction."""
        layers = (model.encoder if side == "encoder" else model.decoder).layers
        each = len(languages.directions) if self.is_modular else 1
        return Count(whole=2 * layers * each * self.learns(model, side))

    def products(self, site: LinearShape) -> list[MatrixProduct]:
        """List the products of each pair, 2 r inputs and 2 r outputs, where r is the largest rank."""
        (inputs, outputs), choices = self.size(site), self.choices(site)
        learned = len(choices) > 1 and (not self.is_modular or self.merge is not None)
        weights = (f"{site.side}_{self.name}.index",) if learned else ()
        found = []
        for choice in choices:
            at = f"{site.at}_{self.name}.{choice.name}{'.' if choice.name else ''}"
            found += [
                MatrixProduct(2 * self.shared_rank * inputs, f"{at}flat", weights),
                MatrixProduct(2 * self.shared_rank * outputs, f"{at}vertical", reads="before"),
            ]
        return found

    def values(self, site: LinearShape, tensor: int) -> int:
        """Count the stored values: the flat products, r; for a split row-parallel layer also its outputs."""
        stored = self.shared_rank * len(self.choices(site))
        return stored + (site.outputs if site.split == "row" and tensor > 1 else 0)

    def figures(self, model: Model, languages: Languages) -> dict[str, int]:
        """Count all matrices; if ``columns`` cut them, also uncut; and the values that pruning leaves."""
        sites = [site for site in shapes_of(model) if isinstance(site, LinearShape) and self.is_at(site)]

        def total(section: LowRank) -> int:
            return sum(section.count(site, languages).total for site in sites)

        found = {"low-rank matrices": total(self)}
        wide = total(self.model_copy(update={"columns": None}))
        if wide > found["low-rank matrices"]:
            found["without 'columns'"] = wide
        if self.prune is not None:
            pruned = self._prunable(self.prune, sites, languages).values()
            left = found["low-rank matrices"] - sum(round(self.prune.ratio * values) for values in pruned)
            found["left after pruning"] = left
        return found

    def _prunable(
        self, prune: Pruning, sites: Sequence[LinearShape], languages: Languages
    ) -> Counter[tuple[object, ...]]:
        """Count the values of each group of matrices that are pruned together."""
        groups: Counter[tuple[object, ...]] = Counter()
        for site in sites:
            widths = dict(zip(("flat", "vertical"), self.size(site), strict=True))
            for choice in self.choices(site):
                for code in (code for code in languages.codes if prune.prunes(code, languages)):
                    keys = {
                        "matrix": (site.at, choice.name, code),
                        "layer": (site.side, site.layer),
                        "language": (code,),
                    }
                    for name in prune.pruned:
                        groups[name, *keys[prune.over]] += self.rank_of(code, languages) * widths[name]
        return groups

    def describe(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        indexes = list(self.index) if isinstance(self.index, dict) else [self.index]
        by = " or ".join(CHOSEN[index] for index in indexes)
        at = {"feed_forward": "feed-forwards", "attention": "attentions"}
        everywhere = "feed-forwards and attentions"
        places = ", ".join(
            at.get(each, everywhere if each in ("all", "both") else each) for each in patterns_of(self.at)
        )
        by = f"language {by}" if by == "pair" else by
        pruned = "" if self.prune is None else f", {self.prune.ratio:.0%} pruned"
        return f"low-rank matrices of each {by} ({rank}{pruned}) beside its {places}"

"""The section ``model.low_rank`` of a recipe, and the costs of low-rank matrices.

R is the sum of the ranks r of a bank's matrices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lsmoe_ds.config.method import Held, MethodSection
from lsmoe_ds.config.section import Positive
from lsmoe_ds.config.shapes import Count, LinearShape, Shape
from lsmoe_ds.languages import Languages

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Model, Recipe

PLACES = {"feed_forward": "feed-forwards", "attention": "attentions", "both": "feed-forwards and attentions"}


class LowRank(MethodSection):
    """Low-rank language-specific matrices beside linear layers (LMS, "Condensing Multilingual Knowledge",
    section 2).

    ``index`` says which languages choose the matrices: ``pair``, the source and the target; ``language``, the
    source in the encoder and the target in the decoder. ``rank`` is one number, or with ``index: language``
    one number for each language. ``init_std`` is the standard deviation of the vertical matrices before
    training; flat matrices start at 0. ``at`` places them beside the dense feed-forwards, the attentions or
    both, in every ``every``-th layer. With ``fuse_distillation`` all languages share one more matrix pair,
    which learns from the specific ones (section 4).
    """

    name: ClassVar[str] = "low_rank"
    shared_route: ClassVar[str | None] = "fuse_distillation"
    by_language: ClassVar[tuple[str, ...]] = ("rank",)

    rank: Positive | dict[str, Positive]
    index: Literal["pair", "language"] = "pair"
    at: Literal["feed_forward", "attention", "both"] = "feed_forward"
    every: Positive = 1
    init_std: Annotated[float, Field(gt=0.0)] = 0.1
    fuse_distillation: bool = False

    @property
    def ranks(self) -> list[int]:
        """List the ranks that the recipe gives."""
        return [self.rank] if isinstance(self.rank, int) else list(self.rank.values())

    def rank_of(self, language: str) -> int:
        """Return the rank of a language's matrices."""
        return self.rank if isinstance(self.rank, int) else self.rank[language]

    @property
    def shared_rank(self) -> int:
        """Return the rank of the shared matrices: the largest of all."""
        return max(self.ranks)

    def is_at(self, site: Shape) -> bool:
        """Tell whether a site has matrices beside it."""
        if not isinstance(site, LinearShape) or (site.layer + 1) % self.every:
            return False
        return self.at in (site.sublayer.removeprefix("cross_"), "both")

    @model_validator(mode="after")
    def _ranks(self) -> LowRank:
        if not self.ranks:
            raise ValueError("'rank' names no language: give one number, or one for each language")
        if isinstance(self.rank, dict) and self.index == "pair":
            raise ValueError(
                "'rank' differs by language, but with 'index: pair' any two languages meet: give one number, "
                "or 'index: language'"
            )
        return self

    def check(self, model: Model) -> None:
        sides = (model.encoder, model.decoder)
        layers = [(side, i) for side in sides for i in range(side.layers) if (i + 1) % self.every == 0]
        if self.at == "feed_forward" and all(side.is_moe(i) for side, i in layers):
            raise ValueError(
                f"'at: feed_forward' puts matrices beside feed-forwards without experts, but with 'every: "
                f"{self.every}' no layer has one: choose another 'every', or 'at: attention'"
            )
        if model.teaches:
            raise ValueError(
                "'low_rank' and 'moe.fuse_distillation' exclude each other: low-rank matrices distill by "
                "another loss, or have nothing for the shared route: leave one out"
            )

    def check_languages(self, languages: Languages) -> None:
        if not isinstance(self.rank, dict):
            return
        named, known = set(self.rank), set(languages.codes)
        if wrong := sorted(named ^ known):
            raise ValueError(
                f"'low_rank.rank' {'lacks' if wrong[0] in known else 'names'} {wrong[0]}: it must have each "
                f"of {', '.join(sorted(known))}"
            )

    def build(self, recipe: Recipe, topology: Any) -> Any:
        from lsmoe_ds.methods.low_rank.method import LowRankMatrices

        return LowRankMatrices(self, recipe, topology)

    def rank_sum(self, languages: Languages, held: Held = "all") -> int:
        """Return R, the sum of the ranks of the ``held`` matrices (the paper's sections 2.2 and 4)."""
        specific = sum(self.rank_of(code) for code in languages.codes) if held in ("all", "specific") else 0
        return specific + (self.shared_rank if self.fuse_distillation and held in ("all", "shared") else 0)

    def count(self, site: LinearShape, languages: Languages, held: Held = "all") -> Count:
        """Count flat, R inputs, and vertical, R outputs.

        Tensor parallelism splits the vertical matrix of a column-parallel layer and the flat one of a
        row-parallel layer.
        """
        total = self.rank_sum(languages, held)
        split, whole = (site.outputs, site.inputs) if site.split == "column" else (site.inputs, site.outputs)
        return Count(split=total * split, whole=total * whole)

    def flops(self, site: LinearShape) -> int:
        """Count the operations, 2 r (inputs + outputs), with the largest rank of a language."""
        return 2 * self.shared_rank * (site.inputs + site.outputs)

    def values(self, site: LinearShape, tensor: int) -> int:
        """Count the stored values: the flat product, r, and beside a split row linear also the outputs."""
        return self.shared_rank + (site.outputs if site.split == "row" and tensor > 1 else 0)

    def describe(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        by = "language pair" if self.index == "pair" else "language"
        return f"low-rank matrices of each {by} ({rank}) beside its {PLACES[self.at]}"

"""The section ``model.clsr`` of a recipe, and the costs of gates and projections.

H hidden, L languages, G units of a gate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lsmoe_ds.config.method import Chart, Held, MethodSection
from lsmoe_ds.config.section import Positive
from lsmoe_ds.config.shapes import (
    Count,
    MatrixProduct,
    Shape,
    SideName,
    Sublayer,
    SublayerShape,
    shapes_of,
)
from lsmoe_ds.directions import Languages

if TYPE_CHECKING:
    from lsmoe_ds.config.model import Model
    from lsmoe_ds.config.recipe import Recipe


class Clsr(MethodSection):
    """Conditional language-specific routing after each sublayer (CLSR; :mod:`lsmoe_ds.methods.clsr.method`).

    A gate with ``gate`` hidden units chooses for each token between the projection of its language and a
    projection for all languages. A loss with the weight ``weight`` pulls the mean gate of a step to
    ``budget``. If ``shared``, all sublayers of a side share one set of language projections (CLSR); otherwise
    each sublayer has its own (CLSR*). ``at`` names the sublayers that have gates.
    """

    name: ClassVar[str] = "clsr"
    unmergeable: ClassVar[str | None] = (
        "the gates of model.clsr choose between two projections for each token at run time, so no dense "
        "model computes the same: serve the trained model itself"
    )
    reads_states: ClassVar[bool] = True

    budget: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    shared: bool = True
    gate: Positive = 128
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    at: Annotated[tuple[Sublayer, ...], Field(min_length=1)] = (
        "attention",
        "cross_attention",
        "feed_forward",
    )

    def is_at(self, site: Shape) -> bool:
        """Tell whether a gate follows a site."""
        return isinstance(site, SublayerShape) and site.sublayer in self.at

    def gates(self, model: Model, side: SideName) -> int:
        """Count the gates of a side."""
        return sum(self.is_at(site) and site.side == side for site in shapes_of(model))

    def check(self, model: Model) -> None:
        if model.distills:
            raise ValueError("'clsr' has nothing to distill: leave it out, or 'fuse_distillation'")

    def holdings(self, languages: Languages) -> dict[str, int]:
        return dict.fromkeys(languages.codes, 1)

    def build(self, recipe: Recipe, topology: Any) -> Any:
        from lsmoe_ds.methods.clsr.method import ConditionalLanguageSpecificRouting

        return ConditionalLanguageSpecificRouting(self, recipe, topology)

    def count(self, site: SublayerShape, languages: Languages, held: Held = "all") -> Count:
        """Count the gate, (H + 2) G, and a sublayer's own W_lang, L H^2, if any."""
        specific = 0 if self.shared else len(languages.codes) * site.hidden**2
        return Count(whole=(site.hidden + 2) * self.gate + specific)

    def count_side(self, side: SideName, model: Model, languages: Languages) -> Count:
        """Count W_shared, H^2, and if the sublayers share W_lang also L H^2."""
        if not self.gates(model, side):
            return Count()
        return Count(whole=model.hidden**2 * (1 + len(languages.codes) * self.shared))

    def largest(self, model: Model, languages: Languages) -> int:
        return len(languages.codes) * model.hidden**2

    def products(self, site: SublayerShape) -> list[MatrixProduct]:
        """List the matrix products: the gate, 2 G H and 2 G operations, and both projections, 2 H^2 each."""
        own, side, square = f"{site.at}_{self.name}", f"{site.side}_{self.name}", 2 * site.hidden**2
        first = f"{own}.gate.0"
        return [
            MatrixProduct(2 * self.gate * site.hidden, f"{first}.weight", (f"{first}.bias",)),
            MatrixProduct(2 * self.gate, f"{own}.gate.2.weight", reads="before"),
            MatrixProduct(square, f"{side if self.shared else own}.specific", reads="output"),
            MatrixProduct(square, f"{side}.shared", reads="output"),
        ]

    def values(self, site: SublayerShape, tensor: int) -> int:
        """Count the stored values, 3 H + G + 1: output, its two products, gate and its hidden units."""
        return 3 * site.hidden + self.gate + 1

    def describe(self) -> str:
        return "gates between each language's projection and a shared one (CLSR)"

    def charts(self) -> list[Chart]:
        return [Chart(f"Mean gate; dashed its budget, {self.budget:g}", "gates", self.budget)]

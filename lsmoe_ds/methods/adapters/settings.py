"""The section ``model.adapters`` of a recipe, and the costs of adapters.

N adapters at a layer, H hidden, W width of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lsmoe_ds.config.method import Held, MethodSection
from lsmoe_ds.config.places import Places, check_named, is_in, patterns_of
from lsmoe_ds.config.section import Positive
from lsmoe_ds.config.shapes import (
    Count,
    LayerShape,
    MatrixProduct,
    Shape,
    SideName,
    attention_linears,
    count_feed_forward,
    count_linears,
    shapes_of,
)
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import UNKNOWN, family, is_english

if TYPE_CHECKING:
    from lsmoe_ds.config.model import Model
    from lsmoe_ds.config.recipe import Recipe

By = Literal["pair", "family", "language"]
BETWEEN = " - "  # the families of a direction, in the name of its adapter


class Adapters(MethodSection):
    """Bottleneck adapters after layers ("Simple, Scalable Adaptation for Neural Machine Translation", 2019).

    An adapter with ``width`` hidden units has its own norm and residual. ``by`` says whose it is: of each
    ``pair`` of languages, in this direction; of each pair of families (English is one by itself), in this
    direction; or of each ``language``, the source in the encoder and the target in the decoder. ``families``
    are lists of languages, by default those of the table of languages; a language in no list is a family by
    itself. ``at`` names layers by patterns (:mod:`lsmoe_ds.config.places`).
    """

    name: ClassVar[str] = "adapters"
    by_language: ClassVar[tuple[str, ...]] = ("families.*",)

    width: Positive = 128
    by: By = "pair"
    families: Mapping[str, Annotated[list[str], Field(min_length=1)]] | None = None
    at: Places = "all"

    def is_at(self, site: Shape) -> bool:
        """Tell whether adapters follow a layer."""
        return isinstance(site, LayerShape) and is_in(site, patterns_of(self.at))

    @model_validator(mode="after")
    def _families(self) -> Adapters:
        if self.families is not None and self.by != "family":
            raise ValueError(f"'families' lists families, but 'by' is {self.by}: leave one out")
        return self

    def check(self, model: Model) -> None:
        sites = [site for site in shapes_of(model) if isinstance(site, LayerShape)]
        check_named(patterns_of(self.at), sites, "layer", model)
        if model.distills:
            raise ValueError("'adapters' has nothing to distill: leave it out, or 'fuse_distillation'")

    def check_languages(self, languages: Languages) -> None:
        if joined := next((name for name in self.families or () if BETWEEN in name), None):
            raise ValueError(
                f"'adapters.families' has a family '{joined}', but '{BETWEEN}' stands between two families "
                "in the names of adapters: give it another name"
            )
        named = [code for codes in (self.families or {}).values() for code in codes]
        if twice := next((code for code in named if named.count(code) > 1), None):
            raise ValueError(f"'adapters.families' has {twice} twice: a language is in one family")
        if alike := sorted(set(self.families or ()) & set(languages.codes)):
            raise ValueError(
                f"'adapters.families' has a family '{alike[0]}', which is the code of a language: give it "
                "another name"
            )
        if wrong := sorted(set(named) - set(languages.codes)):
            raise ValueError(
                f"'adapters.families' names {wrong[0]}: it may have {', '.join(languages.codes)}"
            )

    def check_grown(self, before: Adapters, languages: Languages) -> None:
        """Raise UserError if a language's family has changed, so that it would use others' adapters."""
        for code in languages.codes if self.by == "family" else ():
            if (was := before.family_of(code)) != (now := self.family_of(code)):
                raise UserError(
                    f"'model.adapters' moves {code} from the family '{was}' to '{now}', whose adapters have "
                    "not learned it: a language that the model has keeps its family"
                )

    def family_of(self, code: str) -> str:
        """Return the name of a language's family."""
        if self.families is not None:
            return next((name for name, codes in self.families.items() if code in codes), code)
        return code if is_english(code) or family(code) == UNKNOWN else family(code)

    def holders(self, languages: Languages) -> list[str]:
        """Name the adapter of each direction, by its number; with ``by: language``, of each language."""
        if self.by == "language":
            return list(languages.codes)
        return [self.holder(direction) for direction in languages.directions]

    def holder(self, direction: Direction) -> str:
        """Name the adapter that a direction uses, with ``by: pair`` or ``by: family``."""
        if self.by == "pair":
            return str(direction)
        return f"{self.family_of(direction.source)}{BETWEEN}{self.family_of(direction.target)}"

    def kind(self, side: SideName) -> str:
        """Return the task (direction or language) that chooses a sentence's adapter on a side."""
        if self.by != "language":
            return "pair"
        return "target" if side == "decoder" else "source"

    def choosing(self, model: Model) -> Any:
        return [site.at for site in shapes_of(model) if self.is_at(site)], self.by

    def stand_in(self, direction: Direction, languages: Languages) -> Direction | None:
        """Return the first of the languages' directions that uses the same adapter; None if languages choose.

        Raises ValueError if there is none.
        """
        if self.by == "language":
            return None
        wanted = self.holder(direction)
        found = next((each for each in languages.directions if self.holder(each) == wanted), None)
        if found is None:
            raise ValueError(f"no adapter of {wanted} was trained: train it, or use 'by: language'")
        return found

    def holdings(self, languages: Languages) -> dict[str, int]:
        if self.by == "language":
            return dict.fromkeys(languages.codes, self.width)
        return {f"{each} ({self.holder(each)})": self.width for each in languages.directions}

    def build(self, recipe: Recipe, topology: Any) -> Any:
        from lsmoe_ds.methods.adapters.method import BottleneckAdapters

        return BottleneckAdapters(self, recipe, topology)

    def one(self, hidden: int) -> int:
        """Count the parameters of one adapter: 2 H W + W + 3 H."""
        return 2 * hidden * self.width + self.width + 3 * hidden

    def count(self, site: LayerShape, languages: Languages, held: Held = "all") -> Count:
        return Count(whole=len(set(self.holders(languages))) * self.one(site.hidden))

    def count_served(self, site: LayerShape) -> Count:
        """Count the layer that an adapter becomes: attentions that output 0, and its feed-forward."""
        attentions = 2 if site.side == "decoder" else 1
        found = count_feed_forward(site.hidden, self.width) + Count(whole=2 * site.hidden)
        for _ in range(attentions):
            found += count_linears(attention_linears(site.hidden)) + Count(whole=2 * site.hidden)
        return found

    def largest(self, model: Model, languages: Languages) -> int:
        return len(set(self.holders(languages))) * self.width * model.hidden

    def products(self, site: LayerShape) -> list[MatrixProduct]:
        """List both matrix products of an adapter, 2 W H operations each."""
        own, flops = f"{site.at}_{self.name}", 2 * self.width * site.hidden
        beside = tuple(f"{own}.{name}" for name in ("scale", "shift"))
        return [
            MatrixProduct(flops, f"{own}.down", (*beside, f"{own}.inner")),
            MatrixProduct(flops, f"{own}.up", (f"{own}.outer",), reads="before"),
        ]

    def values(self, site: LayerShape, tensor: int) -> int:
        """Count the stored values, 3 H + 2 W: in and out of the norm, its scaled output, and the units."""
        return 3 * site.hidden + 2 * self.width

    def describe(self) -> str:
        return f"adapters of each {self.by} after its layers (width {self.width})"

"""The section ``model.neurons`` of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lsmoe_ds.config.method import MethodSection
from lsmoe_ds.config.places import Places, check_named, is_in, patterns_of
from lsmoe_ds.config.section import Positive
from lsmoe_ds.config.shapes import Count, Shape, UnitsShape, shapes_of
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError

if TYPE_CHECKING:
    from lsmoe_ds.config.model import Model
    from lsmoe_ds.config.recipe import Recipe, Training

Per = Literal["sentence", "token"]
Removed = Literal["units", "rows"]


def kept_at_random(units: int, part: float) -> int:
    """Return how many random units of a layer each direction keeps: ``part`` of them, at least one."""
    return max(round(part * units), 1)


class Neurons(MethodSection):
    """Masks of the hidden units of feed-forwards, one for each direction ("Neuron Specialization", 2024).

    Before the first step, the model from which the training starts reads the dev set, up to ``pairs`` of each
    direction, and counts in how many sentences, or at how many tokens (``per``), each unit is active. Each
    direction keeps the most active units of a layer that together have ``share`` percent of the activations
    (equation 1). With ``random`` each keeps that part of the units at random instead.

    ``remove`` says what a mask takes away: whole ``units``, or ``rows`` of the first weight (equation 3), so
    that a unit keeps the value relu of its bias. ``at`` names layers by patterns
    (:mod:`lsmoe_ds.config.places`). A direction without dev text has the mask of the first one with the same
    target, or of the one that ``like`` names.
    """

    name: ClassVar[str] = "neurons"
    trains: ClassVar[bool] = False
    by_direction: ClassVar[tuple[str, ...]] = ("like",)

    share: Annotated[float, Field(ge=0.0, le=100.0)] = 95.0
    per: Per = "sentence"
    pairs: Positive | None = None
    random: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    remove: Removed = "units"
    at: Places = "feed_forward"
    like: Mapping[str, str] = Field(default_factory=dict)

    @property
    def reads_dev(self) -> bool:
        return self.random is None

    def is_at(self, site: Shape) -> bool:
        """Tell whether the units of a site have masks."""
        return isinstance(site, UnitsShape) and is_in(site, patterns_of(self.at))

    @model_validator(mode="after")
    def _one_choice(self) -> Neurons:
        if self.random is not None:
            fields = {key: type(self).model_fields[key] for key in ("share", "per", "pairs", "like")}
            defaults = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
            given = [key for key, default in defaults.items() if getattr(self, key) != default]
            if given:
                raise ValueError(
                    f"'{given[0]}' says how activations choose units, but 'random' chooses them without: "
                    "leave one out"
                )
        return self

    def check(self, model: Model) -> None:
        sites = [site for site in shapes_of(model) if isinstance(site, UnitsShape)]
        check_named(patterns_of(self.at), sites, "feed-forward without experts", model)
        if model.distills:
            raise ValueError("'neurons' has nothing to distill: leave it out, or 'fuse_distillation'")

    def check_languages(self, languages: Languages) -> None:
        self.named(languages)

    def named(self, languages: Languages) -> dict[int, int]:
        """Return ``like`` with directions as numbers. Raises ValueError for an unknown direction."""
        found: dict[int, int] = {}
        for new, known in self.like.items():
            try:
                one, other = (languages.direction_id(Direction.parse(each)) for each in (new, known))
            except UserError as error:
                raise ValueError(f"'neurons.like': {error}") from None
            if one == other or one in found:
                raise ValueError(f"'neurons.like' names {new} {'for itself' if one == other else 'twice'}")
            found[one] = other
        return found

    def check_training(self, training: Training) -> None:
        if self.random is None and training.start_from is None:
            raise ValueError(
                "'neurons' records what a trained model activates, but there is no 'training.start_from': "
                "give a model to start from, or 'random'"
            )

    def notices(self, recipe: Recipe) -> Iterator[str]:
        if self.random is None and 0 < self.share <= 1:
            yield (
                f"model.neurons.share is {self.share:g} percent of the activations, of which few units have "
                "that many: 95 is 95 percent"
            )

    def choosing(self, model: Model) -> Any:
        how = (self.share, self.per, self.pairs) if self.random is None else self.random
        return [site.at for site in shapes_of(model) if self.is_at(site)], self.remove, how

    def check_takes_over(self, trained: Neurons) -> None:
        if dict(self.like) != dict(trained.like):
            is_now, was_then = (
                ", ".join(f"{new}: {known}" for new, known in like.items()) or "not set"
                for like in (self.like, trained.like)
            )
            raise UserError(
                f"'model.neurons.like' is {is_now}, but the model has learned with {was_then}: leave it as "
                "it is"
            )

    def stand_in(self, direction: Direction, languages: Languages) -> Direction:
        """Return the first direction with the same target."""
        found = languages.same_target(direction)
        if found is None:
            raise ValueError(
                f"no direction into {direction.target} was trained, whose neurons {direction} could have"
            )
        return found

    def holdings(self, languages: Languages) -> dict[str, int]:
        return {str(direction): 1 for direction in languages.directions}

    @property
    def served_at_most(self) -> bool:
        return self.random is None and self.share < 100

    def count_served(self, site: UnitsShape) -> Count:
        """Subtract the masked units, 2 H + 1 parameters each, if their number is known before training."""
        gone = 0 if self.random is None else site.units - kept_at_random(site.units, self.random)
        return Count(split=-gone * (2 * site.hidden + 1))

    def count_masks(self, site: UnitsShape, languages: Languages) -> Count:
        return Count(split=len(languages.directions) * site.units)

    def build(self, recipe: Recipe, topology: Any) -> Any:
        from lsmoe_ds.methods.neurons.method import NeuronSpecialization

        return NeuronSpecialization(self, recipe, topology)

    def describe(self) -> str:
        which = f"{self.random:.0%} at random" if self.random else f"{self.share:g} % of activations"
        return f"masks of each direction on its feed-forwards' units ({which})"

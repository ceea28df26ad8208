"""The section ``model.lass`` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lsmoe_ds.config.method import MethodSection
from lsmoe_ds.config.places import Places, check_named, is_in, patterns_of
from lsmoe_ds.config.shapes import Count, LinearShape, Shape, shapes_of
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import listed

if TYPE_CHECKING:
    from lsmoe_ds.config.model import Model
    from lsmoe_ds.config.recipe import Recipe, Training


class Lass(MethodSection):
    """A sub-network of linear layers for each direction ("Learning Language Specific Sub-network for
    Multilingual Machine Translation", 2021).

    ``tuned`` is a folder with a model for each direction, DIRECTION/ (such as en-de/), fine-tuned on it alone
    from the model from which the training starts: runs or converted folders. Of each weight a direction keeps
    the values whose magnitude after its fine-tuning is above that of the ``ratio`` smallest. Biases are
    shared. ``at`` places the masks, by patterns (:mod:`lsmoe_ds.config.places`).
    """

    name: ClassVar[str] = "lass"
    trains: ClassVar[bool] = False

    tuned: Path
    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.7
    at: Places = "all"

    @property
    def begins(self) -> bool:
        return True

    def is_at(self, site: Shape) -> bool:
        """Tell whether a linear layer has masks."""
        return isinstance(site, LinearShape) and is_in(site, patterns_of(self.at))

    def check(self, model: Model) -> None:
        sites = [site for site in shapes_of(model) if isinstance(site, LinearShape)]
        check_named(patterns_of(self.at), sites, "linear layer", model)
        if model.distills:
            raise ValueError("'lass' has nothing to distill: leave it out, or 'fuse_distillation'")

    def check_training(self, training: Training) -> None:
        if training.start_from is None:
            raise ValueError(
                "'lass' finds the sub-networks of a trained model, but there is no 'training.start_from': "
                "give the model from which those in 'tuned' were fine-tuned"
            )

    def check_begin(self, recipe: Recipe) -> None:
        lacking = [str(d) for d in recipe.languages.directions if not (self.tuned / str(d)).is_dir()]
        if lacking:
            raise UserError(
                f"'model.lass.tuned' is {self.tuned}, which has no folder {lacking[0]}: it must have a model "
                "for each direction, fine-tuned on it alone (training.directions)"
            )
        from lsmoe_ds.checkpoint.run_folder import weights_digest
        from lsmoe_ds.checkpoint.stored import find_model, start_of  # imports torch

        base = recipe.training.start_from
        assert base is not None
        for direction in map(str, recipe.languages.directions):
            try:
                stored = find_model(self.tuned / direction)
            except UserError as error:
                raise UserError(f"'model.lass.tuned' has no model of {direction}: {error}") from None
            if weights_digest(base) in {weights_digest(stored.home)} - {None}:
                raise UserError(
                    f"'model.lass.tuned': {self.tuned / direction} has the weights of 'training.start_from', "
                    f"{base}: fine-tune them on {direction} alone"
                )
            if (start := start_of(stored)) is not None and start != weights_digest(base):
                how = "began with other weights than those" if start else "began with new weights, not those"
                raise UserError(
                    f"'model.lass.tuned': the training of {self.tuned / direction} {how} of "
                    f"'training.start_from', {base}: fine-tune that model"
                )
            # A model of all directions would give each of them the same masks.
            if (trained := [str(each) for each in stored.recipe.trained]) != [direction]:
                raise UserError(
                    f"'model.lass.tuned': {self.tuned / direction} was trained on {listed(trained)}, not on "
                    f"{direction} alone: set 'training.directions' to it"
                )

    def choosing(self, model: Model) -> Any:
        return [site.at for site in shapes_of(model) if self.is_at(site)], self.ratio

    def stand_in(self, direction: Direction, languages: Languages) -> Direction:
        """Return the first direction with the same target."""
        found = languages.same_target(direction)
        if found is None:
            raise ValueError(
                f"no direction into {direction.target} was trained, whose sub-network {direction} could have"
            )
        return found

    def holdings(self, languages: Languages) -> dict[str, int]:
        return {str(direction): 1 for direction in languages.directions}

    def count_masks(self, site: LinearShape, languages: Languages) -> Count:
        return Count(split=len(languages.directions) * site.inputs * site.outputs)

    def build(self, recipe: Recipe, topology: Any) -> Any:
        from lsmoe_ds.methods.lass.method import LanguageSpecificSubNetworks

        return LanguageSpecificSubNetworks(self, recipe, topology)

    def describe(self) -> str:
        return f"a sub-network of each direction, {1 - self.ratio:.0%} of the weights (LaSS)"

"""Gradual pruning of low-rank matrices ("Exploring Intrinsic Language-specific Subspaces", section 3.2 and
appendix A): the section of a recipe, and the schedule.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lsmoe_ds.config.section import Positive, Section
from lsmoe_ds.directions import GROUPS, Languages


class Pruning(Section):
    """Remove the values of smallest magnitude, more and more of them (equation 6).

    A training is cut into ``epochs`` equal parts, or into its steps if that is left out. Nothing is pruned in
    the first ``start`` of them; during the next ``length`` the pruned part rises to ``ratio``, where it
    stays. The values of all matrices ``over`` which they are compared are pruned together: of each ``matrix``
    by itself, of all languages in a ``layer``, or of one ``language`` in all layers. ``matrices`` are the
    ``vertical`` ones (B of LoRA), or ``both``. ``languages`` lists codes or groups; without it all are
    pruned.
    """

    ratio: Annotated[float, Field(gt=0.0, lt=1.0)]
    start: Annotated[int, Field(ge=0)] = 2
    length: Positive = 8
    epochs: Positive | None = None
    over: Literal["matrix", "layer", "language"] = "matrix"
    matrices: Literal["vertical", "both"] = "vertical"
    languages: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _reaches_its_ratio(self) -> Pruning:
        if self.epochs is not None:
            self.check_end(self.epochs, "'epochs'")
        return self

    def check_end(self, end: int, what: str) -> None:
        """Raise ValueError if the ratio is not reached by the last epoch, or step."""
        if self.start + self.length > end:
            raise ValueError(
                f"'prune' reaches its ratio after {self.start + self.length}, 'start' and 'length' together, "
                f"which is more than the {end} of {what}: give smaller ones"
            )

    @property
    def pruned(self) -> tuple[str, ...]:
        """Name the matrices that are pruned."""
        return ("vertical",) if self.matrices == "vertical" else ("flat", "vertical")

    @property
    def needs_groups(self) -> bool:
        """Whether ``languages`` names resource groups."""
        return any(name in GROUPS for name in self.languages or ())

    def prunes(self, code: str, languages: Languages) -> bool:
        """Tell whether the matrices of a language are pruned."""
        return self.languages is None or bool({code, languages.groups.get(code)} & set(self.languages))

    def check_languages(self, languages: Languages) -> None:
        """Raise ValueError for a name that is neither a language nor a group of the recipe."""
        known = {*languages.codes, *(languages.groups.values() if languages.groups else GROUPS)}
        if wrong := sorted(set(self.languages or ()) - known):
            raise ValueError(
                f"'low_rank.prune.languages' names {wrong[0]}: it may have {', '.join(sorted(known))}"
            )

    def epoch(self, number: int, steps: int) -> int:
        """Return the epoch in which the ``number``-th of ``steps`` training steps ends; both count from 1.

        The last step ends in the last epoch, even if there are more epochs than steps.
        """
        return number if self.epochs is None else -(-number * self.epochs // steps)

    def ratio_at(self, epoch: int) -> float:
        """Return the part of the values that is pruned in an epoch (equation 6)."""
        if epoch <= self.start:
            return 0.0
        left = max(1 - (epoch - self.start) / self.length, 0.0)
        return self.ratio - self.ratio * left**3

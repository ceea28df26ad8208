"""The layout of a recipe, and whether processes can hold it. No torch here, because plans check this too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator

from lsmoe_ds.config.section import Positive, Section
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe


class Parallel(Section):
    """Divide the ranks: their number is tensor x data, and ``expert`` ranks share the experts of a layer.

    Of these, ``node`` ranks are on one machine. If there are several machines, rows cross the network once
    to each of them; with 1, each row goes directly to the ranks of its experts.
    """

    tensor: Positive = 1
    expert: Positive = 1
    node: Positive = 1

    @property
    def forwards_among(self) -> int:
        """Return ``node`` if rows are forwarded among as many ranks; otherwise 1."""
        return self.node if self.node < self.expert else 1

    @model_validator(mode="after")
    def _has_whole_machines(self) -> Parallel:
        if self.expert % self.node and self.node % self.expert:
            raise ValueError(
                f"'parallel.node' is {self.node} and 'parallel.expert' {self.expert}: one must divide the "
                "other. Give the number of ranks on a machine, or 1 to send each row directly"
            )
        return self


def check_world(world: int, tensor: int, expert: int) -> None:
    """Raise UserError unless ``world`` processes can hold this layout."""
    started = counted(world, "process")
    if world < 1:
        raise UserError(f"a world of {counted(world, 'rank')} was asked for: at least 1 is needed")
    if world % tensor:
        raise UserError(
            f"parallel.tensor is {tensor}, which does not divide the {started}: start a multiple of {tensor}"
        )
    if world % expert:
        raise UserError(
            f"parallel.expert is {expert}, which does not divide the {started}: start a multiple of {expert}"
        )


def accumulation_steps(recipe: Recipe, data: int) -> int:
    """Return the micro-batches of a step on each of ``data`` data-parallel ranks.

    Raises UserError if the ranks cannot share a step evenly.
    """
    count = recipe.data.batch.count
    if count % data:
        raise UserError(
            f"data.batch.count is {count}, which {data} data-parallel ranks cannot share evenly: "
            f"set it to a multiple of {data}, or start another number of processes"
        )
    return count // data


def check_layout(recipe: Recipe, world: int) -> None:
    """Raise UserError unless ``world`` processes can hold the recipe's layout and share its steps."""
    check_world(world, recipe.parallel.tensor, recipe.parallel.expert)
    accumulation_steps(recipe, world // recipe.parallel.tensor)

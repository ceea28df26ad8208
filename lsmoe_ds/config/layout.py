"""Check whether a number of processes can train a recipe. No torch here, because plans check this too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe


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

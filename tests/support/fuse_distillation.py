"""Make recipes with fuse distillation, and low-rank matrices that do not begin at zero."""

from __future__ import annotations

from unittest import mock

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.methods.low_rank.settings import LowRank
from lsmoe_ds.model import initialization
from support.sameness import recipe_for


def fused(routing: str, tensor: int = 1, expert: int = 1, stage: int = 0, every: int = 1) -> Recipe:
    """Make a recipe with shared matrices: "distilled" with shared feed-forwards, and "one side" with those of
    the encoder alone.
    """
    if routing in ("distilled", "one side"):
        recipe = recipe_for("distilled", tensor, expert, stage)
        recipe.model.decoder.moe.fuse_distillation = routing == "distilled"
        return recipe
    recipe = recipe_for(routing, tensor, expert, stage)
    recipe.model.low_rank = LowRank(rank=3, at="both", every=every, fuse_distillation=True)
    return recipe


def trained_matrices():
    """Draw low-rank matrices that do not begin at zero, in whatever layout, inside the context."""
    true = initialization.draw

    def draw(name, shape, seed, methods):
        flat = name.endswith("_low_rank.flat")
        return (
            2 * true(f"{name}_low_rank.vertical", shape, seed, methods)
            if flat
            else true(name, shape, seed, methods)
        )

    return mock.patch.object(initialization, "draw", draw)

"""Train small models of transformers with modular LoRA."""

from __future__ import annotations

from pathlib import Path

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare
from support.loops import loop
from support.small_host import host_recipe, write_host
from support.small_run import write_corpus


def prepared(folder: Path, kind: str) -> Path:
    """Write a corpus, a model of a class of transformers, and the prepared data of :func:`modular`."""
    write_corpus(folder)
    write_host(folder / "host", kind)
    prepare(modular(folder))
    return folder


def modular(folder: Path, stage: int = 0, steps: int = 4) -> Recipe:
    """Return a recipe of modular LoRA with English as the pivot."""
    recipe = host_recipe(folder, folder / "host", stage, rank=2, index="modular", at="all")
    recipe.training.steps, recipe.training.directions = steps, ["en-de", "de-en", "en-fr", "fr-en"]
    recipe.training.log_every, recipe.training.checkpoint_every = 1, 2
    recipe.training.validate_every, recipe.training.keep = 2, 9
    return recipe


def trained(pool, recipe: Recipe, run: Path, world: int = 1, *arguments: object) -> Path:
    """Train a recipe on some processes, and return its run."""
    assert pool.run(world, loop, recipe, run, *arguments, tensor=1, expert=1) == [None] * world
    return run

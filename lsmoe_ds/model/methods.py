"""Build a model's methods (mixtures of experts, and those that the recipe names) and its objective."""

from __future__ import annotations

from lsmoe_ds.config.method import MethodSection
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods.base import Method
from lsmoe_ds.methods.fuse_distillation import FuseDistillation
from lsmoe_ds.methods.objective import Objective
from lsmoe_ds.methods.taught import Taught
from lsmoe_ds.moe.method import MixturesOfExperts
from lsmoe_ds.parallel.topology import Topology


def methods_of(recipe: Recipe, topology: Topology) -> list[Method]:
    """Return the methods that a recipe's model uses, in the order in which their losses are added."""
    experts: list[Method] = [MixturesOfExperts(recipe, topology)] if any(recipe.model.moe_layers()) else []
    return experts + [section.build(recipe, topology) for section in recipe.model.methods]


def objective_of(recipe: Recipe) -> Objective:
    """Return the training objective of the recipe's model.

    In fuse distillation of low-rank matrices both routes learn from each other; experts teach a shared
    feed-forward.
    """
    if recipe.training.teacher is not None:
        return Taught(recipe.training.teacher.weight)
    return FuseDistillation(teacher=recipe.model.teaches) if recipe.model.distills else Objective()


def same_methods(before: Recipe, after: Recipe) -> list[tuple[MethodSection, MethodSection]]:
    """Return the pair of sections (after, before) of each method that both recipes have."""
    old = {section.name: section for section in before.model.methods}
    return [(section, old[section.name]) for section in after.model.methods if section.name in old]


def check_holders(before: Recipe, after: Recipe) -> None:
    """Raise UserError if a trained model's parameters would be chosen by other languages than before."""
    for section, old in same_methods(before, after):
        was, now = old.choosing(before.model), section.choosing(after.model)
        if was == now:
            continue
        for key in type(section).model_fields:  # name the first key that alone makes a difference
            value, learned = getattr(section, key), getattr(old, key)
            if old.model_copy(update={key: value}).choosing(before.model) != was:
                is_now, was_then = ("not set" if each is None else each for each in (value, learned))
                raise UserError(
                    f"'model.{section.name}.{key}' is {is_now}, but the model has learned with {was_then}, "
                    "which says what each language or direction has of it: leave it as it is"
                )
        raise UserError(
            f"'model.{section.name}' would give languages or directions other parameters than those that "
            "the model was trained with: set what chooses them as it was"
        )

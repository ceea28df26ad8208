"""The methods that there are. Nothing else in training and model code knows them by name."""

from __future__ import annotations

from lsmoe_ds.config import Recipe
from lsmoe_ds.language_specific.clsr import ConditionalLanguageSpecificRouting
from lsmoe_ds.methods.base import Method
from lsmoe_ds.moe.method import MixturesOfExperts


def methods_of(recipe: Recipe) -> list[Method]:
    """Return the methods that a recipe's model uses, in the order in which their losses are added."""
    found = (kind.of(recipe) for kind in (MixturesOfExperts, ConditionalLanguageSpecificRouting))
    return [method for method in found if method is not None]

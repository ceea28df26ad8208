"""The methods that there are. Nothing else in training and model code knows them by name."""

from __future__ import annotations

from typing import Any

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.methods.base import Method
from lsmoe_ds.methods.clsr.method import ConditionalLanguageSpecificRouting
from lsmoe_ds.methods.low_rank.bank import LowRankMatrices
from lsmoe_ds.moe.method import MixturesOfExperts
from lsmoe_ds.parallel.topology import Topology

KINDS: list[type[Any]] = [MixturesOfExperts, LowRankMatrices, ConditionalLanguageSpecificRouting]


def methods_of(recipe: Recipe, topology: Topology) -> list[Method]:
    """Return the methods that a recipe's model uses, in the order in which their losses are added."""
    found = (kind.of(recipe, topology) for kind in KINDS)
    return [method for method in found if method is not None]

"""Build the optimizer of a recipe, over the parameters that train.

:mod:`lsmoe_ds.config.optimizer` defines the state that each optimizer keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.adafactor import Adafactor
from lsmoe_ds.training.offloaded_adam import OffloadedAdam

BETAS, EPSILON = (0.9, 0.98), 1e-9  # "Attention is all you need", section 5.3
Groups = list[dict[str, Any]]


def build_optimizer(
    recipe: Recipe, groups: Groups, model: nn.Module, topology: Topology
) -> torch.optim.Optimizer:
    """Build the optimizer that ``training.optimizer`` names, over groups of the model's parameters.

    The parameters must already have the type and the device in which they are trained.
    """
    return OPTIMIZERS[recipe.training.optimizer](recipe, groups, model, topology)


def _adam(recipe: Recipe, groups: Groups, model: nn.Module, topology: Topology) -> torch.optim.Optimizer:
    training, settings = recipe.training, recipe.training.optimizer_settings
    kind = OffloadedAdam if settings.host_bytes() else torch.optim.AdamW
    return kind(
        groups,
        lr=training.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=training.weight_decay,
        fused=True,
    )


def _adafactor(recipe: Recipe, groups: Groups, model: nn.Module, topology: Topology) -> torch.optim.Optimizer:
    names, training = global_names(model, topology), recipe.training
    known = {parameter: names[name] for name, parameter in model.named_parameters()}
    settings: Any = training.optimizer_settings
    return Adafactor(groups, settings, training.weight_decay, known, training.seed, topology)


OPTIMIZERS: dict[str, Callable[[Recipe, Groups, nn.Module, Topology], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adafactor": _adafactor,
}

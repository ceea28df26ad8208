"""Tell and count what trains of a recipe's model, by ``training.trainable``.

Unless all does, that takes the names of all parameters: an outline of the model is made, without weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import Count
from lsmoe_ds.planning.costs import Parts

if TYPE_CHECKING:
    from lsmoe_ds.model.base import Model


def _frozen_outline(recipe: Recipe) -> Model:
    # torch is not imported for a plan that does without.
    from lsmoe_ds.model.build import outline
    from lsmoe_ds.model.freezing import freeze
    from lsmoe_ds.parallel.topology import Topology

    model = outline(recipe, recipe.data.vocabulary.size)
    freeze(model, recipe, Topology.single())
    return model


def trains(recipe: Recipe) -> Callable[[str], bool]:
    """Return the function that tells whether the parameter of a global name trains.

    Raises UserError where :func:`lsmoe_ds.model.freezing.choose` does.
    """
    if recipe.training.trainable == "all":
        return lambda name: True
    from lsmoe_ds.parallel.parameters import global_names

    model = _frozen_outline(recipe)
    names = global_names(model, model.topology)
    trained = {names[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained.__contains__


def count_trained(recipe: Recipe) -> Count:
    """Count the parameters that train, by how ranks hold them.

    Raises UserError where :func:`lsmoe_ds.model.freezing.choose` does.
    """
    if recipe.training.trainable == "all":
        return Parts.of(recipe).whole
    from lsmoe_ds.methods.sites import Linears
    from lsmoe_ds.parallel import compat

    model = _frozen_outline(recipe)
    spread = {"embedding.tokens.weight"}
    for at, module in model.named_modules():
        if isinstance(module, Linears):
            for name, (_, _, split) in module.shapes.items():
                own = (".weight", ".bias") if split == "column" else (".weight",)
                spread |= {f"{at}.{name}{part}" for part in own}
    total = Count()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if compat.is_expert_parameter(parameter):
            total += Count(expert=parameter.numel())
        elif name in spread or any(method.is_spread(name) for method in model.methods):
            total += Count(split=parameter.numel())
        else:
            total += Count(whole=parameter.numel())
    return total

"""Count a recipe's trained parameters, by ``training.trainable``, and the averages that an optimizer keeps.

If not all parameters train, this needs the names of all parameters; the averages of a model with methods need
their shapes. Then an outline of the model is built, without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.optimizer import averaged_partition, averaged_shape
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import (
    Count,
    LinearShape,
    LinearShapes,
    SublayerShape,
    feed_forward_linears,
    shapes_of,
)
from lsmoe_ds.planning.costs import SIDES, Parts

if TYPE_CHECKING:
    from lsmoe_ds.model.base import Model


def _frozen_outline(recipe: Recipe) -> Model:
    # Imported here, because most plans do not need torch.
    from lsmoe_ds.model.build import outline
    from lsmoe_ds.model.freezing import freeze
    from lsmoe_ds.parallel.topology import Topology

    model = outline(recipe, recipe.data.vocabulary.size)
    freeze(model, recipe, Topology.single())
    return model


def trains(recipe: Recipe) -> Callable[[str], bool]:
    """Return a function that tells whether the parameter with a global name trains.

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
    return sum((_count(shape, along, is_expert) for shape, along, is_expert in _trained(recipe)), Count())


def count_averages(recipe: Recipe) -> Count:
    """Count the values of an optimizer's averages over dimensions of matrices, by how ranks hold them.

    Vectors are not averaged, so all their values count; values kept for each value of a matrix do not.
    Raises UserError where :func:`lsmoe_ds.model.freezing.choose` does.
    """
    total = Count()
    for shape, along, is_expert in _trained(recipe):
        averaged = recipe.training.optimizer_settings.averaged.values()
        if len(shape) < 2:
            total += _count(shape, along, is_expert)
            continue
        for over in averaged:
            spread = averaged_partition(along, len(shape), over)
            total += _count(averaged_shape(shape, over), spread, is_expert)
    return total


def largest_trained(recipe: Recipe) -> int:
    """Count the values of the largest parameter that trains, on one rank."""
    tensor = recipe.parallel.tensor
    return max(prod(shape) // (1 if along is None else tensor) for shape, along, _ in _trained(recipe))


def _count(shape: Sequence[int], along: int | None, is_expert: bool) -> Count:
    kind = "expert" if is_expert else "whole" if along is None else "split"
    return Count(**{kind: prod(shape)})


class _Trained(NamedTuple):
    """A parameter that trains."""

    shape: tuple[int, ...]
    along: int | None = None  # the dimension that tensor-parallel ranks split
    is_expert: bool = False


def _trained(recipe: Recipe) -> Iterator[_Trained]:
    """Yield each parameter that trains."""
    of_methods = any(method.trains for method in recipe.model.methods)
    if recipe.training.trainable == "all" and recipe.model.huggingface is None and not of_methods:
        return _by_shape(recipe)
    return _by_outline(recipe)


def _by_shape(recipe: Recipe) -> Iterator[_Trained]:
    """Yield the parameters of a model without methods, which needs no outline."""
    model, hidden = recipe.model, recipe.model.hidden

    def norm() -> Iterator[_Trained]:
        yield from (_Trained((hidden,)), _Trained((hidden,)))

    def linears(shapes: LinearShapes) -> Iterator[_Trained]:
        for inputs, outputs, split in shapes.values():
            column = split == "column"
            yield from (
                _Trained((outputs, inputs), 0 if column else 1),
                _Trained((outputs,), 0 if column else None),
            )

    def layer(width: int, moe: MoE) -> Iterator[_Trained]:
        for parameter in linears(feed_forward_linears(hidden, width)):
            yield from repeat(_Trained(parameter.shape, None, True), moe.experts)
            if moe.has_shared:
                yield parameter
        if moe.routing == "task":
            yield _Trained((len(recipe.languages.tasks(moe.task)), moe.experts))
        elif moe.routing != "static":
            yield _Trained((moe.experts, hidden))
            yield from [_Trained((moe.experts,))] * moe.router_bias

    yield _Trained((recipe.data.vocabulary.size, hidden), 0)
    for _ in SIDES:
        yield from norm()
    for site in shapes_of(model):
        if isinstance(site, LinearShape):
            yield from linears({site.name: (site.inputs, site.outputs, site.split)})
        elif isinstance(site, SublayerShape):
            yield from norm()
            side = model.encoder if site.side == "encoder" else model.decoder
            if site.sublayer == "feed_forward" and side.moe is not None and side.is_moe(site.layer):
                yield from layer(side.width(site.layer), side.moe)


def _by_outline(recipe: Recipe) -> Iterator[_Trained]:
    """Yield the parameters, with names and shapes from an outline of the model."""
    from lsmoe_ds.methods.sites import Linears
    from lsmoe_ds.parallel import compat

    model = _frozen_outline(recipe)
    spread = {"embedding.tokens.weight": 0}
    for at, module in model.named_modules():
        if isinstance(module, Linears):
            for name, (_, _, split) in module.shapes.items():
                own = {".weight": 0, ".bias": 0} if split == "column" else {".weight": 1}
                spread |= {f"{at}.{name}{part}": dimension for part, dimension in own.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_methods = (method.spread_along(name) for method in model.methods)
            along = spread.get(name, next((each for each in of_methods if each is not None), None))
            is_expert = compat.is_expert_parameter(parameter)
            yield _Trained(tuple(parameter.shape), None if is_expert else along, is_expert)

"""Freeze the parameters that ``training.trainable`` does not name, so that they keep their initial values."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.languages import nearest
from lsmoe_ds.methods.base import Method
from lsmoe_ds.model.base import Model
from lsmoe_ds.parallel.parameters import global_names, places
from lsmoe_ds.parallel.topology import Topology

EXPERT = re.compile(r"\.experts\.\d+\.")


def choose(
    names: Collection[str],
    trainable: Literal["all", "methods"] | list[str],
    methods: Sequence[Method],
    head: Collection[str] = (),
) -> set[str]:
    """Return those of a model's global ``names`` whose parameters train.

    With "methods" the ``head`` trains, too: a task adds it to a host model, with random weights. Raises
    UserError for a pattern that matches no name, if nothing trains, or if only some experts of a layer do.
    """
    if trainable == "all":
        return set(names)
    if trainable == "methods":
        chosen = {name for name in names if any(method.owns(name) for method in methods)}
        if not chosen:
            found = "'training.trainable' is methods, but no method of the model has parameters"
            raise UserError(f"{found}: give all or patterns of global names")
        return chosen.union(head)
    chosen = set()
    for pattern in trainable:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            found = f"'training.trainable' has '{pattern}', which matches no parameter"
            within = f"*{pattern}*"
            inside = any(fnmatchcase(name, within) for name in names)
            guess = f" (did you mean '{within}'?)" if inside else nearest(pattern, names)
            raise UserError(f"{found}{guess}: give patterns of global names")
        chosen |= matched
    if not chosen:
        found = "'training.trainable' is an empty list, by which nothing trains"
        raise UserError(f"{found}: give all, methods or patterns of global names")
    # If only some experts of a layer train, some ranks wait forever for others' gradients.
    alike: dict[str, dict[bool, str]] = {}
    for name in sorted(names):
        if EXPERT.search(name):
            alike.setdefault(EXPERT.sub(".experts.*.", name), {}).setdefault(name in chosen, name)
    for both, which in alike.items():
        if len(which) == 2:
            found = f"'training.trainable' trains {which[True]} and not {which[False]}"
            raise UserError(f"{found}: the experts of a layer train together, as by '{both}'")
    return chosen


def freeze(model: Model, recipe: Recipe, topology: Topology) -> None:
    """Freeze all parameters that :func:`choose` does not return; its errors are SharedError on all ranks."""
    trainable = recipe.training.trainable
    if trainable == "all":
        return
    names, buffers = global_names(model, topology), {name for name, _ in model.named_buffers()}
    of_all = [name for name, (local, _) in places(model, topology).items() if local not in buffers]
    try:
        chosen = choose(of_all, trainable, model.methods, [name for name in of_all if model.is_in_head(name)])
    except UserError as error:
        raise SharedError(str(error)) from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names[name] in chosen)

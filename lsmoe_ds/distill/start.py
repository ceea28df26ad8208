"""Make the first weights of a student: its teacher's where names and shapes are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lsmoe_ds.analysis.measuring import measure_use
from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.stored import Stored, Weights
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepared import open_data
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.kept_experts import SAID, One, keep_one
from lsmoe_ds.export.subnetwork import ALL, check_convertible, describe, extract
from lsmoe_ds.inference.load import load
from lsmoe_ds.model.build import outline
from lsmoe_ds.model.initialization import drawn
from lsmoe_ds.model.methods import methods_of
from lsmoe_ds.parallel.parameters import global_names, named_state
from lsmoe_ds.parallel.topology import Topology


def first_weights(
    teacher: Stored, whole: Weights, recipe: Recipe, vocabulary: int, one: One, average: Averaging = 1
) -> tuple[Tensors, dict[str, Any]]:
    """Return the first weights of the recipe's model, from the ``whole`` weights of its teacher, and the
    ``provenance.json`` of their folder, except kind and files.

    ``one`` chooses the expert that replaces all of a layer. Parameters that the teacher lacks, or has in
    another shape, are initialized as in a new model. ``vocabulary`` is the number of tokens.
    """
    dense, said = _as_dense(teacher, whole, recipe.trained, one, average)
    model = outline(recipe, vocabulary)
    names = global_names(model, Topology.single())
    entries: dict[str, LazyTensor] = {}
    taken = 0
    for local, value in named_state(model):
        name = names[local]
        theirs = dense.entries.get(name)
        if theirs is not None and tuple(theirs.shape) == tuple(value.shape):
            entries[name] = theirs
            taken += value.numel()
        else:
            entries[name] = drawn(name, value, recipe.training.seed, model.methods)
    found = Tensors(entries)
    made = describe(teacher, whole, ALL, "specific", found.numbers)
    made["approximates"] = f"a start for distilling: {taken:,} of {found.numbers:,} values are its teacher's"
    if 2 * taken < found.numbers:
        made["approximates"] += ", the others begin at random, since the teacher has them in other sizes"
    return found, made | ({"approximates": f"{made['approximates']}; {said}"} if said else {})


def _as_dense(
    teacher: Stored, whole: Weights, directions: Sequence[Direction], one: One, average: Averaging
) -> tuple[Tensors, str]:
    """Return the teacher's weights with one expert a layer, and a description of this.

    For a single direction these are the weights of its own sub-network, if it has one.
    """
    recipe, weights = teacher.recipe, Tensors.of(whole.tensors)
    directions = [recipe.languages.find(each) for each in directions]
    routed = any(not moe.by_task for _, _, moe in recipe.model.moe_layers())
    if len(directions) == 1 and _can_extract(recipe, directions[0], routed):
        weights, recipe = extract(whole.tensors, recipe, directions[0], hybrid=routed)
    if not any(recipe.model.moe_layers()):
        return weights, ""
    loaded, data = load(teacher.weights_in, "cpu", average=average, streamed=True), open_data(teacher)
    uses = [measure_use(loaded, data, direction) for direction in directions]
    mean = {place: torch.stack([use[place] for use in uses]).mean(0) for place in uses[0]}
    weights, _ = keep_one(weights, recipe, mean, one)
    return weights, f"{SAID[one]} stands for all of a layer"


def _can_extract(recipe: Recipe, direction: Direction, hybrid: bool) -> bool:
    """Return whether a sub-network of the direction exists and has the layers of the whole model.

    A method that chooses for each token has none. One that becomes layers of its own changes the numbers of
    the layers, by which the student takes its weights.
    """
    try:
        check_convertible(recipe, direction, hybrid=hybrid)
    except UserError:
        return False
    return not any(method.adds_layers for method in methods_of(recipe, Topology.single()))

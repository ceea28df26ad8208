"""What a plan says of masks: their memory, and the units that a direction needs no more."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from support.sameness import LORA, recipe_for

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.plan import plan

METHODS = {
    "neurons": {"neurons": {"share": 80}},
    "random": {"neurons": {"random": 0.7, "at": "decoder"}},
    "lass": {"lass": {"tuned": "none", "at": "feed_forward"}},
    "pruned": {"low_rank": LORA},
    "pruned vertical": {"low_rank": {**LORA, "prune": {**LORA["prune"], "matrices": "vertical"}}},
    "cut": {"low_rank": {**LORA, "columns": 10}},
    "all": {
        "neurons": {"random": 0.3},
        "lass": {"tuned": "none", "at": "attention"},
        "adapters": {"width": 4},
    },
}


def recipe_with(methods: dict, tensor: int = 1) -> Recipe:
    value = recipe_for("dense", tensor, 1, 0).model_dump(exclude_unset=True)
    value["model"] |= methods
    value["training"]["start_from"] = "none"
    return Recipe.model_validate(value)


def masks_of(topology, recipe: Recipe) -> int:
    """Count the bytes of masks in a rank's model."""
    model = Transformer(recipe, recipe.data.vocabulary.size, topology)
    return sum(buffer.nbytes for buffer in model.buffers() if buffer.dtype == torch.bool)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_plan_counts_the_bytes_of_masks(pool, name, tensor):
    recipe = recipe_with(METHODS[name], tensor)
    planned = plan(recipe)
    parameters = planned.parameters.whole
    held = parameters.split // tensor + parameters.whole
    for masks in pool.run(tensor, masks_of, recipe, tensor=tensor):
        assert masks > 0
        for each in planned.memory:  # a byte each, whatever the precision
            value = 4 if each.precision == "float32" else 2
            assert each.weights == value * held + masks, each


@pytest.mark.parametrize("name", ["random", "all", "lass"])
def test_what_a_direction_needs_is_known_of_masks_at_random(name):
    recipe = recipe_with(METHODS[name])
    model = Transformer(recipe, recipe.data.vocabulary.size)
    initialize(model, 1, Topology.single())
    names = global_names(model, Topology.single())
    weights = {names[name]: value for name, value in model.state_dict().items()}
    planned = plan(recipe)
    for direction in recipe.languages.directions:
        tensors, _ = extract(weights, recipe, direction)
        assert planned.serving.whole.total == tensors.numbers
    assert not planned.serving_at_most and not planned.to_dict()["serving_at_most"]


def shown(recipe: Recipe) -> str:
    console = Console(record=True, width=200)
    console.print(plan(recipe).table())
    return console.export_text()


@pytest.mark.parametrize(
    ("methods", "at_most"),
    [(METHODS["neurons"], True), (METHODS["random"], False), ({"neurons": {"share": 100}}, False)],
)
def test_what_a_direction_needs_of_recorded_masks_is_an_upper_bound(methods, at_most):
    recipe = recipe_with(methods)
    assert plan(recipe).to_dict()["serving_at_most"] == at_most
    assert ("one direction served, at most" in shown(recipe)) == at_most
    if "random" not in methods["neurons"]:
        assert plan(recipe).serving.whole == plan(recipe).parameters.whole

"""Initial values: which distribution each kind of parameter is drawn from, and what decides the draw."""

from __future__ import annotations

import math

import pytest
import torch
from support.sameness import recipe_for

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.methods.low_rank.settings import LowRank
from lsmoe_ds.model.initialization import draw, initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology

HIDDEN, WIDTH, VOCABULARY = 64, 128, 500


def recipe_of(**model) -> Recipe:
    recipe = recipe_for("token", 1, 1, 0)
    recipe.model.hidden = HIDDEN
    for side in (recipe.model.encoder, recipe.model.decoder):
        side.feed_forward = WIDTH
    for key, value in model.items():
        setattr(recipe.model, key, value)
    return recipe


def values_of(recipe: Recipe, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return initial values by global name."""
    model = Transformer(recipe, VOCABULARY)
    initialize(model, seed, Topology.single())
    names = global_names(model, Topology.single())
    return {names[name]: parameter.detach() for name, parameter in model.named_parameters()}


def normal(deviation: float, values: torch.Tensor) -> None:
    """Assert mean 0, this deviation, and 68.3 % of the values within it, as normal values have them."""
    count = values.numel()
    assert values.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * count))
    assert abs(values.mean()) < 4 * deviation / math.sqrt(count)
    assert (values.abs() < deviation).float().mean() == pytest.approx(0.683, abs=2 / math.sqrt(count))


def uniform(bound: float, values: torch.Tensor) -> None:
    count = values.numel()
    assert 0.99 * bound < values.abs().max() <= bound
    assert abs(values.mean()) < 4 * bound / math.sqrt(3 * count)
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(count))


def test_every_parameter_is_of_its_kind():
    found = values_of(recipe_of(low_rank=LowRank(rank=16, at="both")))
    normal(0.125, found.pop("embedding.tokens.weight"))  # 64 ** -0.5
    for name, value in found.items():
        if name.endswith("router.weight") or name.endswith("_low_rank.vertical"):
            normal(0.1, value)
        elif name.endswith((".bias", "_low_rank.flat")):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            sizes = {"expand": (HIDDEN, WIDTH), "contract": (WIDTH, HIDDEN)}
            inputs, outputs = sizes.get(name.split(".")[-2], (HIDDEN, HIDDEN))
            assert value.shape == (outputs, inputs)
            uniform(math.sqrt(6 / (inputs + outputs)), value)  # Glorot and Bengio, equation 16
    kinds = {name.split(".")[-2] for name in found}
    assert kinds >= {
        "router",
        "expand",
        "contract",
        "query",
        "key",
        "value",
        "output",
        "query_low_rank",
        "contract_low_rank",
    }


@pytest.mark.parametrize("shared", [True, False])
def test_projections_of_clsr_are_the_identity(shared):
    values = values_of(recipe_of(clsr=Clsr(gate=8, shared=shared)))
    found = {name: value for name, value in values.items() if "_clsr." in name}
    languages, projections = 4, 0
    for name, value in found.items():
        if name.endswith((".specific", ".shared")):
            count = languages if name.endswith(".specific") else 1
            assert torch.equal(value, torch.eye(HIDDEN).repeat(count, 1)), name
            projections += 1
    assert projections == (2 + 2 if shared else 2 + 2 * 2 + 2 * 3)
    for name in [name for name in found if name.endswith(".gate.0.weight")]:
        uniform(math.sqrt(6 / (HIDDEN + 8)), found[name])


def test_each_name_and_each_seed_has_a_draw_of_its_own():
    found = values_of(recipe_of())
    drawn = [value for value in found.values() if value.std() > 0]
    for i, value in enumerate(drawn):
        for other in drawn[:i]:
            assert value.shape != other.shape or not torch.equal(value, other)
    names = [name for name in found if ".experts." in name and name.endswith("expand.weight")]
    assert len(names) == 2 * len({name.split(".experts.")[1].split(".")[0] for name in names})
    other_seed = values_of(recipe_of(), seed=2)
    assert all(torch.equal(value, other_seed[name]) == (value.std() == 0) for name, value in found.items())
    again = values_of(recipe_of())
    assert all(torch.equal(value, again[name]) for name, value in found.items())


def test_a_draw_does_not_depend_on_the_random_numbers_drawn_before():
    torch.manual_seed(1)
    first = draw("encoder.0.attention.query.weight", [4, 4], 7)
    state = torch.get_rng_state()
    assert torch.equal(first, draw("encoder.0.attention.query.weight", [4, 4], 7))
    assert torch.equal(state, torch.get_rng_state())

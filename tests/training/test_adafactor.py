"""Adafactor against that of transformers, and in every layout against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.sameness import UNITS, VOCABULARY, assert_same, in_units, recipe_for, steps_of, whole
from support.sameness import train as train_on_rank
from transformers.optimization import Adafactor as Theirs

from lsmoe_ds.config.optimizer import Adafactor as Settings
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.adafactor import Adafactor
from lsmoe_ds.training.schedules import learning_rate

SHAPES = [(6, 10), (7,), (2, 3, 5), (1, 4)]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def ours(given: list[torch.nn.Parameter], decay: float = 0.0, seed: int = 1, **settings) -> Adafactor:
    names = {parameter: f"parameter.{number}" for number, parameter in enumerate(given)}
    return Adafactor([{"params": given}], Settings(**settings), decay, names, seed, Topology.single())


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [(10.0 ** (step % 3 - 1) * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("decay", "clip"), [(0.0, 1.0), (0.1, 0.3)])
def test_each_step_is_that_of_transformers(momentum, scale, decay, clip):
    mine, theirs = parameters(), parameters()
    optimizer = ours(mine, decay, momentum=momentum, scale_parameters=scale, clip_threshold=clip)
    reference = Theirs(
        theirs,
        lr=1.0,
        beta1=momentum or None,
        clip_threshold=clip,
        weight_decay=decay,
        scale_parameter=scale,
        relative_step=False,
    )
    for step in range(1, 8):
        for both, rate in ((optimizer, 0.02 / step), (reference, 0.02 / step)):
            both.param_groups[0]["lr"] = rate
        for parameter, other, gradient in zip(mine, theirs, gradients(step), strict=True):
            parameter.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        for parameter, other in zip(mine, theirs, strict=True):
            assert torch.equal(parameter.grad, other.grad), "gradients stay as they are"
            torch.testing.assert_close(parameter.data, other.data, rtol=1e-6, atol=1e-7)


def test_the_relative_steps_of_the_paper_are_a_schedule_of_the_recipe():
    mine, theirs = parameters(), parameters()
    optimizer = ours(mine, scale_parameters=True)
    reference = Theirs(theirs, relative_step=True, warmup_init=True)
    for step in (1, 2, 3, 9_999, 10_000, 10_001, 40_000):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 20_000, 0.01, 10_000, "inverse_square_root")
        for parameter, other, gradient in zip(mine, theirs, gradients(step), strict=True):
            parameter.grad, other.grad = gradient.clone(), gradient.clone()
            for held in (optimizer.state[parameter], reference.state[other]):
                if held.get("step", 0):
                    held["step"] = torch.tensor(float(step - 1)) if "RMS" not in held else step - 1
        optimizer.step()
        reference.step()
        for parameter, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(parameter.data, other.data, rtol=1e-6, atol=1e-7)


def steps_in_16_bits(given: list[torch.nn.Parameter], optimizer: Adafactor, steps: int, rate: float) -> None:
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate
        for parameter, gradient in zip(given, gradients(step, torch.bfloat16), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def test_16_bit_weights_are_copies_of_float32_ones():
    half, whole = parameters(torch.bfloat16), [p.float() for p in parameters(torch.bfloat16)]
    whole = [torch.nn.Parameter(value.detach()) for value in whole]
    for given in (half, whole):
        steps_in_16_bits(given, ours(given, momentum=0.9), 20, 1e-4)
    for few, many in zip(half, whole, strict=True):
        assert torch.equal(few.data, many.data.bfloat16())
        assert not torch.equal(many.data, many.data.bfloat16().float())


def test_without_float32_copies_small_steps_are_not_lost():
    """Each is far below half of the last place of the weight: rounding to the nearest would lose it."""
    weight, steps = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)), 50
    optimizer = ours([weight], master_weights=False)
    assert "values" not in optimizer.state[weight]
    for _ in range(steps):
        optimizer.param_groups[0]["lr"] = 2**-12
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = 1 - weight.detach().double().mean()
    assert float(moved) == pytest.approx(steps * 2**-12, rel=0.05)
    pruned = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
    pruned.grad, alone = torch.zeros_like(pruned), ours([pruned], master_weights=False)
    alone.step()
    assert not pruned.any(), "what is pruned stays 0"


def test_random_rounding_is_the_same_in_every_run_and_another_for_every_seed():
    def weights(seed: int) -> list[torch.Tensor]:
        given = parameters(torch.bfloat16)
        steps_in_16_bits(given, ours(given, seed=seed, master_weights=False), 5, 1e-3)
        return [parameter.data for parameter in given]

    first, again, other = weights(1), weights(1), weights(2)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def recipe_with(
    routing: str, tensor: int = 1, expert: int = 1, bf16: bool = False, **settings: Any
) -> Recipe:
    given = recipe_for(routing, tensor, expert, 0).model_dump(exclude_none=True)
    given["training"] |= {"optimizer": "adafactor", "adafactor": settings, "weight_decay": 0.1}
    given["deepspeed"] |= {"bf16": {"enabled": bf16}}
    return Recipe.model_validate(given)


FULL = {"momentum": 0.9, "scale_parameters": True}


@pytest.fixture(scope="module")
def alone(pool):
    known: dict[Any, Any] = {}

    def of(routing: str, units: int, settings: dict[str, Any]):
        key = routing, units, str(settings)
        if key not in known:
            known[key] = pool.run(1, train_on_rank, in_units(units, recipe_with(routing, **settings)))
        return known[key]

    return of


CASES = [
    ("dense", 2, 1, 1, {}),
    ("token", 2, 1, 2, {}),
    ("target", 2, 1, 2, FULL),
    ("dense", 2, 2, 1, {}),
    ("lms", 2, 2, 1, FULL),
    ("square", 2, 2, 1, {}),
    ("token", 2, 2, 2, FULL),
    ("distilled", 4, 2, 2, {}),
    ("lora", 4, 2, 1, {}),
    ("adapters", 4, 4, 4, FULL),
]


@pytest.mark.parametrize(("routing", "world", "tensor", "expert", "settings"), CASES)
def test_layout_computes_what_one_process_computes(pool, alone, routing, world, tensor, expert, settings):
    units = 2 if tensor == world else UNITS
    recipe = in_units(units, recipe_with(routing, tensor, expert, **settings))
    wanted = alone(routing, units, settings)
    found = pool.run(world, train_on_rank, recipe, tensor=tensor, expert=expert)
    assert_same(found, wanted, tensor)


def steps_taken(topology: Any, recipe: Recipe) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Return each step's loss and gradient norm, and the weights of a rank."""
    from lsmoe_ds.parallel.parameters import global_names, partition_dimension
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    results = [
        train_step(engine, step, number, recipe, topology)
        for number, step in enumerate(steps_of(recipe, topology.data_rank, topology.data), start=1)
    ]
    names = global_names(engine.module, topology)
    weights = {
        names[name]: (parameter.detach().float().numpy().copy(), partition_dimension(parameter))
        for name, parameter in engine.module.named_parameters()
    }
    engine.destroy()
    return [(result.loss, result.grad_norm) for result in results], weights


@pytest.mark.parametrize("copies", [True, False], ids=["float32 copies", "random rounding"])
@pytest.mark.parametrize(("world", "tensor", "expert"), [(2, 1, 2), (2, 2, 1)])
def test_in_16_bits_ranks_agree_and_follow_float32(pool, world, tensor, expert, copies):
    units, settings = 2 if tensor == world else UNITS, {"master_weights": copies}
    recipe = in_units(units, recipe_with("token", tensor, expert, bf16=True, **settings))
    found = pool.run(world, steps_taken, recipe, tensor=tensor, expert=expert)
    ((wanted, _),) = pool.run(1, steps_taken, in_units(units, recipe_with("token")))
    for numbers, _ in found:
        for (loss, norm), expected in zip(numbers, wanted, strict=True):
            assert loss == pytest.approx(expected[0], rel=1e-2)
            assert norm == pytest.approx(expected[1], rel=2e-2), "experts included"
    weights = whole(found, tensor, 1)  # asserts that replicas are equal
    assert all(torch.equal(value, value.bfloat16().float()) for value in weights.values())

"""On a GPU: what a step waits for, and by which kernels it attends."""

from __future__ import annotations

import os
import warnings
from unittest import mock

import pytest
import torch
from support.optimizer_steps import recipe_of
from support.sameness import VOCABULARY, steps_of

from lsmoe_ds.launch import joining
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology

WAITS = 40  # of a step: DeepSpeed's norms of each group, the loss, the positions of real tokens


@pytest.fixture(scope="module")
def step(device):
    """Yield a function that makes the training step of a small sparse model with ``layers`` layers a side."""
    from lsmoe_ds.training.engine import build_engine, train_step

    def of(layers: int, optimizer: str = "adam"):
        recipe = recipe_of("token", stage=1 if optimizer == "adam" else 0)
        recipe.training.optimizer = optimizer
        for side in (recipe.model.encoder, recipe.model.decoder):
            side.layers = layers
        if device.type == "cuda":
            recipe.deepspeed = {**recipe.deepspeed, "bf16": {"enabled": True}}
        engine = build_engine(recipe, VOCABULARY, topology)
        of_rank = steps_of(recipe, 0, 1)[0]
        return lambda number: train_step(engine, of_rank, number, recipe, topology)

    with mock.patch.dict(os.environ):  # joining tells the processes started later that they are a rank of it
        joining.join()
        topology = Topology.build(device=device)
        compat.seed_tensor_parallel_random(1, 0)
        yield of


def count_waits(run) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_a_step_waits_for_the_device_as_often_with_more_layers(device, step, optimizer):
    if device.type == "cpu":
        pytest.skip("a CPU waits for no device")
    waits = []
    for layers in (2, 6):
        run = step(layers, optimizer)
        run(1)
        waits.append(count_waits(lambda run=run: run(2)))
    assert waits[0] == waits[1] <= WAITS, waits


def test_no_step_attends_by_cudnn(device, step):
    run = step(2)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as traced:
        run(1)
    names = {event.key for event in traced.key_averages()}
    assert any("attention" in name for name in names), sorted(names)
    assert not any("cudnn" in name and "attention" in name for name in names)

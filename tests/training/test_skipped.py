"""In float16 a step whose gradients overflow is skipped and counted, and a run of them ends the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.loops import assert_same_end, loop, recipe_in, weights
from support.small_run import TOKEN_TOP2, write_corpus

from lsmoe_ds.checkpoint.run_folder import list_checkpoints
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare

STEPS, SCALE = 12, 28  # at a loss scale of 2^28 the gradients of the first steps overflow, at some 2^20 none


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("skipped")
    write_corpus(path)
    prepare(recipe_in(path))
    return path


def in_float16(folder: Path, expert: int = 1, stage: int = 1, scale: int = SCALE, **training) -> Recipe:
    """Return a recipe in float16, of twelve steps with a checkpoint after each.

    The loss scale starts at 2^``scale`` and falls at the first overflow.
    """
    recipe = recipe_in(folder, steps=STEPS, every=1, moe=TOKEN_TOP2, expert=expert, stage=stage)
    settings = {"keep": 99, "validate_every": 0, "learning_rate": 0.01, "warmup": 1, **training}
    recipe.training = recipe.training.model_copy(update=settings)
    fp16 = {"enabled": True, "initial_scale_power": scale, "hysteresis": 1}
    recipe.deepspeed = {"zero_optimization": {"stage": stage}, "fp16": fp16}
    return recipe


def train(topology, recipe: Recipe, run: Path, *arguments) -> tuple[str | None, list[str]]:
    """Train as a GPU would; returns how it ended, and what it said."""
    from deepspeed.accelerator import get_accelerator

    from lsmoe_ds.training.monitor import Monitor

    said: list[str] = []
    with (
        mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True),  # in torch, all CPUs do
        mock.patch.object(Monitor, "say", lambda self, text: said.append(text)),
    ):
        return loop(topology, recipe, run, *arguments), said


def records(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def skipped_in(said: list[str]) -> list[int]:
    return [int(text.split()[1]) for text in said if "is skipped" in text]


@pytest.mark.parametrize(("world", "expert", "stage"), [(1, 1, 1), (2, 2, 2), (2, 2, 0)])
def test_steps_that_overflow_are_skipped_counted_and_said(pool, folder, world, expert, stage):
    recipe, run = in_float16(folder, expert, stage), folder / f"run-{world}-{stage}"
    results = pool.run(world, train, recipe, run, expert=expert)
    assert [ended for ended, _ in results] == [None] * world
    said = results[0][1]
    skipped = skipped_in(said)
    assert 4 <= len(skipped) < STEPS and skipped == list(range(1, len(skipped) + 1)), "until the scale fits"
    assert all(skipped_in(of_rank) == skipped for _, of_rank in results)
    last, scale = skipped[-1], 2 ** (SCALE - len(skipped))
    assert f"step {last} is skipped: its gradients overflow float16; the loss scale is now {scale:g}" in said
    found = records(run)
    assert sum(line.get("skipped", 0) for line in found) == len(skipped)
    for line in found:  # every second step
        was_skipped = line["step"] in skipped
        assert (line["grad_norm"] is None) == was_skipped and line.get("skipped", 0) <= 2
        assert was_skipped or 0 < line["grad_norm"] < 100, "without the scale"
    before = weights(run, 1)
    for step in range(2, STEPS + 1):
        after = weights(run, step)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert bool(changed) == (step not in skipped), f"step {step}"
        before = after


def test_too_many_skipped_steps_in_a_row_end_the_run_with_what_to_do(pool, folder):
    recipe, run = in_float16(folder, expert=2, max_skipped=2), folder / "run-ended"
    for ended, said in pool.run(2, train, recipe, run, expert=2):
        assert skipped_in(said) == [1, 2, 3]
        assert ended.startswith("step 3: gradients overflow float16 in 3 steps in a row, and training.max_")
        assert "max_skipped is 2; the loss scale is now 3.35544e+07: train in bf16 or float32, or" in ended
        assert ended.endswith(f"the last good checkpoint is {run / 'checkpoints' / 'step-2'}")
    assert [path.name for path in list_checkpoints(run)] == ["step-1", "step-2"]


def test_a_scale_that_cannot_fall_skips_and_ends_alike(pool, folder):
    """Where DeepSpeed itself would raise an exception without a name."""
    recipe, run = in_float16(folder, max_skipped=3), folder / "run-least"
    recipe.deepspeed["fp16"]["min_loss_scale"] = 2**27
    ((ended, said),) = pool.run(1, train, recipe, run)
    assert skipped_in(said) == [1, 2, 3, 4] and "the loss scale is now 1.34218e+08: train in bf16" in ended


def test_no_skipped_step_is_allowed(pool, folder):
    ((ended, _),) = pool.run(1, train, in_float16(folder, max_skipped=0), folder / "run-none")
    assert ended.startswith("step 1: gradients overflow float16 in 1 step in a row, and training.max_skipped")
    assert ended.endswith("no checkpoint was saved yet")


def test_an_interrupted_run_ends_bit_equal(pool, folder):
    """Cut off among the skipped steps, so that the scale must be part of the checkpoint."""
    whole, cut = folder / "run-1-1", folder / "run-cut"
    if not whole.exists():
        pool.run(1, train, in_float16(folder), whole)
    pool.run(1, train, in_float16(folder), cut, 3, KeyboardInterrupt())
    assert [path.name for path in list_checkpoints(cut)] == ["step-1", "step-2"]
    ((ended, said),) = pool.run(1, train, in_float16(folder), cut)
    assert ended is None and skipped_in(said)[0] == 3
    assert_same_end(whole, cut, STEPS)
    shutil.rmtree(cut)


def spoil(topology, recipe: Recipe, run: Path, what: str):
    from deepspeed.accelerator import get_accelerator
    from support.loops import spoil as true_spoil

    with mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True):
        return true_spoil(topology, recipe, run, what)


def test_a_loss_that_is_not_finite_ends_the_run_in_float16_too(pool, folder):
    """No loss scale mends it."""
    recipe = in_float16(folder, scale=4)
    (message,) = pool.run(1, spoil, recipe, folder / "run-loss", "loss")
    assert message.startswith("step 5: the loss is nan") and "step-4" in message


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_is_not_finite_ends_a_run_in_bfloat16(pool, folder, stage):
    recipe, run = in_float16(folder, stage=stage), folder / f"run-bf16-{stage}"
    recipe.deepspeed = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    (message,) = pool.run(1, spoil, recipe, run, "gradient")
    assert message.startswith("step 5: the gradient norm is not finite")
    assert str(run / "checkpoints" / "step-4") in message

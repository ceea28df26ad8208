"""On a GPU: short trainings in bfloat16 through the command, and what they save."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe, write_corpus

from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.data.prepare import prepare

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    write_corpus(path)
    prepare(make_recipe(path, None, None))
    return path


@pytest.fixture(scope="module")
def ranks(device) -> int:
    """Two where there are two GPUs, over which the experts are spread."""
    return 2 if device.type == "cpu" or torch.cuda.device_count() > 1 else 1


SETTINGS = [f"training.steps={STEPS}", "training.log_every=1", "training.learning_rate=0.003"]
SETTINGS += ["training.max_grad_norm=1", "training.dropout=0.1", "training.attention_dropout=0.1"]
SETTINGS += ["data.batch.tokens=96"]


def train(
    folder: Path, device: torch.device, ranks: int, run: str, stage: int, precision: str | None, *changes: str
) -> Path:
    """Run ``lsmoe train`` as a person would; returns the run's folder."""
    recipe = make_recipe(folder, TOKEN_TOP2, TARGET_TOP2, expert=ranks, stage=stage)
    if precision is not None:
        recipe.deepspeed = {**recipe.deepspeed, precision: {"enabled": True}}
    (folder / f"{run}.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "lsmoe_ds", "train", str(folder / f"{run}.yaml"), "--nproc", str(ranks)]
    command += ["--out", str(folder / run)]
    for change in (*SETTINGS, *changes):
        command += ["--set", change]
    environment = {**os.environ, "DS_ACCELERATOR": device.type}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / run


def numbers(run: Path, key: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line[key] for line in lines if "loss" in line]


def test_zero_1_and_2_train_alike_in_bfloat16(folder, device, ranks):
    without = ("training.dropout=0", "training.attention_dropout=0", "training.steps=2")
    exact = train(folder, device, ranks, "float32", 1, None, *without)
    runs = [train(folder, device, ranks, f"zero-{stage}", stage, "bf16", *without) for stage in (1, 2)]
    for key, apart in (("loss", 0.02), ("grad_norm", 0.1)):
        wanted = numbers(exact, key)
        first, second = (numbers(run, key) for run in runs)
        assert len(wanted) == 2 and all(map(math.isfinite, first))
        assert first == pytest.approx(wanted, rel=apart)
        assert second == pytest.approx(first, rel=apart / 4)


def test_adam_on_the_host_trains_as_on_the_device(folder, device, ranks):
    on_host = "training.adam={offload: true}"
    wanted = train(folder, device, ranks, "on-device", 1, "bf16")
    train(folder, device, ranks, "on-host", 1, "bf16", on_host, "training.steps=2")
    found = train(folder, device, ranks, "on-host", 1, "bf16", on_host)
    for key in ("loss", "grad_norm"):
        assert numbers(found, key) == pytest.approx(numbers(wanted, key), rel=1e-3)


def test_float16_trains_and_says_what_it_skips(folder, device, ranks):
    if device.type == "cpu":
        pytest.skip("DeepSpeed does not train in float16 on this CPU")
    run = train(folder, device, ranks, "float16", 1, "fp16", "training.steps=40", "training.log_every=1")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 40 and losses[-1] < losses[0]
    assert all((line["grad_norm"] is None) == bool(line.get("skipped")) for line in lines if "loss" in line)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_deterministic_run_resumes_to_the_bit(folder, device, ranks, stage):
    always = ("training.deterministic=true",)
    whole = train(folder, device, ranks, f"whole-{stage}", stage, "bf16", *always)
    cut = f"cut-{stage}"
    train(folder, device, ranks, cut, stage, "bf16", *always, "training.steps=2")
    run = train(folder, device, ranks, cut, stage, "bf16", *always)
    assert numbers(run, "loss") == numbers(whole, "loss") and len(numbers(run, "loss")) == STEPS
    first, second = (read_checkpoint(each / "checkpoints" / f"step-{STEPS}").weights for each in (whole, run))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name

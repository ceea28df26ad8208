"""Training goes on exactly where it was cut off, and stops rather than spoil what it has."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from support.loops import PAIR_GROUPS, assert_same_end, loop, recipe_in, records, spoil
from support.small_run import TARGET_TOP2, TOKEN_TOP2, write_corpus

from lsmoe_ds.checkpoint.run_folder import list_checkpoints, newest_whole, step_of
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.data.batches import Step
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files, locked, write_json
from lsmoe_ds.launch.processes import free_port
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.parallel.collectives import Traffic
from lsmoe_ds.training.engine import StepResult
from lsmoe_ds.training.monitor import Monitor
from lsmoe_ds.training.schedules import learning_rate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("training")
    write_corpus(path)
    prepare(recipe_in(path))
    return path


LAYOUTS = [
    (1, 1, 1, 1, TARGET_TOP2),
    (2, 1, 2, 0, TARGET_TOP2),
    (2, 2, 1, 1, TOKEN_TOP2),
    (2, 1, 1, 1, None),
    (4, 2, 2, 2, TARGET_TOP2),
]
LAYOUTS += [(2, 1, 2, 1, PAIR_GROUPS)]


@pytest.mark.parametrize(("world", "tensor", "expert", "stage", "moe"), LAYOUTS)
def test_interrupted_run_ends_bit_equal(pool, folder, world, tensor, expert, stage, moe):
    recipe = recipe_in(folder, moe=moe, tensor=tensor, expert=expert, stage=stage)
    check_interrupted(
        pool,
        recipe,
        folder / f"run-{world}{tensor}{expert}{stage}",
        world,
        {"tensor": tensor, "expert": expert},
    )


def test_interrupted_run_with_noisy_gates_ends_bit_equal(pool, folder):
    """Their noise grows with the steps; with four micro-batches a step each is computed ahead and again."""
    recipe = recipe_in(folder, moe=TOKEN_TOP2)
    recipe.model.clsr = Clsr(gate=4)
    check_interrupted(pool, recipe, folder / "run-gates", 1, {})
    assert all(0 < line["gates"] < 1 for line in records(folder / "run-gates-cut") if "gates" in line)


def check_interrupted(pool, recipe, run: Path, world: int, sizes: dict[str, int]) -> None:
    whole, cut = (run.with_name(f"{run.name}-{name}") for name in ("whole", "cut"))
    pool.run(world, loop, recipe, whole, **sizes)
    # Step 3 is saved between two records (every second step), so the averages begun must be part of the
    # checkpoint.
    pool.run(world, loop, recipe, cut, 5, KeyboardInterrupt(), **sizes)
    assert [p.name for p in list_checkpoints(cut)] == ["step-3"]
    pool.run(world, loop, recipe, cut, **sizes)
    assert_same_end(whole, cut, 6)
    found = records(whole)
    losses = {line["step"]: line["loss"] for line in found if "loss" in line}
    dev = {line["step"]: line["dev_loss"] for line in found if "dev_loss" in line}
    assert list(losses) == [2, 4, 6] and losses[6] < losses[2]
    assert list(dev) == [3, 6] and dev[6] < dev[3]


def test_the_rate_of_each_step_is_that_of_the_schedule(pool, folder):
    """Also after resuming."""
    recipe, run = recipe_in(folder, steps=6), folder / "run-linear"
    recipe.training.schedule, recipe.training.log_every = "linear", 1
    pool.run(1, loop, recipe, run, 5, KeyboardInterrupt())
    pool.run(1, loop, recipe, run)
    found = {line["step"]: line["learning_rate"] for line in records(run) if "learning_rate" in line}
    peak = recipe.training.learning_rate  # of the first step
    assert found == pytest.approx({step: peak * (7 - step) / 6 for step in range(1, 7)})


def test_damaged_checkpoint_is_named_and_the_one_before_used(pool, folder):
    recipe, run = recipe_in(folder, steps=9), folder / "run-damaged"
    pool.run(1, loop, recipe, run)
    newest = run / "checkpoints" / "step-9" / "mp_rank_00_model_states.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    found, complaints = newest_whole(run)
    assert found == run / "checkpoints" / "step-6"
    assert "step-9/mp_rank_00_model_states.pt" in complaints[0]
    (run / "checkpoints" / "step-6" / "manifest.json").write_text("{")
    with pytest.raises(
        UserError, match=r"no checkpoint .* is whole .*step-9.*step-6/manifest.json is missing or damaged"
    ):
        newest_whole(run)


def test_what_was_being_written_is_no_checkpoint(pool, folder):
    recipe, run = recipe_in(folder, steps=3), folder / "run-partial"
    partial = run / "checkpoints" / ".writing-step-3"
    pool.run(1, loop, recipe, run, 1, KeyboardInterrupt())
    partial.mkdir(parents=True)
    (partial / "mp_rank_00_model_states.pt").write_bytes(b"half")
    assert list_checkpoints(run) == []
    pool.run(1, loop, recipe, run)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-3"]


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("file", ["random-rank-00000.pt", "mp_rank_00_model_states.pt"])
def test_nothing_in_a_checkpoint_can_run_code(pool, folder, file):
    recipe, run = recipe_in(folder, steps=6), folder / f"run-bomb-{file}"
    pool.run(1, loop, recipe_in(folder, steps=3), run)
    checkpoint, traces = run / "checkpoints" / "step-3", folder / f"exploded-{file}"
    torch.save({"cpu": Bomb(traces), "module": Bomb(traces)}, checkpoint / file)
    names = [p.name for p in checkpoint.iterdir() if p.name != "manifest.json"]
    write_json(
        checkpoint / "manifest.json", {"files": describe_files(checkpoint, names)}
    )  # the attacker knows of checksums
    (message,) = pool.run(1, loop, recipe, run)
    assert "could run code: it is not loaded" in message
    assert not traces.exists()


SPOILED = [("loss", 1, 1, 1.0), ("gradient", 1, 0, 1.0), ("gradient", 1, 0, 0.0), ("gradient", 2, 1, 1.0)]


@pytest.mark.parametrize(("what", "world", "stage", "clip"), SPOILED)
def test_non_finite_stops_with_step_directions_and_last_checkpoint(pool, folder, what, world, stage, clip):
    recipe, run = recipe_in(folder, stage=stage), folder / f"run-spoiled-{what}-{world}-{clip}"
    recipe.training.max_grad_norm = clip
    messages = pool.run(world, spoil_worker, recipe, run, what)
    for message in messages:
        assert message.startswith("step 5: the "), message
        assert ("loss is" if what == "loss" else "gradient norm is not finite") in message
        assert "the directions in the batch: " in message and "en-" in message
        assert str(run / "checkpoints" / "step-3") in message
    assert [p.name for p in list_checkpoints(run)] == ["step-3"]


spoil_worker = spoil  # what a worker imports by name


def test_schedule():
    rates = [learning_rate(step, 64, 2.0, 4, "inverse_square_root") for step in (1, 2, 4, 16, 64)]
    assert rates == pytest.approx([0.5, 1.0, 2.0, 1.0, 0.5])
    assert learning_rate(1, 64, 2.0, 0, "inverse_square_root") == 2.0
    rates = [learning_rate(step, 11, 2.0, 4, "linear") for step in (2, 4, 6, 8, 11, 12)]
    assert rates == pytest.approx([1.0, 2.0, 1.5, 1.0, 0.25, 0.0])
    rates = [learning_rate(step, 11, 2.0, 4, "cosine") for step in (2, 4, 6, 8, 11, 12)]
    assert rates == pytest.approx([1.0, 2.0, 1 + 2**-0.5, 1.0, 1 - math.cos(math.pi / 8), 0.0])
    assert [learning_rate(step, 2, 2.0, 0, "linear") for step in (1, 2, 3)] == [2.0, 1.0, 0.0]


def ranks(recipe_file: Path, run: Path, world: int = 2) -> list[subprocess.Popen]:
    """`lsmoe train` as a launcher starts it."""
    port = str(free_port())
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-m", "lsmoe_ds", "train", str(recipe_file), "--out", str(run)]
    return [
        subprocess.Popen(command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(world)
    ]


@pytest.mark.slow
def test_sigkill_of_the_command_and_of_everything(pool, folder):
    """Killed alone, it leaves ranks that train on: no second command writes there. All killed, the next goes
    on.
    """
    recipe = recipe_in(folder, steps=24, every=4, expert=2)
    file = folder / "killed.yaml"
    file.write_text(recipe.to_yaml())
    whole, killed = folder / "run-not-killed", folder / "run-killed"
    assert pool.run(2, loop, recipe, whole, expert=2) == [None, None]
    command = subprocess.Popen(
        [sys.executable, "-m", "lsmoe_ds", "train", str(file), "--out", str(killed), "--nproc", "2"]
    )
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-8").exists():
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.01)
    others = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.wait()
    with pytest.raises(UserError, match="another process is writing"), locked(killed):
        pass
    for process in others:
        process.kill()
    psutil.wait_procs(others, 60)
    saved = list_checkpoints(killed)
    assert saved and step_of(saved[-1]) < 24, "it was killed too late to test anything"
    processes = ranks(file, killed)
    while list_checkpoints(killed) == saved:
        assert all(p.poll() is None for p in processes)
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is writing"), locked(killed):
        pass  # ranks that nobody of ours has started hold it themselves
    assert [p.wait(120) for p in processes] == [0, 0]
    assert_same_end(whole, killed, 24)
    shutil.rmtree(killed)


def test_task_affine_batches_exchange_counts_only(pool, folder):
    """Two groups of pairs, two ranks: every batch finds its experts at home, so no row leaves its rank."""
    found = {}
    for name, languages in (("affine", "task-affine"), ("mixed", "mixed")):
        recipe = recipe_in(folder, moe=PAIR_GROUPS, expert=2)
        recipe.data.batch.languages = languages
        pool.run(2, loop, recipe, folder / f"run-{name}", expert=2)
        found[name] = [
            record
            for record in records(folder / f"run-{name}", with_bytes=True)
            if "exchanged_bytes" in record
        ]
    layers, batches, ranks = 2, 4, 2
    for record in found["affine"]:
        assert record["away"] == 0
        assert record["exchanged_bytes"] == layers * batches * 16 * (ranks - 1), (
            "two counts for each other rank"
        )
    assert all(record["exchanged_bytes"] > 100 * layers * batches for record in found["mixed"])
    assert found["affine"][-1]["loss"] < found["affine"][0]["loss"]


def test_exchange_is_told_by_side(pool, folder):
    """Encoder by token, decoder by pair with every batch at home: the encoder's rows travel, of the decoder
    only counts.
    """
    recipe, run = recipe_in(folder, moe=PAIR_GROUPS, expert=2), folder / "run-sides"
    recipe.model.encoder.moe = MoE(**TOKEN_TOP2)
    pool.run(2, loop, recipe, run, expert=2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert len(lines) == 3
    layers, batches, ranks, passes = (
        1,
        4,
        2,
        2,
    )  # one pass ahead of the step, since the encoder's routers read hidden states
    for line in lines:
        counts = layers * batches * passes * 16 * (ranks - 1)
        assert line["exchanged_bytes_decoder"] == counts
        assert line["exchanged_bytes_encoder"] > 100 * counts
        assert line["exchanged_bytes"] == line["exchanged_bytes_encoder"] + line["exchanged_bytes_decoder"]
        shares = [line["exchange_share_encoder"], line["exchange_share_decoder"]]
        assert all(0 < share < 1 for share in shares), "counts take time too"
        assert line["exchange_share"] == pytest.approx(sum(shares)) and line["exchange_share"] < 1


def test_exchange_is_of_the_ranks_time_and_of_its_window(tmp_path):
    """Two steps a record, ten seconds each on two ranks: twenty seconds of the ranks' time a step."""
    step = Step(batches=[], target_tokens=10, source_tokens=10, sentences=1, directions=[])
    with Monitor(tmp_path, steps=4, every=2, main=True, world=2) as monitor:
        monitor.start(0, None)
        for number, scale in enumerate((1, 3, 0, 0), start=1):
            exchanged = {
                "encoder": Traffic(100 * scale, scale, 2.0 * scale),
                "decoder": Traffic(10 * scale, scale, 1.0 * scale),
            }
            monitor.pause(-10)
            monitor.after_step(number, step, StepResult({"loss": 1.0}, None, 1.0, exchanged))
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    ends = ("", "_encoder", "_decoder")
    assert [first[f"exchanged_bytes{end}"] for end in ends] == [220, 200, 20]
    assert [first[f"exchange_share{end}"] for end in ends] == pytest.approx([0.3, 0.2, 0.1], rel=0.05)
    assert all(second[f"exchange{name}{end}"] == 0 for name in ("d_bytes", "_share") for end in ends)

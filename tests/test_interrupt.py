"""Asked to stop, all ranks save after the same step, leave, and go on later as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from small_run import write_corpus
from test_training import assert_same_end, loop, recipe_in, records

from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.parallel import interrupt
from lsmoe_ds.run_folder import list_checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("interrupt")
    write_corpus(path)
    prepare(recipe_in(path))
    return path


def interrupted(topology, recipe, run, number: int) -> bool:
    """Trains; the last rank alone gets a signal in step 4. Returns whether training came to its end."""
    from lsmoe_ds.run_folder import open_run
    from lsmoe_ds.training import loop as module

    handlers = [(each, signal.getsignal(each)) for each in interrupt.SIGNALS]
    interrupt.install()
    true_step = module.train_step

    def step(engine, batch, at, *arguments):
        if at == 4 and topology.rank == topology.world - 1:
            os.kill(os.getpid(), number)
        return true_step(engine, batch, at, *arguments)

    module.train_step = step
    try:
        if topology.is_main:
            open_run(recipe, run, recipe.prepared / "vocabulary.model")
        return module.train(recipe, run, topology)
    finally:
        module.train_step = true_step
        for each, handler in handlers:
            signal.signal(each, handler)


@pytest.mark.parametrize(("world", "tensor", "number"), [(1, 1, signal.SIGTERM), (2, 2, signal.SIGUSR1)])
def test_all_ranks_save_and_leave_after_the_same_step(pool, folder, world, tensor, number):
    recipe = recipe_in(folder, tensor=tensor)
    whole, cut = folder / f"whole-{world}", folder / f"cut-{world}"
    pool.run(world, loop, recipe, whole, tensor=tensor)
    assert pool.run(world, interrupted, recipe, cut, number, tensor=tensor) == [False] * world
    assert [path.name for path in list_checkpoints(cut)] == ["step-3", "step-4"]
    assert pool.run(world, loop, recipe, cut, tensor=tensor) == [None] * world
    assert_same_end(whole, cut, 6)


def test_in_the_last_step_it_is_finished(pool, folder):
    recipe = recipe_in(folder, steps=4)
    assert pool.run(1, interrupted, recipe, folder / "last", signal.SIGTERM) == [True]


@pytest.mark.slow
def test_the_command_passes_signals_on_to_its_ranks(folder):
    recipe = recipe_in(folder, steps=2000, every=1000, expert=2)
    file, run = folder / "long.yaml", folder / "long"
    file.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "lsmoe_ds", "train", str(file), "--out", str(run), "--nproc", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=120)
    assert process.returncode == interrupt.STATUS, said
    (saved,) = list_checkpoints(run)
    step = int(saved.name.removeprefix("step-"))
    assert 2 <= step < 1000 and f"SIGUSR1: saved after step {step}; the same command goes on" in said
    shorter = recipe_in(folder, steps=step + 4, every=1000, expert=2)
    file.write_text(shorter.to_yaml())
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    steps = [record["step"] for record in records(run) if "loss" in record]
    assert steps == sorted({*range(2, step + 5, 2), step + 4}), "no step is missing and none is told twice"

"""Asked to stop, a training saves and resumes later as if nothing had been; every command leaves with one
line and its status.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.loops import assert_same_end, loop, recipe_in, records
from support.running_commands import Command, records_in
from support.small_run import write_corpus

from lsmoe_ds import interrupt
from lsmoe_ds.checkpoint.run_folder import list_checkpoints, step_of
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError
from lsmoe_ds.launch.processes import free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("interrupt")
    write_corpus(path)
    prepare(recipe_in(path))
    return path


def interrupted(topology, recipe, run, number: int, at_step: int = 4) -> int | None:
    """Train; the last rank alone gets a signal in a step, or before the first. Returns what training
    returns.
    """
    from lsmoe_ds.checkpoint.run_folder import open_run
    from lsmoe_ds.training import loop as module

    true_step = module.train_step

    def step(engine, batch, at, *arguments):
        if at == at_step and topology.rank == topology.world - 1:
            os.kill(os.getpid(), number)
        return true_step(engine, batch, at, *arguments)

    with interrupt._restored():
        interrupt.save_and_leave(alone=topology.world == 1)
        module.train_step = step
        try:
            if topology.is_main:
                open_run(recipe, run, recipe.prepared / "vocabulary.model")
            if at_step == 0 and topology.rank == topology.world - 1:
                os.kill(os.getpid(), number)
            return module.train(recipe, run, topology)
        finally:
            module.train_step = true_step


WAYS = [(1, 1, signal.SIGTERM), (2, 2, signal.SIGUSR1), (1, 1, signal.SIGINT)]


@pytest.mark.parametrize(("world", "tensor", "number"), WAYS)
def test_all_ranks_save_and_leave_after_the_same_step(pool, folder, world, tensor, number):
    recipe = recipe_in(folder, tensor=tensor)
    whole, cut = folder / f"whole-{world}-{number}", folder / f"cut-{world}-{number}"
    pool.run(world, loop, recipe, whole, tensor=tensor)
    assert pool.run(world, interrupted, recipe, cut, number, tensor=tensor) == [number] * world
    assert [path.name for path in list_checkpoints(cut)] == ["step-3", "step-4"]
    assert pool.run(world, loop, recipe, cut, tensor=tensor) == [None] * world
    assert_same_end(whole, cut, 6)


def test_in_the_last_step_it_is_finished(pool, folder):
    recipe = recipe_in(folder, steps=4)
    assert pool.run(1, interrupted, recipe, folder / "last", signal.SIGTERM) == [None]


def test_before_the_first_step_no_step_is_taken(pool, folder):
    recipe = recipe_in(folder, steps=4)
    assert pool.run(2, interrupted, recipe, folder / "first", signal.SIGUSR1, 0) == [signal.SIGUSR1] * 2
    assert not list_checkpoints(folder / "first")


# --- the command, in processes forked from one that has imported everything


def slow_steps() -> None:
    """Make the third step last a minute; it creates the file $SLOW as it begins."""
    from lsmoe_ds.training import loop as module

    true_step = module.train_step

    def step(engine, batch, number, *arguments):
        if number > 2:
            Path(os.environ["SLOW"]).touch()
            time.sleep(60)
        return true_step(engine, batch, number, *arguments)

    module.train_step = step


def test_one_process_saves_and_leaves_with_the_promised_status(folder):
    recipe, run, file = recipe_in(folder, steps=20000, every=10000), folder / "one", folder / "one.yaml"
    file.write_text(recipe.to_yaml())
    last = 0
    for numbers, status, name in (
        ((signal.SIGINT,), 130, r"SIGINT \(Ctrl-C\)"),
        ((signal.SIGTERM, signal.SIGTERM), 75, "SIGTERM"),
        # Sent in the same moment, they may reach two threads of the process: either may be the first.
        ((signal.SIGUSR1, signal.SIGTERM), 75, "SIG(?:USR1|TERM)"),
    ):
        training, before = Command(folder / "one.log", "train", file, "--out", run), records_in(run)
        training.wait_for(lambda before=before: records_in(run) > before + 1)
        found, said = training.asked(*numbers)
        assert found == status, said
        saved = re.search(rf"^{name}: saved after step (\d+); the same command resumes$", said, re.MULTILINE)
        assert saved and "Traceback" not in said, said
        assert int(saved[1]) == step_of(list_checkpoints(run)[-1]) > last
        last = int(saved[1])


@pytest.mark.parametrize(("verb", "ignored"), [("train", True), ("plan", True)])
def test_a_signal_at_the_end_of_the_interpreter_changes_no_status(verb, ignored):
    program = (
        "import signal, sys; from lsmoe_ds.__main__ import main\ntry: main()\nfinally: "
        "print(signal.getsignal(signal.SIGTERM).name)"
    )
    done = subprocess.run([sys.executable, "-c", program, verb, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == ("SIG_IGN" if ignored else "SIG_DFL"), (
        done.stderr
    )


def test_a_second_ctrl_c_does_not_wait_for_the_step(folder):
    file, run, begins = folder / "slow.yaml", folder / "slow", folder / "begins"
    file.write_text(recipe_in(folder, steps=20).to_yaml())
    training = Command(folder / "slow.log", "train", file, "--out", run, before=slow_steps, SLOW=str(begins))
    # Not a moment earlier: a signal during a short step is answered at that step's end, and the second finds
    # nobody.
    training.wait_for(begins.exists)
    begun = time.monotonic()
    status, said = training.asked(signal.SIGINT, signal.SIGINT, after=interrupt.AGAIN + 0.1)
    assert status == 130 and time.monotonic() - begun < 10
    assert "SIGINT (Ctrl-C) again: leaving at once" in said and "Traceback" not in said


def note_that_it_joins() -> None:
    from lsmoe_ds.launch import joining

    true_open = joining._open_store

    def noted(membership):
        Path(os.environ["JOINS"]).touch()
        return true_open(membership)

    joining._open_store = noted


@pytest.mark.parametrize(
    ("rank", "number", "status"), [(0, signal.SIGTERM, 75), (1, signal.SIGTERM, 75), (1, signal.SIGINT, 130)]
)
def test_while_others_are_missing_it_leaves_at_once(folder, tmp_path, rank, number, status):
    """Rank 1 waits for rank 0 in a call into C, where no handler runs."""
    file, port = folder / "missing.yaml", str(free_port())
    file.write_text(recipe_in(folder, steps=20).to_yaml())
    environment = {
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "JOINS": str(tmp_path / "joins"),
    }
    waiting = Command(
        tmp_path / "log", "train", file, "--out", tmp_path / "run", before=note_that_it_joins, **environment
    )
    waiting.wait_for((tmp_path / "joins").exists)
    time.sleep(0.3)
    found, said = waiting.asked(number)
    where = f", waiting for {f'rank 0 at 127.0.0.1:{port}' if rank else 'the other ranks'}"
    who = ("rank 1: " if rank else "") + interrupt.name_of(number)
    assert found == status
    own = [
        line for line in said.splitlines() if line.startswith("lsmoe: ")
    ]  # torch, imported before its log level is set, adds some
    assert own == [
        f"lsmoe: {who} before the first step{where}: nothing to save; the same command starts again"
    ]


def slow_imports() -> None:
    from lsmoe_ds.config import file as recipe_file

    def load_recipe(*arguments):
        Path(os.environ["REACHED"]).touch()
        time.sleep(1)
        raise UserError("this recipe is refused")

    recipe_file.load_recipe = load_recipe


@pytest.mark.parametrize(
    ("rank", "number", "status"), [(1, signal.SIGTERM, 2), (0, signal.SIGTERM, 2), (1, signal.SIGUSR1, 75)]
)
def test_a_launcher_that_ends_the_other_ranks_does_not_hide_why_one_has_failed(
    tmp_path, rank, number, status
):
    """A slower rank is told SIGTERM when a faster one has been refused: srun takes the highest status of all
    for its own.
    """
    environment = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    slower = Command(
        tmp_path / "log",
        "train",
        "r.yaml",
        before=slow_imports,
        REACHED=str(tmp_path / "reached"),
        **environment,
    )
    slower.wait_for((tmp_path / "reached").exists)
    found, said = slower.asked(number)
    assert found == status and ("this recipe is refused" in said) == (status == 2), said


def stuck_in_c() -> None:
    """Make the preparation of data hang in a call into C."""
    from lsmoe_ds.data import preparation as module

    interrupt.GRACE = 0.2

    def train_vocabulary(*arguments):
        Path(os.environ["REACHED"]).touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

    module.train_vocabulary = train_vocabulary


def stuck_in_python() -> None:
    from lsmoe_ds.data import preparation as module

    def train_vocabulary(*arguments):
        Path(os.environ["REACHED"]).touch()
        time.sleep(60)

    module.train_vocabulary = train_vocabulary


@pytest.mark.parametrize("stuck", [stuck_in_python, stuck_in_c])
def test_ctrl_c_ends_a_preparation_with_one_line_and_keeps_the_data_of_before(folder, tmp_path, stuck):
    recipe = recipe_in(folder)
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"directory": tmp_path / "data"})}
    )
    prepare(recipe)
    manifest = (recipe.prepared / "manifest.json").read_bytes()
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    preparing = Command(
        tmp_path / "log", "data", "prepare", file, "--force", before=stuck, REACHED=str(tmp_path / "reached")
    )
    preparing.wait_for((tmp_path / "reached").exists)
    status, said = preparing.asked(signal.SIGINT)
    assert (
        status == 130 and said.count("lsmoe: stopped by SIGINT (Ctrl-C)\n") == 1 and "Traceback" not in said
    )
    assert (recipe.prepared / "manifest.json").read_bytes() == manifest
    if stuck is stuck_in_python:
        # What was finished stays beside, for the next preparation.
        folders = {path.name for path in recipe.prepared.parent.iterdir() if path.is_dir()}
        assert folders == {recipe.name, f".{recipe.name}.work"}


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_of_several_processes(folder):
    """As a terminal sends it: to the command, the launcher and the ranks."""
    recipe = recipe_in(folder, steps=2000, every=1000, expert=2)
    file, run = folder / "long.yaml", folder / "long"
    file.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "lsmoe_ds", "train", str(file), "--out", str(run), "--nproc", "2"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def wait_for(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not there():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)

    process = start()
    wait_for(process, lambda: bool(psutil.Process(process.pid).children()))  # the launcher imports
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (75, "lsmoe: stopped by SIGTERM\n") and not list_checkpoints(run)

    process = start()
    wait_for(process, lambda: records_in(run) > 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    (saved,) = list_checkpoints(run)
    step = step_of(saved)
    assert process.returncode == 130 and 2 <= step < 1000, said
    lines = said.splitlines()
    assert (
        lines[-1] == f"SIGINT (Ctrl-C): saved after step {step}; the same command resumes"
        and "Traceback" not in said
    )
    usual = r"2 ranks on|every 3 steps it validates|step 1/2000 · loss|step \d+: dev loss"
    assert [line for line in lines[:-1] if not re.match(usual, line)] == []

    shorter = recipe_in(folder, steps=step + 4, every=1000, expert=2)
    file.write_text(shorter.to_yaml())
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    end = f"lsmoe: {run} is trained, its last checkpoint is step-{step + 4}; next: lsmoe evaluate {run}"
    assert done.stderr.splitlines().count(end) == 1 and done.stderr.splitlines()[-1] == end
    steps = [record["step"] for record in records(run) if "loss" in record]
    assert steps == sorted({*range(2, step + 5, 2), step + 4}), "no step is missing and none is told twice"

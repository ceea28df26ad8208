"""`lsmoe train` killed by SIGKILL at many instants, while saving too, and started again each time, ends as if
nothing had been.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from support.loops import EVERY, KEEP, recipe_of, records
from support.small_run import write_corpus
from support.workers import PRELOAD

from lsmoe_ds.checkpoint.run_folder import find_damage, list_checkpoints, step_of
from lsmoe_ds.checkpoint.saving import UNFINISHED
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.folders import read_json
from lsmoe_ds.launch import watchdog
from lsmoe_ds.launch.processes import free_port
from lsmoe_ds.parallel import compat

PATIENCE = 400.0
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("killed")
    write_corpus(path)
    prepare(recipe_of(path, 2))
    return path


def command(file: Path, run: Path, environment: dict[str, str], step: int, last: int | None) -> None:
    """`lsmoe train`, as a process of its own. Of the file operations of the save after ``step``, background
    and removals of older checkpoints included, it is killed at number ``last``; without, their number is
    written to ``operations``.
    """
    with run.with_name(f"{run.name}.log").open("a") as log:
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update(environment)
    begin, end, done = f"{UNFINISHED}step-{step}", f"{UNFINISHED}step-{step + EVERY}", -1

    def note(event: str, arguments: tuple) -> None:
        nonlocal done
        if event not in FILE_OPERATIONS:
            return
        if done < 0 and not (event == "os.mkdir" and str(arguments[0]).endswith(begin)):
            return
        # A tree is removed by names within it, so the paths of removals do not tell of whose.
        if event in ("os.remove", "os.rmdir") or str(arguments[0]).startswith(str(run / "checkpoints")):
            done += 1
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
        if last is None and event == "os.mkdir" and str(arguments[0]).endswith(end):
            end_of_save = run.with_name(f"{run.name}.operations")
            done, _ = -1, end_of_save.write_text(str(done))

    sys.addaudithook(note)
    sys.argv = ["lsmoe", "train", str(file), "--out", str(run)]
    from lsmoe_ds.cli import main

    main()


class Training:
    """A run, its processes forked from one that has imported everything."""

    def __init__(self, recipe, run: Path, world: int = 1) -> None:
        self.run, self.world, self.file, self.log = (
            run,
            world,
            run.with_name(f"{run.name}.yaml"),
            run.with_name(f"{run.name}.log"),
        )
        self.file.write_text(recipe.to_yaml())
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def warm_up(self) -> None:
        """So that no later process waits for the imports."""
        process = self._context.Process(target=os.getpid)
        process.start()
        process.join()

    def start(self, rank: int = 0, step: int = 0, operation: int | None = None) -> list:
        """All ranks; ``rank`` is killed at an operation of the save after ``step``."""
        shared = {"WORLD_SIZE": str(self.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = (
            [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(self.world)]
            if self.world > 1
            else [{}]
        )
        processes = []
        for number, environment in enumerate(environments):
            arguments = (self.file, self.run, environment, step, operation if number == rank else -2)
            processes.append(self._context.Process(target=command, args=arguments, daemon=True))
            processes[-1].start()
        return processes

    def wait_for(self, there, processes: list) -> None:
        deadline = time.monotonic() + PATIENCE
        while not there():
            assert time.monotonic() < deadline and all(process.is_alive() for process in processes), (
                self.log.read_text()
            )
            time.sleep(0.001)

    def kill(self, processes: list) -> None:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

    def end(self) -> None:
        processes = self.start()
        for process in processes:
            process.join(PATIENCE)
        codes = [process.exitcode for process in processes]
        self.kill(processes)
        assert codes == [0] * self.world, self.log.read_text()

    def steps(self) -> list[int]:
        """Of the records of losses; the last line may have been cut off."""
        path, found = self.run / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:
                break
            if "loss" in record:
                found.append(record["step"])
        return found

    def done(self) -> int:
        return max(self.steps(), default=0)

    def newest(self) -> int:
        return max(map(step_of, list_checkpoints(self.run)), default=0)

    def check_what_is_left(self) -> str:
        """Nothing is lost but the steps since the last checkpoint; returns how far the save was that the kill
        found, if any.
        """
        checkpoints = list_checkpoints(self.run)
        assert [find_damage(checkpoint) for checkpoint in checkpoints] == [None] * len(checkpoints)
        done, newest = self.done(), self.newest()
        folder, due = self.run / "checkpoints", done // EVERY * EVERY
        unfinished = [path for path in folder.glob(f"{UNFINISHED}*") if not path.name.endswith("-removed")]
        if unfinished:  # training has gone on until the next save, at most
            (writing,) = unfinished
            step = int(writing.name.removeprefix(f"{UNFINISHED}step-"))
            assert newest == step - EVERY and done <= step + EVERY, (newest, done)
            names = {path.name for path in writing.iterdir()}
            return (
                "syncing" if "manifest.json" in names else "summing" if "state.json" in names else "writing"
            )
        assert newest == due or (newest == due - EVERY and done == due), (newest, done)
        return (
            "removing"
            if list(folder.glob(f"{UNFINISHED}*-removed")) or len(checkpoints) > KEEP + 1
            else "nothing"
        )


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return same(vars(one), vars(other)) if hasattr(one, "__dict__") else one == other


def assert_same(whole: Training, killed: Training, steps: int) -> None:
    """Every record and everything in the last checkpoint: weights, optimizer, random state, position in the
    data.
    """
    assert killed.steps() == list(range(1, steps + 1)), "no step is missing and none is told twice"
    assert records(whole.run) == records(killed.run)
    saves = [
        line["step"]
        for line in map(json.loads, (killed.run / "metrics.jsonl").read_text().splitlines())
        if "save_seconds" in line
    ]
    assert saves == sorted(set(saves))
    folders = [training.run / "checkpoints" for training in (whole, killed)]
    kept = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert kept[0] == kept[1] and f"step-{steps}" in kept[0]
    with compat.trusted_checkpoint_loading():
        for path in (folders[0] / f"step-{steps}").iterdir():
            other = folders[1] / f"step-{steps}" / path.name
            if path.suffix == ".pt":
                assert same(torch.load(path), torch.load(other)), path.name
            elif path.name != "manifest.json":
                assert read_json(path) == read_json(other) is not None, path.name


@pytest.mark.slow
def test_killed_at_25_instants_it_ends_bit_equal(folder):
    steps, draw = 80, random.Random(5)
    recipe = recipe_of(folder, steps)
    whole, killed = Training(recipe, folder / "whole"), Training(recipe, folder / "killed")
    whole.warm_up()
    begun = time.monotonic()
    (process,) = whole.start(step=20)
    whole.wait_for(whole.steps, [process])
    start, begun = time.monotonic() - begun, time.monotonic()
    process.join(PATIENCE)
    assert process.exitcode == 0
    a_step, operations = (time.monotonic() - begun) / steps, int((folder / "whole.operations").read_text())

    ways = ["operation"] * 13 + ["instant"] * 8 + ["start"] * 4
    draw.shuffle(ways)
    numbers = iter(draw.sample([round(operations * (i + draw.random()) / 13) for i in range(13)], 13))
    found = []
    for way in ways:
        before, reached, number = (
            killed.newest(),
            killed.done(),
            next(numbers) if way == "operation" else None,
        )
        # Where the removals of older checkpoints are to be hit, there must be some.
        (process,) = killed.start(
            step=max(before, EVERY * KEEP * 2) + EVERY, operation=-2 if number is None else number
        )
        if way == "instant":  # records of steps that are done again stay until training begins
            reached += draw.randint(1, EVERY)
            killed.wait_for(lambda step=reached: killed.done() >= step, [process])
        if way != "operation":
            instant = time.monotonic() + draw.uniform(0, start if way == "start" else 2 * a_step)
            while (
                time.monotonic() < instant and killed.done() < reached + EVERY
            ):  # or the machine is suddenly faster
                time.sleep(0.001)
            process.kill()
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL, f"{way} {number} came too late"
        found.append((way, killed.check_what_is_left()))
        assert killed.newest() >= before
    assert {"writing", "summing", "syncing", "removing"} <= {stage for _, stage in found}, (
        "every part of a save was hit"
    )
    killed.end()
    assert_same(whole, killed, steps)


@pytest.mark.slow
def test_ranks_killed_together_or_alone(folder):
    steps, draw = 16, random.Random(6)
    recipe = recipe_of(folder, steps, expert=2)
    whole, killed = (Training(recipe, folder / f"{name}-2", world=2) for name in ("whole", "killed"))
    whole.end()

    processes = killed.start()
    killed.wait_for(lambda: killed.done() >= 3, processes)
    time.sleep(draw.uniform(0, 0.1))
    killed.kill(processes)
    killed.check_what_is_left()

    for rank, number, alone in ((0, 6, False), (1, 2, False), (0, 30, False), (1, 1, True), (0, 12, True)):
        processes = killed.start(rank, killed.newest() + EVERY, number)
        processes[rank].join(PATIENCE)
        assert processes[rank].exitcode == -signal.SIGKILL
        if alone:
            processes[1 - rank].join(PATIENCE)
            assert processes[1 - rank].exitcode == watchdog.STATUS, "it does not wait for the other for ever"
        killed.kill(processes)
        killed.check_what_is_left()
    killed.end()
    assert_same(whole, killed, steps)

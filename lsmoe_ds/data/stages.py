"""Share work among processes of any number of machines, and keep what is finished.

Work has stages, and a stage has tasks that depend on nothing but what they name. The process that holds the
lock of the result leads: it publishes the tasks of one stage after another in the work folder, and does them
with its workers. Every other process that makes the same result helps with what is published. Whoever begins
a task claims it by a lock, so that the task of a process that dies is free again; if the leader dies, a
helper leads. A result is a folder named after a digest of all that it depends on: what is there is not done
again, by whatever process, and what depends on anything else has another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lsmoe_ds import __version__
from lsmoe_ds.data.workers import Workers
from lsmoe_ds.folders import claimed, explain_errors, read_json, resolved, write_json, write_whole

RECORD = "record.json"
LEADER = "leader.json"  # who leads: a number of its own, and its settings
TASKS = "tasks.json"  # what it has published
POLL = 0.2  # seconds between two looks at what other processes do

Record = dict[str, Any]
Function = Callable[..., Record]


class Stale(Exception):
    """What a task names is no longer as its name says: the leader that published it is gone."""


@dataclass(frozen=True)
class Task:
    """A call of the function of a stage, with arguments that JSON can hold.

    It writes files into a folder and returns what is noted about them. ``depends`` is everything that the
    result depends on.
    """

    stage: str
    depends: dict[str, Any]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder of the result, below the work folder."""
        content = json.dumps([__version__, self.stage, self.depends], sort_keys=True)
        return f"{self.stage}/{hashlib.sha256(content.encode()).hexdigest()[:32]}"


T = TypeVar("T")


def lead_or_help(
    work: Work,
    result: Path,
    lead: Callable[[], T],
    workers: Callable[[], Workers],
    check: Callable[[dict[str, Any] | None], None],
    say: Callable[[], None],
) -> T:
    """Make a result under its lock by ``lead``; while another process does, help it with ``workers``.

    ``check`` gets the settings of the process that leads, and raises UserError if they are others. ``say`` is
    called once, before this process helps.
    """
    with contextlib.ExitStack() as pool:
        helper: Workers | None = None
        while True:
            with claimed(result) as leads:
                if leads:
                    work.forget_leader()
                    return lead()
            if helper is None:
                say()
                helper = pool.enter_context(workers())
            leader = work.leader()
            check(leader.get("settings"))
            with explain_errors(result):
                work.help(leader.get("run"), helper)


class Work:
    """The folder in which work on a result keeps what is finished, beside the result: prepared data, or a
    corpus of translations.

    ``functions`` are those of the stages, by name: each gets a new folder, the work folder and a task's
    arguments.
    """

    def __init__(self, prepared: Path, functions: Mapping[str, Function]) -> None:
        prepared = resolved(prepared)
        self.folder, self.functions = prepared.with_name(f".{prepared.name}.work"), functions

    def forget_leader(self) -> None:
        """Make void what a leader that is gone has published, under the lock of the prepared data."""
        (self.folder / LEADER).unlink(missing_ok=True)

    def lead(self, settings: dict[str, Any]) -> None:
        """Begin to lead, under the lock of the prepared data."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = secrets.token_hex(8)
        write_whole(self.folder / LEADER, json.dumps({"run": self.run, "settings": settings}))
        self.publish([])

    def publish(self, tasks: Sequence[Task]) -> None:
        for stage in {task.stage for task in tasks}:
            (self.folder / stage).mkdir(exist_ok=True)
        content = {"run": self.run, "tasks": [vars(task) for task in tasks]}
        write_whole(self.folder / TASKS, json.dumps(content))

    def do(self, tasks: Sequence[Task], workers: Workers) -> Iterator[tuple[Task, Record]]:
        """Do the tasks of one stage, together with all helpers, and yield each with its record, in any order.

        Results of that stage that no task names are removed first.
        """
        distinct = list({task.name: task for task in tasks}.values())
        for stage in {task.stage for task in tasks}:
            self._keep_only(stage, {task.name for task in tasks})
        self.publish(distinct)
        waiting = distinct
        while waiting:
            busy = []
            done = workers.map(partial(attempt, self.folder, self.functions), waiting)
            for task, record in zip(waiting, done, strict=True):
                if record is None:
                    busy.append(task)
                else:
                    yield task, record
            if len(busy) == len(waiting):
                time.sleep(POLL)
            waiting = busy
        self.publish([])

    def leader(self) -> dict[str, Any]:
        """Return the ``run`` and the ``settings`` of the process that leads; empty if none has begun."""
        return read_json(self.folder / LEADER) or {}

    def help(self, run: str | None, workers: Workers) -> None:
        """Do what the leader of this ``run`` has published and is not yet done or claimed, or wait for a
        moment.
        """
        published = read_json(self.folder / TASKS) or {}
        tasks = [Task(**each) for each in published.get("tasks", ()) if published["run"] == run]
        start = hash((socket.gethostname(), os.getpid())) % max(1, len(tasks))  # not all at the same place
        tasks = [task for task in tasks[start:] + tasks[:start] if finished(self.folder / task.name) is None]
        helped = False
        try:
            for record in workers.map(partial(attempt, self.folder, self.functions, run=run), tasks):
                helped |= record is not None
        except FileNotFoundError:
            if self.leader().get("run") == run:  # else all is done, and the folder is gone
                raise
        if not helped:
            time.sleep(POLL)

    def finish(self) -> None:
        """Remove the folder: the prepared data are in their place."""
        self.forget_leader()
        for _ in range(3):  # a helper may have made a file in between
            shutil.rmtree(self.folder, ignore_errors=True)

    def finished(self, *stages: str) -> int:
        """Count the results of some stages that the folder keeps."""
        return sum(1 for stage in stages for _ in self.folder.glob(f"{stage}/*/{RECORD}"))

    def _keep_only(self, stage: str, names: set[str]) -> None:
        folder = self.folder / stage
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.startswith("."):  # a lock, or what a process that was killed has left
                with claimed(folder / path.name.split(".")[1]) as mine:
                    if mine and path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
            elif f"{stage}/{path.name}" not in names:
                shutil.rmtree(path, ignore_errors=True)


def finished(folder: Path) -> Record | None:
    """Return the record of a task's result, or None unless all its files are there with their sizes."""
    record = read_json(folder / RECORD)
    if record is None:
        return None
    for name, size in record["files"].items():
        with contextlib.suppress(OSError):
            if (folder / name).stat().st_size == size:
                continue
        return None
    return record


def attempt(
    work: Path, functions: Mapping[str, Function], task: Task, run: str | None = None
) -> Record | None:
    """Do a task unless that is done; return its record, or None if another process is doing it.

    A helper gives the leader's ``run``, and does nothing once that has ended.
    """
    folder = work / task.name
    if (record := finished(folder)) is not None:
        return record
    if run is not None and (read_json(work / LEADER) or {}).get("run") != run:
        return None
    with claimed(folder) as mine:
        if not mine or (record := finished(folder)) is not None:
            return record
        new = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            for leftover in (new, folder):
                shutil.rmtree(leftover, ignore_errors=True)
            new.mkdir()
            note = functions[task.stage](new, work, **task.arguments)
            files = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
            record = {**note, "files": files}
            write_json(new / RECORD, record)
            try:
                new.rename(folder)
            except OSError:
                if finished(folder) is None:  # without locks another process may have been faster
                    raise
            return finished(folder)
        except Stale:
            return None
        finally:
            shutil.rmtree(new, ignore_errors=True)

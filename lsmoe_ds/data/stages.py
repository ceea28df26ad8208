"""Share work among processes on any number of machines, and keep finished results.

Work has stages, and stages have tasks, each of which names everything that it depends on. The process that
holds the lock of the final result is the leader. It publishes the tasks of one stage after another in the
work folder, and does them with its workers. Other processes that want the same result help with published
tasks. A process locks a task before it begins, so the task of a process that dies is free again; if the
leader dies, a helper becomes leader. A task's result is a folder named by a digest of its dependencies: if it
exists, no process does the task again, and a task with other dependencies has another name.
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
LEADER = "leader.json"  # the leader's random number `run`, and its settings
TASKS = "tasks.json"  # the tasks that it has published
POLL = 0.2  # seconds between two looks at what other processes do

Record = dict[str, Any]
Function = Callable[..., Record]


class Stale(Exception):
    """Raised if a task's input has changed since it was published: the leader that published it is gone."""


@dataclass(frozen=True)
class Task:
    """A call of a stage's function, with arguments that JSON can represent.

    The function writes files into a folder and returns their record. ``depends`` is everything that the
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
    """Call ``lead`` under the lock of ``result``; while another process holds it, help with ``workers``.

    ``check`` is called with the leader's settings, and raises UserError if they differ from this process's.
    ``say`` is called once, before this process helps.
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
    """The work folder, beside the final result (prepared data or a corpus of translations).

    It keeps the results of tasks. ``functions`` maps each stage to its function, which is called with a new
    folder, the work folder and a task's arguments.
    """

    def __init__(self, prepared: Path, functions: Mapping[str, Function]) -> None:
        prepared = resolved(prepared)
        self.folder, self.functions = prepared.with_name(f".{prepared.name}.work"), functions

    def forget_leader(self) -> None:
        """Invalidate the tasks of a leader that is gone. Call it under the lock of the result."""
        (self.folder / LEADER).unlink(missing_ok=True)

    def lead(self, settings: dict[str, Any]) -> None:
        """Become the leader. Call it under the lock of the result."""
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

        Results of the stage that belong to none of these tasks are removed first.
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
        """Return the leader's ``run`` and ``settings``; empty if no process leads yet."""
        return read_json(self.folder / LEADER) or {}

    def help(self, run: str | None, workers: Workers) -> None:
        """Do the published tasks of this ``run`` that are neither done nor claimed; if there are none, wait
        for a moment.
        """
        published = read_json(self.folder / TASKS) or {}
        tasks = [Task(**each) for each in published.get("tasks", ()) if published["run"] == run]
        start = hash((socket.gethostname(), os.getpid())) % max(1, len(tasks))  # spreads the helpers
        tasks = [task for task in tasks[start:] + tasks[:start] if finished(self.folder / task.name) is None]
        helped = False
        try:
            for record in workers.map(partial(attempt, self.folder, self.functions, run=run), tasks):
                helped |= record is not None
        except FileNotFoundError:
            if self.leader().get("run") == run:  # otherwise all is done, and the folder is removed
                raise
        if not helped:
            time.sleep(POLL)

    def finish(self) -> None:
        """Remove the folder, once the final result is in its place."""
        self.forget_leader()
        for _ in range(3):  # a helper may write a file meanwhile
            shutil.rmtree(self.folder, ignore_errors=True)

    def finished(self, *stages: str) -> int:
        """Count the results of some stages that the folder keeps."""
        return sum(1 for stage in stages for _ in self.folder.glob(f"{stage}/*/{RECORD}"))

    def _keep_only(self, stage: str, names: set[str]) -> None:
        folder = self.folder / stage
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.startswith("."):  # a lock, or the leftover of a killed process
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
    """Do a task unless it is done; return its record, or None if another process is doing it.

    A helper passes the leader's ``run``; nothing is done once that run has ended.
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

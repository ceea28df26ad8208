"""Trace some steps of a training with torch's profiler, and record their GPU memory allocations."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile, record_function

from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.folders import explain_errors, write_whole
from lsmoe_ds.launch.watchdog import beat
from lsmoe_ds.notices import counted
from lsmoe_ds.parallel.topology import Topology

ROWS = 30  # operators in the table
ALLOCATIONS = 100_000  # a snapshot has at most so many, the latest


@dataclass(frozen=True)
class Traced:
    """The steps that --profile names, and whether --memory-snapshot is given."""

    first: int
    last: int
    memory: bool = False

    @classmethod
    def parse(cls, steps: str | None, memory: bool = False) -> Traced | None:
        """Read the options. Raises SharedError, alike on every rank, if they are wrong or impossible here."""
        if steps is None and not memory:
            return None
        if steps is None:
            raise SharedError(
                "--memory-snapshot records the steps of --profile: give both, as in --profile 10-12"
            )
        found = re.fullmatch(r"([1-9][0-9]*)(?:-([1-9][0-9]*))?", steps, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise SharedError(
                f"--profile is {steps!r}: give a step, or the first and the last of several, as in 10-12"
            )
        if memory and not torch.cuda.is_available():
            raise SharedError(
                "--memory-snapshot records the memory of a GPU, and there is none here: leave it out"
            )
        return cls(first, last, memory)

    @property
    def steps(self) -> str:
        return f"{self.first}-{self.last}" if self.last > self.first else str(self.first)

    def arguments(self) -> list[str]:
        """Return the options as command-line arguments, for the processes that are started."""
        return ["--profile", self.steps, *(["--memory-snapshot"] if self.memory else [])]


class Profiler:
    """Write a trace of each rank and a table of operators into ``RUN/profile``; nothing without ``traced``.

    The trace covers the steps and the validations and checkpoints between them. If the context ends before
    the last traced step, it writes the incomplete trace; after an error, such as out of memory, only the
    memory snapshot.
    """

    def __init__(
        self, traced: Traced | None, run: Path, topology: Topology, say: Callable[[str], None]
    ) -> None:
        self.traced, self.folder, self.topology, self.say = traced, run / "profile", topology, say
        self._profile: Any = None
        self._mark: Any = None
        self._begun = self._last = 0

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            return
        if kind is None:
            self._write()
            return
        self._profile.stop()
        self._write_memory()

    def announce(self, done: int, steps: int) -> None:
        """Print a notice if a training that resumes after step ``done`` takes none of the traced steps."""
        if self.traced is not None and not (done < self.traced.last and self.traced.first <= steps):
            self.say(f"nothing is profiled: this training takes none of the steps {self.traced.steps}")

    def before_step(self, number: int) -> None:
        """Start to record if a step is one of the traced ones."""
        if self.traced is None or not self.traced.first <= number <= self.traced.last:
            return
        if self._profile is None:
            self._start(number)
        self._last, self._mark = number, record_function(f"step {number}")
        self._mark.__enter__()

    def after_step(self, number: int) -> None:
        """End the record of a step, and write the files after the last one."""
        if self._profile is None or self.traced is None:
            return
        self._mark.__exit__(None, None, None)
        if number >= self.traced.last:
            self._write()

    def _start(self, number: int) -> None:
        assert self.traced is not None
        if self.traced.memory:
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if self.topology.device.type == "cuda" else []
        # Experts are computed by threads of their own on a CPU.
        threads = _ExperimentalConfig(profile_all_threads=True)
        self._begun = number
        self._profile = profile(activities=activities, experimental_config=threads)
        self._profile.start()

    def _path(self, end: str) -> Path:
        """Make the folder, and return the path of a file named after the recorded steps."""
        with explain_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        first, last = self._begun, self._last
        return self.folder / f"{f'steps-{first}-{last}' if last > first else f'step-{first}'}{end}"

    def _write(self) -> None:
        """Write the recorded trace. A full disk is reported, but does not end the training."""
        beat(f"writing the profile of step {self._last}")
        found, self._profile = self._profile, None
        found.stop()
        self._write_memory()
        rank = f"-rank-{self.topology.rank:05d}"
        try:
            trace, table = self._path(f"{rank}.json.gz"), self._path("-operators.txt")
            with explain_errors(trace):
                found.export_chrome_trace(str(trace))
            if self.topology.is_main:
                device = "device" if self.topology.device.type == "cuda" else "cpu"
                operators = found.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
                write_whole(table, f"{operators}\n")
        except UserError as error:
            return self.say(f"the profile is not written: {error}")
        others = self.topology.world - 1
        beside = f", and those of {counted(others, 'other rank')} beside it" if others else ""
        steps = table.name.removesuffix("-operators.txt")
        self.say(
            f"profiled {steps}: operators in {table}, the trace in {trace}{beside}: ui.perfetto.dev and "
            "chrome://tracing show it"
        )

    def _write_memory(self) -> None:
        if self.traced is None or not self.traced.memory:
            return
        try:
            path = self._path(f"-rank-{self.topology.rank:05d}-memory.pickle")
            with explain_errors(path):
                torch.cuda.memory._dump_snapshot(str(path))
        except UserError as error:
            return self.say(f"the memory snapshot is not written: {error}")
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        self.say(f"the memory of these steps is in {path}: pytorch.org/memory_viz shows it")

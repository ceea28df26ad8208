"""Run a command in a process of its own, and send it signals."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.workers import PRELOAD


def command(
    log: Path, environment: dict[str, str], arguments: list[str], prepare_child: Callable[[], None] | None
) -> None:
    """Run `python -m lsmoe_ds ARGUMENTS` as the first of a process group."""
    os.setpgid(0, 0)
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = ["lsmoe", *map(str, arguments)]
    if prepare_child is not None:
        prepare_child()
    from lsmoe_ds.__main__ import main as run

    run()


class Command:
    """Run a command; what it writes to standard error is in ``log``."""

    def __init__(
        self, log: Path, *arguments: object, before: Callable[[], None] | None = None, **environment: str
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.log = log
        self.process = context.Process(
            target=command, args=(log, environment, arguments, before), daemon=True
        )
        self.process.start()

    def wait_for(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not there():
            assert time.monotonic() < deadline and self.process.is_alive(), self.log.read_text()
            time.sleep(0.005)

    def asked(self, *numbers: int, after: float = 0.0) -> tuple[int | None, str]:
        """Return the status and what was said, after signals to the whole process group, ``after`` seconds
        between them.
        """
        for number in numbers:
            os.killpg(self.process.pid, number)
            time.sleep(after)
        self.process.join(60)
        status = self.process.exitcode
        self.process.kill()
        return status, self.log.read_text()


def records_in(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0

"""Processes and ports of this machine, and waiting for what happens there."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(done: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until ``done()`` is true; raise TimeoutError naming ``what`` after ``seconds``."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} not within {seconds:.0f} s")
        time.sleep(0.1)


def start_time(process: int) -> str | None:
    """Return the start time of a process (clock ticks since boot), or None if it is gone.

    A zombie counts as gone, since not every init reaps its children.
    """
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive free ports.

    They are below the ports that the kernel gives to outgoing connections: a node that is powered on again
    must get its port back.
    """
    while True:
        first = random.randrange(6000, 9900)
        try:
            for port in range(first, first + count):
                with socket.socket() as free:
                    free.bind(("", port))
            return first
        except OSError:
            continue

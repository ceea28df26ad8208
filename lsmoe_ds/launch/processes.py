"""Start the processes of a training on this machine, and wait for them."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from lsmoe_ds import interrupt
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.launch.joining import free_port
from lsmoe_ds.notices import counted

LOCKED = "LSMOE_LOCKED"  # tells ranks that the process that started them holds the lock


def smallest_world(recipe: Recipe) -> int:
    """Return the smallest number of processes that can hold the recipe's layout."""
    return math.lcm(recipe.parallel.tensor, recipe.parallel.expert)


def start(arguments: list[str], processes: int, lock: int) -> int:
    """Run ``lsmoe ARGUMENTS`` in several processes on this machine; return their exit status.

    DeepSpeed's launcher starts them. It inherits ``lock`` (see :func:`lsmoe_ds.folders.locked`): if only this
    process is killed, no other process can write the folder while the ranks still do. Signals that ask to
    stop are passed on to the ranks.

    Raises Interrupted if such a signal comes before any rank has a handler for it, and on a second Ctrl-C.
    """
    import torch

    cores = len(os.sched_getaffinity(0))
    environment = {
        LOCKED: "1",
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        **os.environ,
    }
    gpus = torch.cuda.is_available()
    if not gpus:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = [
        sys.executable,
        "-m",
        "lsmoe_ds.launch.launcher",
        "--world_info",
        _accelerators(processes, gpus),
    ]
    command += [
        "--master_port",
        str(free_port()),
        "--log_level",
        "critical",
        "--no_local_rank",
        "--module",
        "lsmoe_ds",
        *arguments,
    ]
    with interrupt.collected() as received:
        with interrupt.blocked():
            launcher = subprocess.Popen(command, env=environment, pass_fds=(lock,))
        ranks = _Ranks(launcher.pid)
        with launcher:
            return attend(launcher, received, lambda: ranks.hand_on(received))


def run(command: list[str], **options: Any) -> int:
    """Run a command that saves when it is asked to stop, and return its status.

    ``options`` are those of Popen. Each signal is passed on exactly once, because the command treats a second
    Ctrl-C as a request to quit without saving. Raises Interrupted after the command has ended, if there was a
    signal.
    """
    told = 0

    def hand_on() -> None:
        nonlocal told
        for number, _ in received[told:]:
            process.send_signal(number)
            told += 1

    with interrupt.collected() as received, subprocess.Popen(command, **options) as process:
        # The terminal may have sent the command the same Ctrl-C; pass it on soon enough not to count as a
        # second one.
        status = attend(process, received, hand_on, every=interrupt.AGAIN / 10)
    if received:
        raise interrupt.Interrupted(received[0][0])
    return status


def attend(
    process: subprocess.Popen[Any],
    received: list[tuple[int, float]],
    hand_on: Callable[[], None],
    every: float = 0.5,
) -> int:
    """Wait for a process and return its status, 128 + N if signal N killed it.

    Calls ``hand_on`` every ``every`` seconds, to pass on the signals that this process has ``received``.
    Raises Interrupted on a second Ctrl-C. Any exception here kills the process and all its descendants.
    """
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(every)
                return 128 - status if status < 0 else status
            if interrupt.insisted(received):
                raise interrupt.Interrupted(signal.SIGINT)
            hand_on()
    except BaseException:
        end(process)
        raise


def end(process: subprocess.Popen[Any], number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and to all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)


class _Ranks:
    """The ranks that a launcher has started: its descendants that handle SIGUSR1."""

    def __init__(self, launcher: int) -> None:
        self.launcher, self.heard = psutil.Process(launcher), False

    def hand_on(self, received: list[tuple[int, float]]) -> None:
        """Send the first received signal to all ranks that have a handler for it.

        Each call repeats it, because some ranks may still be starting. Raises Interrupted if there is a
        signal and no rank has ever had a handler.
        """
        if self.heard and not received:
            return
        with contextlib.suppress(psutil.NoSuchProcess):  # they are about to leave
            hearing = [each for each in self.launcher.children(recursive=True) if _hears(each.pid)]
            self.heard = self.heard or bool(hearing)
            for rank in hearing if received else ():
                rank.send_signal(received[0][0])
        if not self.heard and received:
            raise interrupt.Interrupted(received[0][0])


def _hears(process: int) -> bool:
    """Tell whether a process has a handler for SIGUSR1; a process has none unless it installs one."""
    try:
        caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def _accelerators(processes: int, gpus: bool) -> str:
    """Encode the ranks' accelerators for DeepSpeed's launcher: those in CUDA_VISIBLE_DEVICES, if it is set.

    Raises UserError if CUDA_VISIBLE_DEVICES names fewer than one per process.
    """
    chosen: list[int | str] = list(range(processes))
    if gpus and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
        named = [name.strip() for name in visible.split(",")]
        if len(named) < processes:
            each = counted(processes, "process")
            raise UserError(
                f"CUDA_VISIBLE_DEVICES is '{visible}', which is less than one GPU for each of {each}"
            )
        chosen = list(named[:processes])
    return base64.urlsafe_b64encode(json.dumps({"localhost": chosen}).encode()).decode()

"""Starting the processes of a training on this machine."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

from lsmoe_ds.config import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.parallel.interrupt import SIGNALS
from lsmoe_ds.parallel.joining import free_port

# glibc gives large blocks back to the system at once, by default; kept, they make CPU training about a fifth faster.
KEEP_LARGE_BLOCKS = {
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}

LOCKED = "LSMOE_LOCKED"  # tells ranks that whoever started them holds the right to write


def smallest_world(recipe: Recipe) -> int:
    """The fewest processes that hold the recipe's layout."""
    return math.lcm(recipe.parallel.tensor, recipe.parallel.expert)


def start(arguments: list[str], processes: int, lock: int) -> int:
    """Runs ``lsmoe ARGUMENTS`` on ``processes`` processes of this machine through the deepspeed launcher; returns its status.

    The launcher inherits ``lock`` (see :func:`lsmoe_ds.folders.locked`): should this process be killed alone, nobody else begins to
    write where its ranks still do.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    if not launcher.exists():
        raise UserError(f"the deepspeed launcher is not beside {sys.executable}: install deepspeed in this environment")
    import torch

    cores = len(os.sched_getaffinity(0))
    environment = {**KEEP_LARGE_BLOCKS, LOCKED: "1", "OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ}
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = [str(launcher), "--num_accelerators", str(processes), "--master_port", str(free_port())]
    command += ["--log_level", "error", "--no_local_rank", "--module", "lsmoe_ds", *arguments]
    with subprocess.Popen(command, env=environment, pass_fds=(lock,)) as launcher_process:
        for each in SIGNALS:
            signal.signal(each, lambda number, _: _pass_on(launcher_process.pid, number))
        return launcher_process.wait()


def _pass_on(launcher: int, number: int) -> None:
    """A signal to the ranks themselves: the launcher would kill them before they can save."""
    import psutil

    for process in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not process.children():
                process.send_signal(number)

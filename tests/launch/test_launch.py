"""The launcher of the ranks on one machine: their status, and the GPUs they get."""

from __future__ import annotations

import base64
import json
import platform
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lsmoe_ds.errors import UserError
from lsmoe_ds.launch import launcher
from lsmoe_ds.launch.processes import _accelerators, smallest_world


@pytest.mark.parametrize(
    ("left", "status", "says"),
    [(-9, 137, "a rank was killed by SIGKILL, perhaps for lack of memory"), (75, 75, "")],
)
def test_the_launcher_passes_on_the_status_of_its_ranks_and_keeps_its_hands_off_signals(
    monkeypatch, capfd, left, status, says
):
    from deepspeed.launcher import launch as theirs

    def main():
        theirs.signal.signal(theirs.signal.SIGTERM, None)
        raise SystemExit(left)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(theirs, "main", main)
    monkeypatch.setattr(theirs, "signal", signal)
    monkeypatch.setattr(sys, "argv", ["launcher"])
    assert launcher.run([]) == status and says in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("visible", "gpus", "chosen"),
    [
        (None, True, [0, 1]),
        ("2,3,5", True, ["2", "3"]),
        ("7", False, [0, 1]),
        ("GPU-a, GPU-b", True, ["GPU-a", "GPU-b"]),
    ],
)
def test_ranks_get_the_gpus_that_are_named(monkeypatch, visible, gpus, chosen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert json.loads(base64.urlsafe_b64decode(_accelerators(2, gpus))) == {"localhost": chosen}
    if visible and gpus:
        with pytest.raises(
            UserError, match=r"CUDA_VISIBLE_DEVICES is .* less than one GPU for each of 4 processes"
        ):
            _accelerators(4, gpus)


@pytest.mark.parametrize(
    ("tensor", "expert", "world"), [(1, 1, 1), (2, 1, 2), (1, 4, 4), (2, 4, 4), (2, 3, 6), (6, 4, 12)]
)
def test_the_fewest_ranks_are_a_multiple_of_both(tensor, expert, world):
    layout = SimpleNamespace(parallel=SimpleNamespace(tensor=tensor, expert=expert))
    assert smallest_world(layout) == world


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_large_blocks_stay_in_the_process():
    script = """
import psutil
from lsmoe_ds.launch.memory import keep_large_blocks
keep_large_blocks()
block = bytes([1]) * 2**28
del block
print(psutil.Process().memory_info().rss)
"""
    held = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(held.stdout) > 2**28

"""On a machine without a GPU the tests for GPUs say that they were skipped, and they can be tried."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support import PROJECT


def run(wanted: str | None, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "LSMOE_GPU_TESTS"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} | ({} if wanted is None else {"LSMOE_GPU_TESTS": wanted})
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)


def test_without_a_gpu_all_are_skipped_and_one_line_says_why():
    done = run(None)
    assert done.returncode == 0
    assert re.search(r"^\d+ skipped in ", done.stdout, re.M), done.stdout
    assert done.stdout.count("tests/gpu was skipped: torch sees no CUDA device") == 1


def test_where_a_gpu_must_be_there_they_fail():
    done = run("cuda", "-k", "same_bits_twice")
    assert done.returncode == 1 and "1 error" in done.stdout, done.stdout


@pytest.mark.slow
def test_they_can_be_tried_on_a_cpu():
    done = run("cpu", "-k", "test_gpu_experts")
    assert done.returncode == 0 and re.search(r"^\d+ passed", done.stdout, re.M), done.stdout[-3000:]

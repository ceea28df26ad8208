"""`training.deterministic` reaches torch and all processes that compute, and gives the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.loops import assert_same_end, loop, recipe_in
from support.small_run import TARGET_TOP2, TOKEN_TOP2, write_corpus

from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.launch.determinism import CUBLAS

STATE = """
import json, os, torch
def state():
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "search": torch.backends.cudnn.benchmark,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "cuda": torch.cuda.is_initialized(),
    }
"""
STARTED = (
    STATE
    + """
import sys
from pathlib import Path
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.launch import processes
from lsmoe_ds.training import start
def note(*arguments):
    print(json.dumps(state()))
    return 0
# Where one process trains, and where several are started.
processes.start = start._join_and_train = note
recipe = load_recipe(Path(sys.argv[1]), sys.argv[3:])
start.train(recipe, Path(sys.argv[2]), int(sys.argv[3].partition("=")[2]))
"""
)
WANTED = {"algorithms": True, "only warns": False, "cudnn": True, "search": False, "cuda": False}
WITHOUT = {"algorithms": False, "only warns": False, "cudnn": False, "search": False, "cuda": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("deterministic")
    write_corpus(path)
    prepare(recipe_in(path))
    return path


def started(folder: Path, run: str, ranks: int, deterministic: str, workspace: str | None) -> dict:
    """Start a training in a new process, and return the state of torch and cuBLAS just before it begins."""
    (folder / "recipe.yaml").write_text(recipe_in(folder).to_yaml())
    environment = {name: value for name, value in os.environ.items() if name != CUBLAS}
    environment |= {} if workspace is None else {CUBLAS: workspace}
    command = [sys.executable, "-c", STARTED, str(folder / "recipe.yaml"), str(folder / run)]
    command += [f"parallel.expert={ranks}", f"training.deterministic={deterministic}"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_torch_and_cublas_are_told_before_anything_is_computed(folder, ranks):
    found = started(folder, f"run-{ranks}", ranks, "true", ":8:8")
    assert found == {**WANTED, "workspace": ":4096:8"}, "another value would not be deterministic"
    assert started(folder, f"run-{ranks}", ranks, "true", ":16:8") == {**WANTED, "workspace": ":16:8"}


def test_nothing_is_told_where_it_is_not_asked_for(folder):
    assert started(folder, "run-without", 1, "false", None) == {**WITHOUT, "workspace": None}


def deterministic_loop(topology, *arguments):
    """Train as `lsmoe train` does with ``training.deterministic``."""
    import torch

    from lsmoe_ds.launch.determinism import make_deterministic

    before = torch.backends.cudnn.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    make_deterministic()
    try:
        return loop(topology, *arguments)
    finally:
        del os.environ[CUBLAS]
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic, torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize(("moe", "expert", "stage"), [(TOKEN_TOP2, 2, 2), (TARGET_TOP2, 1, 1)])
def test_a_deterministic_training_gives_the_same_bits_and_those_of_a_cpu(pool, folder, moe, expert, stage):
    """On a CPU the deterministic operations are the usual ones; what a GPU does is tested in tests/gpu."""
    recipe = recipe_in(folder, moe=moe, expert=expert, stage=stage)
    recipe.deepspeed = {**recipe.deepspeed, "bf16": {"enabled": True}}
    runs = [folder / f"{name}-{expert}" for name in ("first", "second", "usual")]
    for run, train in zip(runs, (deterministic_loop, deterministic_loop, loop), strict=True):
        assert pool.run(2, train, recipe, run, expert=expert) == [None, None]
        assert_same_end(runs[0], run, 6)

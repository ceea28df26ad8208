"""The fixture `cluster`: a real SLURM of 2 nodes with 4 cores each, started once and put in order after every
test.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import TEMPORARY, Cluster, missing
from processes import start_time
from small_training import ENVIRONMENT, SLURM, write_recipe

PREFIX = "lsmoe-slurm-test-"
SKIPPED = pytest.StashKey[list[str]]()


def do_without(request: pytest.FixtureRequest, reason: str) -> None:
    """Skip a test for something that this machine lacks; the summary says so in one line. With
    LSMOE_REQUIRE_SLURM=1 it fails.
    """
    if os.environ.get("LSMOE_REQUIRE_SLURM") == "1":
        pytest.fail(reason, pytrace=False)
    told = request.config.stash.setdefault(SKIPPED, [])
    if reason not in told:
        told.append(reason)
    pytest.skip(reason)


def clean_left_behind() -> None:
    """Remove the clusters of killed test processes, whose numbers are in the names of the folders."""
    for folder in TEMPORARY.glob(f"{PREFIX}*"):
        starter = folder.name.removeprefix(PREFIX)
        if starter.isdigit() and start_time(int(starter)) is None:
            Cluster(folder).down()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Start a cluster, or :func:`do_without`. Folders below pytest's temporary folder (`tmp_path`) are shared
    by the nodes.
    """
    if reason := missing():
        do_without(request, f"tests/slurm was skipped: {reason}")
    clean_left_behind()
    cluster = Cluster(TEMPORARY / f"{PREFIX}{os.getpid()}", shared=[tmp_path_factory.getbasetemp()])
    cluster.up()
    yield cluster
    cluster.down()


@pytest.fixture(autouse=True)
def cluster_in_order(request: pytest.FixtureRequest):
    """After a test that uses the cluster: no jobs, all nodes idle."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").tidy()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all nodes see, with prepared data and ``recipe.yaml``."""
    folder = tmp_path_factory.mktemp("work")
    write_recipe(folder)
    return folder


@pytest.fixture
def launcher(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """Return the launcher for `train.sbatch`, set by indirect parametrization.

    Calls :func:`do_without` if it is not installed.
    """
    if shutil.which(request.param, path=ENVIRONMENT["PATH"]) is None:
        do_without(
            request, f"tests/slurm was skipped for LAUNCH={request.param}: {request.param} is not installed"
        )
    return request.param


@pytest.fixture
def submit(cluster: Cluster, work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``submit(*arguments, script=, **options)``: sbatch in the work folder, as a person would; returns the
    job's number.
    """
    for name, value in ENVIRONMENT.items():
        monkeypatch.setitem(cluster.environment, name, value)

    def submit(*arguments: str, script: str = "train.sbatch", **options: object) -> int:
        return cluster.submit(SLURM / script, *arguments, chdir=work, **options)

    return submit


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason in config.stash.get(SKIPPED, []):
        terminalreporter.write_line(reason)

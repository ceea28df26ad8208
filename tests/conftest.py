"""Shared by all tests: few threads, quiet libraries, and a pool of worker processes for the distributed
ones.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import signal

# A shell that runs the tests in the background has them ignore SIGINT, which every process they start would
# inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

pytest.register_assert_rewrite("support")  # whose asserts say as much as those of test modules

from support.played_slurm import Played
from support.workers import Pool


@pytest.fixture(scope="session")
def pool():
    """Worker processes that talk over gloo; started at the first distributed test and kept."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def played(tmp_path):
    """SLURM's programs, played by small ones."""
    return Played(tmp_path)


@pytest.fixture(params=["grouped", "blocks"])
def form(request, monkeypatch):
    """Both ways in which the matrices of several languages are multiplied at once."""
    if request.param == "blocks":
        monkeypatch.setattr("lsmoe_ds.parallel.grouped.is_grouped", lambda device, dtype: False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the modules that took longest, if that is more than a minute, in seconds of their process."""
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                module = report.nodeid.partition("::")[0]
                seconds[module] = seconds.get(module, 0.0) + report.duration
    if slowest := sorted(((each, name) for name, each in seconds.items() if each > 60), reverse=True)[:20]:
        terminalreporter.section("slowest modules")
        for each, name in slowest:
            terminalreporter.write_line(f"{each:6.0f} s  {name}")

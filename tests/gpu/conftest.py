"""Tests for a machine with a GPU: ``pytest tests/gpu``. Where torch sees none, each is skipped, and one line
of the summary says so.

``LSMOE_GPU_TESTS=cuda`` lets them fail rather than be skipped; ``LSMOE_GPU_TESTS=cpu`` runs them on a CPU, to
try the tests themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WANTED = os.environ.get("LSMOE_GPU_TESTS")
REASON = "tests/gpu was skipped: torch sees no CUDA device"
SKIPPED = WANTED is None and not torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SKIPPED and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if any(REASON in str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(REASON)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if WANTED == "cpu" else "cuda")

"""Run a command in this process, and see what it leaves in a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lsmoe_ds import cli


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make a folder the working folder for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(arguments: list[str]) -> int:
    """Return the status with which the command leaves."""
    old = sys.argv
    sys.argv = ["lsmoe", *arguments]
    try:
        cli.main()
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        sys.argv = old
    return 0


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}

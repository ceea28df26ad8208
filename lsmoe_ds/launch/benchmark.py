"""Run the scripts of ``benchmarks/``, a folder beside the package in a checkout."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress

from lsmoe_ds import interrupt, shipped
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import nearest
from lsmoe_ds.launch.processes import end

FOLDER = shipped.ROOT / "benchmarks"


def run_benchmark(name: str, options: list[str]) -> int:
    """Run ``benchmarks/NAME.py`` and return its exit status. Raises UserError if there is none."""
    if not FOLDER.is_dir():
        raise UserError(
            f"{FOLDER} is not there: the benchmarks come with a checkout, not with an installed package"
        )
    known = sorted(
        path.stem for path in FOLDER.glob("*.py") if "def main(" in path.read_text(encoding="utf-8")
    )
    if name not in known:
        raise UserError(
            f"there is no benchmark '{name}'{nearest(name, known)}: choose {', '.join(known[:-1])} or "
            f"{known[-1]}"
        )
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    # In its own session, so that the terminal's Ctrl-C does not reach the script's processes, each of which
    # would print a traceback. SIGTERM ends them quietly.
    with interrupt.collected() as received, subprocess.Popen(command, start_new_session=True) as script:
        while not received:
            with suppress(subprocess.TimeoutExpired):
                return script.wait(0.2)
        end(script, signal.SIGTERM)
    raise interrupt.Interrupted(received[0][0])

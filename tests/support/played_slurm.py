"""The scripts in `slurm/` without a cluster: SLURM's programs are played by small ones that note how they
were called.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from support import PROJECT

SLURM = PROJECT / "slurm"
NOTE = 'echo "$(basename "$0") $*" >> "$CALLS"\n'
PLAYED = {
    "srun": NOTE + 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "mpirun": NOTE + 'exec python "$RANK"',
    "deepspeed": NOTE + 'cat "$2" >> "$CALLS"; exec python "$RANK"',
    "torchrun": NOTE + 'echo "node rank $PET_NODE_RANK" >> "$CALLS"; python "$RANK"',
    "lsmoe": NOTE
    + """case "$1 $2" in
    "slurm begin")
        [[ $BEGIN != slow ]] || { echo begun > "$PID" && /bin/sleep 0.5; }
        echo runs/played && exit "${BEGIN/slow/0}" ;;
    "slurm end") exit "$VERDICT" ;;
    "plan "*) exec python -m lsmoe_ds "$@" ;;
    study*) [[ $WORK != stay ]] || python "$RANK"; exit ;;
    *) exec python "$RANK" ;;
    esac""",
    "scancel": NOTE + '[[ $1 != --signal=USR1 ]] || kill -USR1 "$(cat "$PID")"',
    "scontrol": NOTE
    + """case "$2" in
    hostnames) printf 'n1\\nn2\\n' ;;
    show) echo "JobId=7 $STATE" ;;
    *) [[ $REQUEUE == 0 ]] && kill -TERM $PPID; exit "$REQUEUE" ;;
    esac""",
    "sbatch": NOTE + '[[ $* != *"$REFUSED"* ]] || exit 1\necho $((100 + $(grep -c ^sbatch "$CALLS")))\\;name',
    "sleep": "exec /bin/sleep 0.1  # nobody waits that long",
}
RANK = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
with open(os.environ["PID"], "w") as file:
    file.write(str(os.getpid()))
with open(os.environ["CALLS"], "a") as calls:
    print("rank sees", "TMPDIR" if os.path.isdir(os.environ["TMPDIR"]) else "none", file=calls)
work = os.environ["WORK"]
if work == "stay":
    time.sleep(30)
sys.exit(int(work))
"""


class Played:
    """A folder with the programs, and what they were told to do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file, self.pid_file = folder, folder / "calls", folder / "pid"
        programs = folder / "programs"
        programs.mkdir()
        for name, text in PLAYED.items():
            (programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (programs / name).chmod(0o755)
        (folder / "rank.py").write_text(RANK)
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM", "SBATCH", "OMP_"))
            },
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "PID": str(self.pid_file),
            "RANK": str(folder / "rank.py"),
            "BEGIN": "0",  # status of `lsmoe slurm begin`; "slow": 0, but not at once
            "WORK": "0",  # status of the training; "stay" until it is told to stop
            "VERDICT": "0",  # of `lsmoe slurm end`
            "STATE": "JobState=RUNNING",
            "REQUEUE": "0",
            "REFUSED": "@none@",  # what sbatch refuses
            "SLURM_SUBMIT_DIR": str(SLURM.parent),
            "SLURM_TMPDIR": str(folder / "local"),
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS": "4",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        self.said = ""

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SLURM / script), *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> int:
        """Run a script to its end, and return its exit status."""
        return self.finish(self.start(script, *arguments, **environment))

    def finish(self, process: subprocess.Popen[str]) -> int:
        self.said, _ = process.communicate(timeout=60)
        return process.returncode

    def signaled(self, number: int, script: str, *arguments: str, **environment: str) -> int:
        """Run a script, send it a signal once the PID file is written, and return its exit status.

        The ranks write the PID file; with ``BEGIN="slow"``, `lsmoe slurm begin` writes it before they start.
        """
        process = self.start(script, *arguments, WORK="stay", **environment)
        deadline = time.monotonic() + 30
        while not (self.pid_file.exists() and self.pid_file.read_text()):
            assert time.monotonic() < deadline and process.poll() is None, self.finish(process) or self.said
            time.sleep(0.02)
        process.send_signal(number)
        return self.finish(process)

    def calls(self, program: str) -> list[str]:
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        return [
            line.removeprefix(f"{program} ") for line in text.splitlines() if line.startswith(f"{program} ")
        ]

"""``lsmoe slurm``: what a batch script asks before its ranks run, and after: where the run is, and whether to go on. Imports no torch.

Beside the run folder NAME lies ``.NAME.attempts``: which job tries, how far it is to come, and how often in a row it began at the
same checkpoint. A job that SLURM requeues keeps its number; a new job counts anew.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from json import dumps
from pathlib import Path

from lsmoe_ds import interrupt, shipped
from lsmoe_ds.checkpoint.run_folder import find_damage, list_checkpoints, step_of
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import explain_errors, read_fields, resolved, write_whole
from lsmoe_ds.notices import counted

REFUSED = 2  # the status of a UserError
AGAIN = interrupt.STATUS
NOT_FOUND = {126: "a command cannot be run", 127: "a command was not found"}  # statuses of shells, and what they mean


@dataclass(frozen=True)
class Attempts:
    """``tries`` of a ``job`` in a row, at most ``allowed``, began at ``step`` of ``steps``."""

    job: str
    step: int
    steps: int
    tries: int
    allowed: int

    @classmethod
    def read(cls, run: Path) -> Attempts:
        """Raises UserError if there are none."""
        fields = read_fields(_file(run), job=str, step=int, steps=int, tries=int, allowed=int)
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})

    def write(self, run: Path) -> None:
        write_whole(_file(run), dumps(asdict(self)) + "\n")


def begin(recipe: Path, overrides: Sequence[str] = (), out: Path | None = None, allowed: int = 4) -> Path:
    """Notes that an attempt begins and returns the run folder, which need not be there yet.

    Raises UserError for a bad recipe, and once ``allowed`` attempts of this job in a row have brought no newer checkpoint.
    """
    loaded = load_recipe(recipe, overrides)
    run = out or Path("runs") / loaded.name
    with explain_errors(run):
        _file(run).parent.mkdir(parents=True, exist_ok=True)
    now = Attempts(os.environ.get("SLURM_JOB_ID", ""), newest_step(run), loaded.training.steps, 1, allowed)
    if _file(run).exists():
        before = Attempts.read(run)
        if before.job == now.job and before.step == now.step:
            now = replace(now, tries=before.tries + 1)
    if now.tries > allowed:
        raise UserError(
            f"the last {counted(before.tries, 'attempt')} of this job began at step {now.step} of {run} and saved nothing "
            f"newer: its log says why; submit it anew once the cause is gone"
        )
    now.write(run)
    _say(f"{run} is at step {now.step} of {now.steps}: attempt {now.tries} of at most {allowed} to come further")
    return run


def end(run: Path, status: int) -> int:
    """What the job should end with, after training left with ``status``: 0 if the run is at its last step, whatever the status; 75 to
    be requeued; 2 to give up. Says why.

    Raises UserError unless :func:`begin` noted an attempt.
    """
    attempt, step = Attempts.read(run), newest_step(run)
    at = f"{run} is at step {step} of {attempt.steps}"
    if step >= attempt.steps:
        _say(f"{at}: finished")
        return 0
    if status == REFUSED or status in NOT_FOUND:
        why = f"{NOT_FOUND[status]} (status {status}), " if status in NOT_FOUND else ""
        _say(f"{at}: given up, {why}as trying again would not help; the line above says why")
        return REFUSED
    stopped = status in (interrupt.STATUS, interrupt.CTRL_C)
    left = "training was asked to stop" if stopped else f"training ended with status {status}"
    if step <= attempt.step and attempt.tries >= attempt.allowed:
        tries = counted(attempt.tries, "attempt")
        _say(f"{at}: {left}; given up, as {tries} in a row saved nothing newer")
        return REFUSED
    _say(f"{at}: {left}; the job may go on from there")
    return AGAIN


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint whose files all have their size, 0 without one. Sums are training's to compare."""
    return next((step_of(path) for path in reversed(list_checkpoints(run)) if find_damage(path, checksums=False) is None), 0)


def copy_scripts(folder: Path) -> None:
    """Copy the batch scripts that come with lsmoe_ds into a new folder, to be adapted there. Raises UserError if it is not empty."""
    with explain_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already and not empty: give another folder for the scripts")
        scripts = [path for path in (shipped.ROOT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch")]
        folder.mkdir(parents=True, exist_ok=True)
        for script in scripts:
            shutil.copy(script, folder)
    _say(f"{len(scripts)} scripts are in {folder}: edit {folder / 'site.sh'}, then submit with {folder / 'submit.sh'}")


def _file(run: Path) -> Path:
    run = resolved(run)  # one file, whatever the run is called
    return run.with_name(f".{run.name}.attempts")


def _say(text: str) -> None:
    print(f"lsmoe: {text}", file=sys.stderr, flush=True)

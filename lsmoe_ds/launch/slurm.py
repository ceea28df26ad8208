"""``lsmoe slurm``: tell a batch script where its run is and whether to requeue the job.

Imports no torch. The file ``.NAME.attempts`` beside the run folder NAME holds the job's number, the last step
of the training, and how many attempts in a row started from the same checkpoint. A job that SLURM requeues
keeps its number; for a new job the count starts again.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from json import dumps
from pathlib import Path

from lsmoe_ds import interrupt, shipped
from lsmoe_ds.checkpoint.run_folder import find_damage, has_ended, list_checkpoints, step_of
from lsmoe_ds.config.recipe import Training
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import explain_errors, is_count, read_fields, resolved, write_whole
from lsmoe_ds.notices import counted

REFUSED = 2  # the status of a UserError
AGAIN = interrupt.STATUS
NOT_FOUND = {
    126: "a command cannot be run",
    127: "a command was not found",
}  # statuses of shells, and what they mean


@dataclass(frozen=True)
class Attempts:
    """Attempts of a ``job``: ``tries`` in a row, of at most ``allowed``, started at ``step`` of ``steps``.

    ``patience`` is that of early stopping, 0 without.
    """

    job: str
    step: int
    steps: int
    tries: int
    allowed: int
    patience: int = 0

    @classmethod
    def read(cls, run: Path) -> Attempts:
        """Read the attempts of a run. Raises UserError if there are none."""
        fields = read_fields(_file(run), job=str, step=int, steps=int, tries=int, allowed=int)
        known = {name: fields[name] for name in cls.__dataclass_fields__ if name != "patience"}
        patience = fields.get("patience")  # missing in attempts of earlier versions
        return cls(**known, patience=patience if is_count(patience) else 0)

    def write(self, run: Path) -> None:
        write_whole(_file(run), dumps(asdict(self)) + "\n")


def begin(run: Path, training: Training, allowed: int = 4) -> Path:
    """Record that an attempt starts and return the run folder, which need not exist yet.

    Raises UserError if ``allowed`` attempts of this job in a row have saved no newer checkpoint.
    """
    with explain_errors(run):
        _file(run).parent.mkdir(parents=True, exist_ok=True)
    step = newest_step(run)
    patience = training.early_stopping.patience if training.early_stopping is not None else 0
    now = Attempts(os.environ.get("SLURM_JOB_ID", ""), step, training.steps, 1, allowed, patience)
    if _file(run).exists():
        before = Attempts.read(run)
        if before.job == now.job and before.step == now.step:
            now = replace(now, tries=before.tries + 1)
    if now.tries > allowed:
        raise UserError(
            f"the last {counted(before.tries, 'attempt')} of this job began at step {now.step} of {run} and "
            "saved nothing newer: its log says why; submit it anew once the cause is gone"
        )
    now.write(run)
    _say(
        f"{run} is at step {now.step} of {now.steps}: attempt {now.tries} of at most {allowed} to come "
        "further"
    )
    return run


def end(run: Path, status: int) -> int:
    """Return the job's exit status after training has ended with ``status``, and print the reason.

    The result is 0 if the run is at its last step or has stopped early, whatever ``status`` is; 75 if the job
    should be requeued; 2 if it should give up. Raises UserError unless :func:`begin` recorded an attempt.
    """
    attempt, newest = Attempts.read(run), _newest(run)
    step = step_of(newest) if newest is not None else 0
    at = f"{run} is at step {step} of {attempt.steps}"
    if newest is not None and has_ended(newest, attempt.steps, attempt.patience or None):
        _say(f"{at}: finished{'' if step >= attempt.steps else ', stopped early'}")
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
    _say(f"{at}: {left}; the job may resume from there")
    return AGAIN


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint whose files all have the right size; 0 if there is none."""
    newest = _newest(run)
    return 0 if newest is None else step_of(newest)


def _newest(run: Path) -> Path | None:
    """Return that checkpoint. Checksums are not compared here; training compares them."""
    checkpoints = reversed(list_checkpoints(run))
    return next((path for path in checkpoints if find_damage(path, checksums=False) is None), None)


def copy_scripts(folder: Path) -> None:
    """Copy the batch scripts that come with lsmoe_ds into a new folder, where the user adapts them.

    Raises UserError if the folder is not empty.
    """
    with explain_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already and not empty: give another folder for the scripts")
        scripts = [path for path in (shipped.ROOT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch")]
        folder.mkdir(parents=True, exist_ok=True)
        for script in scripts:
            shutil.copy(script, folder)
    _say(
        f"{len(scripts)} scripts are in {folder}: edit {folder / 'site.sh'}, then submit with "
        f"{folder / 'submit.sh'}"
    )


def _file(run: Path) -> Path:
    run = resolved(run)  # so that all paths to the run name one file
    return run.with_name(f".{run.name}.attempts")


def _say(text: str) -> None:
    print(f"lsmoe: {text}", file=sys.stderr, flush=True)

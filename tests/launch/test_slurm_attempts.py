"""`lsmoe slurm begin` and `end`: attempts are counted, and results decide how a job ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.small_run import make_recipe

from lsmoe_ds.checkpoint.run_folder import choose_run
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files, write_json
from lsmoe_ds.launch.slurm import begin as begin_run
from lsmoe_ds.launch.slurm import end


def save(run: Path, step: int, **state) -> Path:
    checkpoint = run / "checkpoints" / f"step-{step}"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "state.json", {"step": step, **state})
    write_json(checkpoint / "manifest.json", {"files": describe_files(checkpoint, ["state.json"])})
    return checkpoint


def begin(recipe: Path, overrides: Sequence[str] = (), out: Path | None = None, allowed: int = 4) -> Path:
    """As the command does it."""
    loaded = load_recipe(recipe, overrides)
    return begin_run(choose_run(recipe, loaded, out), loaded.training, allowed)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Of two steps, by a job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    file = tmp_path / "small.yaml"
    file.write_text(make_recipe(tmp_path, None, None).to_yaml())
    return file


def test_attempts_without_a_newer_checkpoint_are_counted(recipe, monkeypatch):
    run = begin(recipe, allowed=2)
    assert run == Path("runs/small") and not run.exists()
    assert begin(recipe, allowed=2) == run
    with pytest.raises(
        UserError,
        match="the last 2 attempts of this job began at step 0 of runs/small and saved nothing newer",
    ):
        begin(recipe, allowed=2)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    begin(recipe, allowed=2)
    begin(recipe, allowed=2)
    save(run, 1)
    begin(recipe, allowed=2)
    begin(recipe, allowed=2)
    with pytest.raises(UserError, match="began at step 1 of"):
        begin(recipe, allowed=2)


def test_the_recipe_of_a_run_is_an_attempt_of_that_run(recipe, tmp_path):
    run = tmp_path / "elsewhere"
    run.mkdir()
    (run / "vocabulary.model").touch()
    stored = recipe.rename(run / "recipe.yaml")
    assert begin(stored) == run and begin(stored, out=Path("other")) == Path("other")


def test_two_names_of_a_run_count_together(recipe, tmp_path):
    (tmp_path / "link").symlink_to("far/run")
    begin(recipe, out=Path("link"), allowed=2)
    begin(recipe, out=Path("far/run"), allowed=2)
    with pytest.raises(UserError, match="the last 2 attempts"):
        begin(recipe, out=tmp_path / "link", allowed=2)
    save(tmp_path / "far" / "run", 2)
    assert end(Path("link"), 0) == end(Path("far/run"), 0) == 0


def test_a_bad_recipe_begins_no_attempt(recipe, tmp_path):
    with pytest.raises(UserError, match="unknown key"):
        begin(recipe, ["training.step=3"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("steps", "status", "verdict", "said"),
    [
        ([1, 2], 0, 0, "is at step 2 of 2: finished"),
        ([2], 137, 0, "finished"),
        ([1], 0, 75, "is at step 1 of 2: training ended with status 0; the job may resume"),
        ([1], 75, 75, "training was asked to stop; the job may resume"),
        ([], 70, 75, "is at step 0 of 2: training ended with status 70; the job may resume"),
        ([1], 130, 75, "training was asked to stop; the job may resume"),
        ([1], 2, 2, "given up, as trying again would not help"),
        ([], 127, 2, "given up, a command was not found (status 127), as trying again would not help"),
        ([1], 126, 2, "given up, a command cannot be run (status 126)"),
    ],
)
def test_results_decide_how_a_job_ends(recipe, capsys, steps, status, verdict, said):
    run = begin(recipe)
    for step in steps:
        save(run, step)
    assert end(run, status) == verdict and said in capsys.readouterr().err


def test_the_last_attempt_without_a_newer_checkpoint_gives_up(recipe, capsys):
    run = begin(recipe, allowed=2)
    assert end(run, 75) == 75
    begin(recipe, allowed=2)
    (save(run, 2) / "manifest.json").unlink()  # not whole
    assert (
        end(run, 75) == 2
        and "given up, as 2 attempts in a row saved nothing newer" in capsys.readouterr().err
    )
    save(run, 1)
    assert end(run, 1) == 75


def test_more_steps_than_before_are_not_finished_yet(recipe):
    """Training may have ended before it could store the new recipe."""
    run = begin(recipe)
    save(run, 2)
    assert end(run, 1) == 0
    begin(recipe, ["training.steps=4"])
    assert end(run, 1) == 75


def test_a_training_that_has_stopped_early_is_finished_until_the_recipe_waits_longer(recipe, capsys):
    stops = ["training.validate_every=1", "training.early_stopping={patience: 3}"]
    run = begin(recipe, stops)
    save(run, 1, position={"stopping": {"best": 1.0, "step": 1, "waited": 3}})
    assert end(run, 0) == 0 and "is at step 1 of 2: finished, stopped early" in capsys.readouterr().err
    begin(recipe, ["training.validate_every=1", "training.early_stopping={patience: 4}"])
    assert end(run, 1) == 75
    begin(recipe)
    assert end(run, 1) == 75, "without early stopping it has not ended"
    attempts = run.with_name(".small.attempts")
    attempts.write_text(attempts.read_text().replace(', "patience": 0', ""))  # of an earlier version
    assert end(run, 1) == 75


def test_an_end_without_a_beginning_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.small\.attempts is missing"):
        end(tmp_path / "small", 0)

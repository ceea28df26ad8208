"""A training whose dev loss has stopped falling ends, says why, and ends in the same step when resumed."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import yaml
from support.loops import loop, recipe_in, weights
from support.small_run import write_corpus
from support.small_study import prepared_base, study_file

from lsmoe_ds.checkpoint.run_folder import has_ended, list_checkpoints
from lsmoe_ds.config.recipe import EarlyStopping, Recipe
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.study import command
from lsmoe_ds.study.command import run_study
from lsmoe_ds.training.loop import _find_best
from lsmoe_ds.training.stopping import Stopping


def ends(losses: list[float], patience: int, min_delta: float = 0.0) -> int | None:
    """Return after how many validations a training ends; None if it does not."""
    stopping = Stopping(EarlyStopping(patience=patience, min_delta=min_delta))
    for number, loss in enumerate(losses, start=1):
        stopping.after_validation(number, {"dev_loss": loss, "dev_loss_shared": 0.0})
        restored = Stopping(stopping.settings)
        restored.load_state_dict(json.loads(json.dumps(stopping.state_dict())))
        assert restored == stopping
        if stopping.ended:
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "end"),
    [
        ([3, 2, 1, 1, 2], 2, 0.0, 5),
        ([3, 2, 1, 1, 0.9, 1, 1], 2, 0.0, 7),
        ([3, 2, 1, 1], 3, 0.0, None),
        ([3, 3], 1, 0.0, 2),
        ([3, 2.9, 2.7, 2.6], 2, 0.25, None),  # 2.7 is lower than 3 by more than that
        ([3, 2.9, 2.8, 2.75], 3, 0.25, 4),
        ([float("nan")] * 2, 2, 0.0, 2),
    ],
)
def test_validations_without_an_improvement_are_counted(losses, patience, min_delta, end):
    assert ends(losses, patience, min_delta) == end


def test_without_settings_nothing_ends():
    stopping = Stopping(None)
    for number in range(9):
        stopping.after_validation(number, {"dev_loss": 1.0})
    assert stopping.waited == 8 and not stopping.ended


def test_the_reason_is_told():
    stopping = Stopping(EarlyStopping(patience=2, min_delta=0.01))
    for number, loss in ((100, 3.25), (200, 3.245), (300, 4.0)):
        stopping.after_validation(number, {"dev_loss": loss})
    assert stopping.describe() == (
        "the dev loss has not improved by more than 0.01 on 3.250, that of step 100, in 2 validations "
        "(training.early_stopping)"
    )


def test_chrf_improves_by_rising_and_a_change_of_metric_counts_anew():
    stopping = Stopping(EarlyStopping(metric="chrf", patience=2, min_delta=0.5))
    for number, chrf in ((1, 20.0), (2, 20.5), (3, 21.0), (4, 21.25), (5, 5.0)):
        assert not stopping.ended
        stopping.after_validation(number, {"dev_loss": 1.0 - number, "dev_chrf": chrf})
    assert stopping.ended and (stopping.best, stopping.step) == (21.0, 3)
    assert stopping.describe().startswith("the dev chrF has not improved by more than 0.5 on 21.00, that of ")
    by_loss = Stopping(EarlyStopping(patience=2))
    by_loss.load_state_dict(stopping.state_dict())
    assert by_loss.best is None and by_loss.waited == 0


def test_a_loss_that_never_is_a_number_is_told_as_such():
    stopping = Stopping(EarlyStopping(patience=1))
    stopping.after_validation(1, {"dev_loss": float("nan")})
    assert stopping.ended and stopping.describe().startswith("the dev loss was no number in 1 validation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stopping")
    write_corpus(path)
    prepare(recipe_in(path))
    return path


def recipe_of(folder: Path, patience: int | None = 2, **training) -> Recipe:
    """Make a recipe that validates in every second step and saves in every third."""
    recipe = recipe_in(folder, steps=12, every=3)
    stopping = None if patience is None else EarlyStopping(patience=patience)
    changes = {"validate_every": 2, "early_stopping": stopping, "keep": 9, **training}
    recipe.training = recipe.training.model_copy(update=changes)
    return recipe


DEV = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.2, 10: 1.0, 12: 0.5}


def with_dev_losses(topology, recipe: Recipe, run: Path, kill_at: int | None = None) -> list[str]:
    """Train with the dev losses above; return what was said."""
    from lsmoe_ds.training import loop as module

    number, true_step = 0, module.train_step

    def step(engine, batch, step_number, *arguments):
        nonlocal number
        number = step_number
        return true_step(engine, batch, step_number, *arguments)

    said: list[str] = []
    with (
        mock.patch.multiple(module, validate=lambda *_: DEV[number], train_step=step),
        mock.patch.object(module.Monitor, "say", lambda self, text: said.append(text)),
    ):
        assert loop(topology, recipe, run, kill_at, KeyboardInterrupt()) is None
    return said


def steps_of(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


@pytest.mark.parametrize("kill_at", [None, 5, 7, 8])
def test_it_ends_in_the_same_step_however_often_it_is_killed(pool, folder, kill_at):
    """The best dev loss is of step 4; 6 and 8 are above it. Killed in 7, 6 is counted once."""
    recipe, run = recipe_of(folder), folder / f"run-{kill_at}"
    said = [pool.run(1, with_dev_losses, recipe, run, kill_at)[0]]
    if kill_at is not None:
        assert steps_of(run)[-1] == ("step-3" if kill_at == 5 else "step-6")
        said += pool.run(1, with_dev_losses, recipe, run)
    assert steps_of(run) == ["step-3", "step-6", "step-8"]
    assert has_ended(list_checkpoints(run)[-1], 12, 2) and not has_ended(list_checkpoints(run)[-2], 12, 2)
    assert said[-1][-1] == (
        "stopped after step 8: the dev loss has not improved on 2.000, that of step 4, in 2 validations "
        "(training.early_stopping); no checkpoint has the weights of step 4: training.keep_best keeps the "
        "best that training.checkpoint_every saves"
    )
    if kill_at is not None:
        a, b = weights(folder / "run-None", 8), weights(run, 8)
        assert all(a[name].equal(b[name]) for name in a)


def test_an_ended_training_goes_on_only_if_the_recipe_waits_longer(pool, folder):
    run = folder / "run-again"
    pool.run(1, with_dev_losses, recipe_of(folder), run)
    (said,) = pool.run(1, with_dev_losses, recipe_of(folder), run)
    assert "has ended at step 8, nothing is left to train: the dev loss has not improved on 2.000" in said[-1]
    assert steps_of(run)[-1] == "step-8"
    pool.run(1, with_dev_losses, recipe_of(folder, patience=3), run)
    assert steps_of(run)[-1] == "step-12", "10 and 12 are better"
    assert json.loads((run / "checkpoints" / "step-12" / "state.json").read_text())["position"][
        "stopping"
    ] == {"metric": "loss", "best": 0.5, "step": 12, "waited": 0}


def test_every_rank_stops_and_the_best_checkpoint_is_named(pool, folder):
    recipe, run = recipe_of(folder, checkpoint_every=2, keep=1, keep_best=1), folder / "run-two"
    said = pool.run(2, with_dev_losses, recipe, run)[0]
    assert steps_of(run) == ["step-4", "step-8"]
    assert said[-1].endswith(f"; the best weights are in {run / 'checkpoints' / 'step-4'}")


def test_an_improvement_that_is_too_small_to_count_may_be_the_best(tmp_path):
    """Check that the best checkpoint is named, even if it improves by less than ``min_delta``.

    The last improvement that counted was in step 4. The checkpoint of step 6 has a lower loss.
    """
    for step, loss in ((2, 3.0), (6, 1.9), (8, 2.5)):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"dev_loss": loss, "dev_chrf": 10 * loss}))
    stopping = Stopping(EarlyStopping(patience=2, min_delta=0.5), best=2.0, step=4, waited=2)
    assert _find_best(tmp_path, stopping) == f"; the best weights are in {tmp_path}/checkpoints/step-6"
    by_chrf = Stopping(EarlyStopping(patience=2, metric="chrf"), best=29.0, step=4, waited=2)
    assert _find_best(tmp_path, by_chrf) == f"; the best weights are in {tmp_path}/checkpoints/step-2"
    by_chrf.best = 31.0
    assert "no checkpoint has the weights of step 4" in _find_best(tmp_path, by_chrf)


def test_a_study_takes_a_training_that_has_stopped_for_complete(tmp_path):
    base = prepared_base(tmp_path)
    recipe = yaml.safe_load((base / "base.yaml").read_text())
    recipe["training"] |= {"steps": 9, "validate_every": 1, "learning_rate": 1e-9}
    recipe["training"]["early_stopping"] = {"patience": 2, "min_delta": 1.0}
    (base / "base.yaml").write_text(yaml.safe_dump(recipe))
    value = study_file(members={"naive": {"title": "Naive"}})
    (base / "s.yaml").write_text(yaml.safe_dump(value))
    comparison = run_study(base / "s.yaml", base / "out")
    assert steps_of(base / "out" / "naive-seed3") == ["step-3"]
    assert comparison.runs_missing == 0 and comparison.rows[0].costs.minutes is not None
    assert comparison.about().startswith("at most 9 steps each")
    nothing = AssertionError("it is complete")
    with (
        mock.patch.object(command, "evaluate", side_effect=nothing),
        mock.patch.object(command.launch, "run", side_effect=nothing),
    ):
        again = run_study(base / "s.yaml", base / "out")
    assert again.to_dict() == comparison.to_dict()

"""Curves are drawn where the recipe says: in TensorBoard, and in one run of W&B however often a training is
resumed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.invented_steps import result, step
from support.loops import loop, recipe_in
from support.small_run import write_corpus

from lsmoe_ds.checkpoint.run_folder import find_changes
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError
from lsmoe_ds.training.curves import WandB, check_installed
from lsmoe_ds.training.monitor import Monitor


class PlayedRun:
    def __init__(self, options: dict) -> None:
        self.options, self.logged, self.axes, self.finished = options, [], [], False
        self.error: Exception | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict) -> None:
        if self.error is not None:
            raise self.error
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    """Replace wandb by a stub, and return the list of the runs that it has begun."""
    begun: list[PlayedRun] = []

    def init(**options) -> PlayedRun:
        begun.append(PlayedRun(options))
        return begun[-1]

    played = SimpleNamespace(init=init, Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "wandb", played)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return begun


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "recipe.yaml").write_text("name: demo\ntraining: {steps: 3}\n")
    return tmp_path / "my"


def train(run: Path, first: int, last: int, places=("wandb",), main: bool = True) -> None:
    with Monitor(run, steps=last, every=1, main=main, log_to=places) as monitor:
        monitor.start(first, None)
        for number in range(first + 1, last + 1):
            monitor.after_step(number, step(10), result(float(number), grad_norm=None))
            monitor.record_dev_loss(number, {"dev_loss": 10.0 + number})


def test_a_resumed_training_goes_on_in_the_same_run_of_wandb(run, runs):
    train(run, 0, 2)
    train(run, 2, 3)
    first, second = runs
    assert first.options["id"] == second.options["id"] == (run / "wandb" / "id").read_text().strip() != ""
    assert first.options["resume"] == "allow" and first.options["dir"] == str(run)
    assert (first.options["project"], first.options["name"]) == ("lsmoe_ds", "my")
    assert first.options["config"] == {"name": "demo", "training": {"steps": 3}}
    assert first.axes == [("*", "step")], "the steps of the training, not a count of records"
    losses = [each for each in first.logged if "loss" in each]
    assert [(each["step"], each["loss"]) for each in losses] == [(1, 1.0), (2, 2.0)]
    assert not {"tokens", "seconds", "grad_norm"} & losses[0].keys() and "tokens_per_second" in losses[0]
    assert [each for each in second.logged if "dev_loss" in each] == [{"step": 3, "dev_loss": 13.0}]
    assert first.finished and second.finished
    assert not (run / "tensorboard").exists()


def test_another_run_has_another_id_and_the_environment_names_project_and_run(run, runs, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "many")
    monkeypatch.setenv("WANDB_NAME", "one")
    train(run, 0, 1)
    other = run.with_name("other")
    other.mkdir()
    (other / "recipe.yaml").write_text("name: demo\n")
    train(other, 0, 1)
    assert runs[0].options["id"] != runs[1].options["id"]
    assert (runs[0].options["project"], runs[0].options["name"]) == ("many", "one")


def test_both_places_or_none(run, runs):
    train(run, 0, 1, ("tensorboard", "wandb"))
    assert (run / "tensorboard").is_dir() and len(runs) == 1
    train(run, 1, 2, ())
    assert len(runs) == 1


def test_other_ranks_draw_nothing(run, runs):
    train(run, 0, 1, main=False)
    assert not runs and not (run / "wandb").exists()


def test_curves_that_cannot_be_sent_end_no_training(run, runs, capsys):
    with Monitor(run, steps=3, every=1, main=True, log_to=["wandb"]) as monitor:
        monitor.start(0, None)
        monitor.after_step(1, step(10), result(1.0))
        runs[0].error = RuntimeError("the network is gone\nwith a long story")
        for number in (2, 3):
            monitor.after_step(number, step(10), result(1.0))
    assert capsys.readouterr().err.count("W&B's curves end at step 2: the network is gone\n") == 1


def test_what_does_not_start_is_told_with_ways_out(run, runs, monkeypatch):
    def init(**options):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(
        UserError, match=r"does not start \(No API key configured.*'wandb login', set WANDB_MODE=offline, or"
    ):
        WandB(run, 0)


def test_what_is_not_installed_is_told_before_training(monkeypatch, tmp_path):
    check_installed(["tensorboard"])
    check_installed([])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"names wandb, which is not installed: pip install 'lsmoe_ds\[wandb"):
        check_installed(["tensorboard", "wandb"])
    folder = SimpleNamespace(origin=None)  # of the working directory, that W&B itself has made
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: folder)
    with pytest.raises(UserError, match="not installed"):
        check_installed(["wandb"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="wandb/__init__.py"))
    check_installed(["wandb"])


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is not None, reason="wandb is installed, so it would start"
)
def test_every_rank_ends_where_wandb_does_not_start(pool, tmp_path):
    write_corpus(tmp_path)
    recipe = recipe_in(tmp_path, steps=1)
    prepare(recipe)
    recipe.training.log_to = ["wandb"]
    messages = pool.run(2, loop, recipe, tmp_path / "run")
    assert all("'training.log_to' names wandb, which does not start (No module" in each for each in messages)


def test_a_resumed_run_may_change_the_places(tmp_path):
    before, now = recipe_in(tmp_path), recipe_in(tmp_path)
    now.training.log_to = ["tensorboard", "wandb"]
    assert list(find_changes(before, now)) == []


def test_wandb_itself_keeps_both_parts_of_a_training_under_one_id(run, monkeypatch):
    pytest.importorskip("wandb.sdk", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(run, 0, 2)
    identity = (run / "wandb" / "id").read_text().strip()
    for path in (run / "wandb").glob("offline-run-*"):
        path.rename(run / "first")  # the second may begin within the same second, which is its name
    train(run, 2, 3)
    (part,) = (run / "wandb").glob("offline-run-*")
    for folder in (run / "first", part):
        kept = (folder / f"run-{identity}.wandb").read_bytes()
        assert b"dev_loss" in kept and b"tokens_per_second" in kept

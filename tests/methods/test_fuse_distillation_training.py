"""Fuse distillation in the engine and the training loop: its records, dev losses and evaluation."""

from __future__ import annotations

import json
import math
from unittest import mock

import pytest
from support.commands import main
from support.fuse_distillation import fused, trained_matrices
from support.sameness import VOCABULARY, steps_of
from support.small_run import TARGET_TOP2, make_recipe, write_corpus

from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.inference.beam_search import beam_search
from lsmoe_ds.methods.low_rank.settings import LowRank


def seeded(topology, recipe: Recipe) -> list[tuple]:
    """Loss, negative log-likelihood, divergence, dropped share and gradient norm of each step."""
    from lsmoe_ds.parallel import compat
    from lsmoe_ds.training.engine import build_engine, train_step

    compat.seed_tensor_parallel_random(3, topology.tensor_rank)
    with trained_matrices():
        engine = build_engine(recipe, VOCABULARY, topology)
    steps = steps_of(recipe, topology.data_rank, topology.data)
    results = [train_step(engine, step, i + 1, recipe, topology) for i, step in enumerate(steps)]
    engine.destroy()
    return [
        (r.loss, *(r.metrics[name] for name in ("nll", "distillation", "dropped")), r.grad_norm)
        for r in results
    ]


def test_full_experts_dropout_and_bfloat16_together(pool):
    recipe = fused("capacity")
    recipe.training.dropout = 0.3
    recipe.deepspeed = {**recipe.deepspeed, "bf16": {"enabled": True}}
    (first,), (again,) = (pool.run(1, seeded, recipe) for _ in range(2))
    assert first == again
    for loss, nll, distillation, dropped, norm in first:
        assert (
            all(math.isfinite(each) and each > 0 for each in (loss, nll, distillation, norm))
            and 0.1 < dropped < 0.5
        )


def loop(topology, recipe: Recipe, run) -> None:
    from lsmoe_ds.training.loop import train as train_all

    with trained_matrices():
        train_all(recipe, run, topology)


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    from lsmoe_ds.data.prepare import prepare

    folder = tmp_path_factory.mktemp("fused")
    write_corpus(folder)
    recipe = make_recipe(folder, TARGET_TOP2, None)
    recipe.model.low_rank = LowRank(rank=2, at="both", fuse_distillation=True)
    recipe.training.validate_every = recipe.training.log_every = 1
    open_run(recipe, folder / "run", prepare(recipe).folder / "vocabulary.model")
    pool.run(1, loop, recipe, folder / "run")
    return folder / "run"


def test_a_training_records_both_routes(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["distillation"] > 0 for record in records if "loss" in record] == [True, True]
    dev = [(record["dev_loss"], record["dev_loss_shared"]) for record in records if "dev_loss" in record]
    assert len(dev) == 2 and all(specific != shared for specific, shared in dev)


def saved_dev_losses(topology, recipe: Recipe, run) -> None:
    """Train with dev losses of 2 by the specific and 3 by the shared route."""
    from lsmoe_ds.training import loop as module

    losses = {"specific": 2.0, "shared": 3.0}
    with mock.patch.object(module, "validate", lambda engine, batches, here, route: losses[route]):
        module.train(recipe, run, topology)


def test_the_dev_loss_that_a_checkpoint_is_kept_for_is_that_of_the_specific_route(pool, run):
    recipe, saved = load_recipe(run / "recipe.yaml"), run.with_name("dev")
    open_run(recipe, saved, run / "vocabulary.model")
    pool.run(1, saved_dev_losses, recipe, saved)
    records = [json.loads(line) for line in (saved / "metrics.jsonl").read_text().splitlines()]
    assert records[-2] == {"step": 2, "dev_loss": 2.0, "dev_loss_shared": 3.0}
    assert json.loads((saved / "checkpoints" / "step-2" / "state.json").read_text())["dev_loss"] == 2.0


def test_an_evaluation_keeps_its_route(run, capsys):
    seen = []

    def spy(model, source, ids, banned, search, route, begin):
        seen.append(route)
        return beam_search(model, source, ids, banned, search, route, begin)

    with mock.patch("lsmoe_ds.inference.load.beam_search", spy):
        for given, route in (([], "specific"), (["--route", "shared"], "shared")):
            seen.clear()
            assert main(["evaluate", str(run), "--limit", "2", "--beam", "1", *given]) == 0
            (record,) = (run / "scores").glob("*.shared.*.json" if given else "*.beam-1.limit-2.json")
            assert set(seen) == {route} == {json.loads(record.read_text())["route"]}
    capsys.readouterr()
    assert main(["evaluate", str(run), "--route", "both"]) == 2
    assert "'both' is no route: choose specific or shared" in capsys.readouterr().err

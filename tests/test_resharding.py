"""A training goes on in another layout as if it had always been there: weights, optimizer state, losses."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe, write_corpus
from test_training import loop

from lsmoe_ds.checkpoint.optimizer import PIECES, open_optimizer
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError

# (tensor, expert, world, ZeRO stage)
ONE, EXPERTS, TENSOR, BOTH, FOUR = (1, 1, 1, 0), (1, 2, 2, 0), (2, 1, 2, 1), (2, 2, 4, 2), (1, 4, 4, 1)
# Reading depends on the layout before alone, and what a rank takes on that after: each comes twice.
CIRCLE = [ONE, BOTH, FOUR, EXPERTS, TENSOR, ONE]
PAIRS = [*pairwise(CIRCLE), *pairwise(CIRCLE[::-1])]
EIGHT = {"experts": 8}  # in no layout as many on a rank as there are ranks that share them, unlike 4


def recipe_in(folder, layout, steps: int = 20, bf16: bool = False):
    tensor, expert, _, stage = layout
    sides = TOKEN_TOP2 | EIGHT, TARGET_TOP2
    recipe = make_recipe(folder, *sides, tensor=tensor, expert=expert, stage=stage, bf16=bf16)
    training = {
        "steps": steps,
        "checkpoint_every": 10,
        "log_every": 1,
        "max_grad_norm": 1.0,
        "keep": 2,
        "learning_rate": 0.01,
    }
    batch = recipe.data.batch.model_copy(update={"tokens": 96, "count": 4})
    return recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update=training),
            "data": recipe.data.model_copy(update={"batch": batch}),
            "deepspeed": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}},
        }
    )


def train(pool, recipe, run, layout):
    tensor, expert, world, _ = layout
    assert pool.run(world, loop, recipe, run, tensor=tensor, expert=expert) == [None] * world


def load_and_save(topology, recipe, checkpoint, run):
    """Without a step between."""
    from lsmoe_ds.checkpoint import saving as checkpoints
    from lsmoe_ds.data.prepared import PreparedData
    from lsmoe_ds.training.engine import build_engine

    engine = build_engine(recipe, PreparedData.open(recipe.prepared).vocabulary.size, topology)
    state = checkpoints.load(engine, checkpoint, topology)
    with checkpoints.Saver(run, topology, keep=1) as saver:
        saver.save(engine, state["step"], state["position"])


def losses(run) -> list[float]:
    return [
        line["loss"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resharding")
    write_corpus(path)
    prepare(recipe_in(path, ONE))
    return path


@pytest.fixture(scope="module")
def begun(pool, folder):
    """Run folders after ten steps, by layout and precision."""
    known = {}

    def of(layout, bf16: bool = False):
        if (layout, bf16) not in known:
            known[layout, bf16] = folder / f"begun-{'-'.join(map(str, layout))}-{bf16}"
            train(pool, recipe_in(folder, layout, 10, bf16), known[layout, bf16], layout)
        return known[layout, bf16]

    return of


def states(checkpoint, shapes) -> dict[str, dict[str, torch.Tensor]]:
    from lsmoe_ds.checkpoint.reading import read_checkpoint

    state, weights = open_optimizer(checkpoint), read_checkpoint(checkpoint).weights
    return {name: {**state.whole(name, shape), "weight": weights[name]} for name, shape in shapes.items()}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("before", "after"), PAIRS[:5])
def test_every_value_is_dealt_anew(pool, folder, begun, before, after, bf16, tmp_path):
    from lsmoe_ds.checkpoint.reading import read_checkpoint

    first = begun(before, bf16) / "checkpoints" / "step-10"
    tensor, expert, world, _ = after
    pool.run(
        world,
        load_and_save,
        recipe_in(folder, after, bf16=bf16),
        first,
        tmp_path,
        tensor=tensor,
        expert=expert,
    )
    second = tmp_path / "checkpoints" / "step-10"
    shapes = {name: value.shape for name, value in read_checkpoint(first).weights.items()}
    wanted, found = states(first, shapes), states(second, shapes)
    for name, values in wanted.items():
        assert {"exp_avg", "exp_avg_sq", "weight"} <= values.keys() and values["exp_avg_sq"].any()
        for key in values.keys() & found[name].keys():
            assert torch.equal(values[key], found[name][key]), (name, key)
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_training_goes_on_in_another_layout(pool, folder, begun, before, after, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(begun(before), run)
    train(pool, recipe_in(folder, after), run, after)
    whole = folder / "whole"
    if not whole.exists():
        train(pool, recipe_in(folder, ONE), whole, ONE)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


def test_a_checkpoint_that_does_not_say_what_lies_where(pool, folder, begun, tmp_path):
    import shutil

    shutil.copytree(begun(TENSOR), tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "step-10").iterdir():
        if PIECES.fullmatch(path.name):
            path.unlink()
    with pytest.raises(UserError, match="cannot resume in another layout"):
        open_optimizer(tmp_path / "run" / "checkpoints" / "step-10")


def test_the_state_of_a_run_in_16_bits_at_stage_0_is_read(tmp_path):
    """Earlier versions trained there; such a run resumes at stage 1."""
    from lsmoe_ds.parallel.deepspeed_engine import read_optimizer_file

    copies = [[torch.randn(3)], [torch.randn(2), torch.randn(1)]]
    state = {i: {"step": torch.tensor(4.0), "exp_avg": torch.randn(i + 1)} for i in range(3)}
    written = {"fp32_groups": copies, "optimizer_state_dict": {"state": state, "param_groups": []}}
    torch.save({"optimizer": written}, tmp_path / "state.pt")
    found, holders = read_optimizer_file(tmp_path / "state.pt", lambda values, path: values)
    assert found.keys() == state.keys() and torch.equal(found[2]["exp_avg"], state[2]["exp_avg"])
    assert all(map(torch.equal, holders, [copy for group in copies for copy in group]))

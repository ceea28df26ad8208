"""A training by Adafactor resumes, is resharded, pruned and planned: averages of matrices have shapes of
their own, and 16-bit weights their float32 copies in the state.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from support.alternating import alternating
from support.layouts import load_and_save, losses, pruned_of, shapes_in, states
from support.loops import assert_same_end, loop
from support.plans import SIDES, VOCABULARY, recipe_of
from support.sameness import ragged_batch
from support.short_runs import ShortRuns

from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.config.optimizer import OPTIMIZERS
from lsmoe_ds.config.recipe import Recipe, Training
from lsmoe_ds.convert.command import convert
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.planning.trained import _by_outline, _by_shape
from lsmoe_ds.training.optimizers import OPTIMIZERS as BUILDERS

# (tensor, expert, world, ZeRO stage)
ONE, EXPERTS, TENSOR, BOTH = (1, 1, 1, 0), (1, 2, 2, 0), (2, 1, 2, 0), (2, 2, 4, 0)
FULL = {"momentum": 0.9, "scale_parameters": True}
BARE = {"master_weights": False}


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory):
    training = {"optimizer": "adafactor", "dropout": 0.1}
    return ShortRuns(pool, tmp_path_factory.mktemp("adafactor"), loop, **training)


@pytest.fixture(scope="module")
def even(pool, tmp_path_factory):
    """Without dropout, whose random numbers depend on the layout."""
    return ShortRuns(pool, tmp_path_factory.mktemp("even"), loop, optimizer="adafactor", adafactor=FULL)


@pytest.mark.parametrize(
    ("layout", "bf16", "settings"),
    [
        (ONE, True, FULL),
        (EXPERTS, True, {}),
        (TENSOR, True, BARE),
        (BOTH, False, FULL),
    ],
    ids=str,
)
def test_an_interrupted_run_ends_bit_equal(runs, tmp_path, layout, bf16, settings):
    recipe = runs.recipe(layout, bf16, adafactor=settings)
    runs.train(recipe, tmp_path / "cut", layout, 5, KeyboardInterrupt())
    runs.train(recipe, tmp_path / "cut", layout)
    assert_same_end(tmp_path / "cut", runs.begun(layout, bf16, adafactor=settings), 6)


CHANGES = [(ONE, EXPERTS), (EXPERTS, TENSOR), (TENSOR, BOTH), (BOTH, ONE)]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_a_training_goes_on_in_another_layout(even, tmp_path, before, after):
    shutil.copytree(even.begun(before, steps=3), tmp_path / "run")
    even.train(even.recipe(after), tmp_path / "run", after)
    assert losses(tmp_path / "run") == pytest.approx(losses(even.begun(ONE)), rel=1e-5)


def dealt(runs: ShortRuns, before: Path, after: tuple, recipe: Recipe, to: Path) -> None:
    """Assert that a checkpoint, loaded in another layout and saved again, holds the same state."""
    tensor, expert, world, _ = after
    runs.pool.run(world, load_and_save, recipe, before, to, tensor=tensor, expert=expert)
    shapes = shapes_in(before)
    wanted, found = states(before, shapes), states(to / "checkpoints" / before.name, shapes)
    for name, values in wanted.items():
        matrix = len(shapes[name]) > 1
        kept = {"exp_avg_sq_row", "exp_avg_sq_col"} if matrix else {"exp_avg_sq"}
        assert {*kept, "exp_avg", "weight"} <= values.keys() <= {*kept, "exp_avg", "weight", "values"}
        if matrix:
            assert values["exp_avg_sq_row"].shape == shapes[name][:-1]
        assert values.keys() == found[name].keys() and all(values[key].any() for key in kept)
        assert all(torch.equal(value, found[name][key]) for key, value in values.items()), name
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize(("change", "bf16"), alternating(CHANGES, [False, True]), ids=str)
def test_every_value_is_dealt_anew(even, tmp_path, change, bf16):
    before, after = change
    checkpoint = even.begun(before, bf16, steps=3) / "checkpoints" / "step-3"
    dealt(even, checkpoint, after, even.recipe(after, bf16), tmp_path)


def reshard_into(topology: Any, path: Path, recipe: Recipe, run: Path) -> None:
    from lsmoe_ds.convert.layout import reshard

    if topology.is_main:
        open_run(recipe, run, recipe.prepared / "vocabulary.model")
    reshard(find_model(path), recipe, run, topology)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_a_consolidated_folder_keeps_the_state(even, tmp_path, bf16):
    run = even.begun(BOTH, bf16, steps=3)
    convert(run, "consolidated", None, tmp_path / "whole", check=0, optimizer=True)
    even.pool.run(1, reshard_into, tmp_path / "whole", even.recipe(ONE, bf16), tmp_path / "run")
    shapes = shapes_in(run / "checkpoints" / "step-3")
    wanted = states(run / "checkpoints" / "step-3", shapes)
    found = states(tmp_path / "run" / "checkpoints" / "step-3", shapes)
    for name, values in wanted.items():
        assert values.keys() == found[name].keys()
        assert all(torch.equal(value, found[name][key]) for key, value in values.items()), name


@pytest.fixture(scope="module")
def pruned(pool, tmp_path_factory):
    prune = {"ratio": 0.6, "start": 2, "length": 3, "over": "layer", "matrices": "both"}
    matrices = {"low_rank": {"rank": {"de": 2, "en": 1, "fr": 3}, "index": "learned", "at": "attention"}}
    matrices["low_rank"]["prune"] = prune
    return ShortRuns(
        pool, tmp_path_factory.mktemp("pruned"), loop, matrices, optimizer="adafactor", weight_decay=0.1
    )


@pytest.mark.parametrize(
    ("layout", "bf16", "settings"),
    [(ONE, False, FULL), (ONE, True, {}), (ONE, True, {**FULL, **BARE}), (TENSOR, True, FULL)],
    ids=str,
)
def test_pruned_values_stay_zero(pruned, layout, bf16, settings):
    found = pruned_of(pruned.begun(layout, bf16, adafactor=settings) / "checkpoints" / "step-6")
    cut = 0
    for name, (mask, values) in found.items():
        cut += int((~mask).sum())
        whole = {key: value for key, value in values.items() if value.shape == mask.shape}
        assert ("exp_avg" in whole) == ("momentum" in settings)
        assert ("values" in whole) == (bf16 and settings.get("master_weights", True))
        for key, value in whole.items():
            assert not value[~mask].any(), (name, key)
    assert cut > 0


def kept_by_engine(topology: Any, recipe: Recipe) -> tuple[int, int, int, bool]:
    """Return the bytes of a rank's weights, gradients and optimizer state after a step, and whether what is
    frozen stays as it was.
    """
    from lsmoe_ds.parallel import deepspeed_engine
    from lsmoe_ds.training.engine import build_engine

    engine = build_engine(recipe, VOCABULARY, topology)
    frozen = {p: p.detach().clone() for p in engine.module.parameters() if not p.requires_grad}
    batch, gradients = ragged_batch(torch.Generator().manual_seed(3), recipe, 4), 0
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(batch.source, batch.decoder_input, batch.labels, batch.ids).loss)
        gradients = sum(p.grad.nbytes for p in engine.module.parameters() if p.grad is not None)
        engine.step()
    states = deepspeed_engine.optimizer_states(engine).values()
    state = sum(value.nbytes for each in states for value in each.values() if value.dim())
    weights = sum(p.nbytes for p in engine.module.parameters())
    same = all(torch.equal(p, value) for p, value in frozen.items())
    engine.destroy()
    return weights, gradients, state, same


def planned_recipe(tensor: int, expert: int, bf16: bool, trainable: Any, model: Any, settings: Any) -> Recipe:
    given = recipe_of("token", "target", tensor, expert, 0, bf16).model_dump(exclude_none=True)
    given["model"] |= model
    given["training"] |= {"optimizer": "adafactor", "adafactor": settings, "trainable": trainable}
    return Recipe.model_validate(given)


MATRICES = {"low_rank": {"rank": 4, "at": "attention"}}
PLANNED = [
    (1, 2, False, "all", {}, {}),
    (2, 2, False, "all", MATRICES, {"momentum": 0.9}),
    (2, 1, True, "all", MATRICES, {}),
    (1, 2, True, "all", {}, BARE),
    (2, 2, True, "methods", MATRICES, {"momentum": 0.9}),
    (1, 1, True, ["decoder.*attention*"], {"clsr": {"gate": 8}}, {}),
]


@pytest.mark.parametrize(("tensor", "expert", "bf16", "trainable", "model", "settings"), PLANNED)
def test_memory_is_that_of_an_engine(pool, tensor, expert, bf16, trainable, model, settings):
    recipe = planned_recipe(tensor, expert, bf16, trainable, model, settings)
    planned = plan(recipe, 2)
    assert {each.stage for each in planned.memory} == {0}, "the stages at which it works"
    (wanted,) = [each for each in planned.memory if each.precision == planned.precision]
    for weights, gradients, state, same in pool.run(2, kept_by_engine, recipe, tensor=tensor, expert=expert):
        assert (weights, gradients, state) == (wanted.weights, wanted.gradients, wanted.optimizer)
        assert same


@pytest.mark.parametrize(
    ("deepspeed", "message"),
    [
        ("ds_configs/zero1.json", "asks for ZeRO stage 1, .* ds_configs/zero0.json or ds_configs/bf16_zero0"),
        ({"zero_optimization": {"stage": 2}}, "asks for ZeRO stage 2"),
        ({"fp16": {"enabled": True}}, "enables 'fp16': enable 'bf16', or neither"),
    ],
)
def test_what_it_cannot_step_is_refused(deepspeed, message):
    given = planned_recipe(1, 1, False, "all", {}, {}).model_dump(exclude_none=True)
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({**given, "deepspeed": deepspeed})


def test_settings_of_another_optimizer_are_refused():
    given = planned_recipe(1, 1, False, "all", {}, {}).model_dump(exclude_none=True)
    given["training"]["optimizer"] = "adam"
    with pytest.raises(ValidationError, match="'adafactor' is given, but 'optimizer' is adam: leave it out"):
        Recipe.model_validate(given)


@pytest.mark.parametrize("sides", [*SIDES, ("token", "sentence")], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_shapes_by_formula_are_those_of_an_outline(sides, shared):
    more = {"router_bias": True} if set(sides) <= {"token", "sentence"} else {}
    recipe = recipe_of(*sides, fuse_distillation=shared and sides != ("dense", "dense"), **more)
    assert sorted(_by_shape(recipe), key=str) == sorted(_by_outline(recipe), key=str)


def test_every_optimizer_is_known_to_all_who_ask():
    (names,) = [get_args(Training.model_fields["optimizer"].annotation)]
    assert set(names) == OPTIMIZERS.keys() == BUILDERS.keys()

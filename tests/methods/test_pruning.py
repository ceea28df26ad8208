"""Gradual pruning of low-rank matrices in a training: what is pruned stays 0, in any layout, and the schedule
goes on after resuming or resharding in its middle.
"""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
import torch
from support.layouts import ONE, TENSOR, losses, pruned_of, train
from support.small_run import make_recipe, write_corpus

from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare

STEPS, RATIO = 12, 0.6
DATA = (1, 1, 2, 2)  # tensor, expert, world, ZeRO stage
LOW_RANK = {"rank": {"de": 2, "en": 1, "fr": 3}, "index": "learned", "at": ["0"]}  # of each side


def recipe_in(folder, layout, steps: int = STEPS, bf16: bool = False, **prune) -> Recipe:
    tensor, _, _, stage = layout
    value = make_recipe(folder, None, None, tensor=tensor, stage=stage, bf16=bf16).model_dump(mode="json")
    prune = {"ratio": RATIO, "start": 2, "length": 7, "over": "layer", "matrices": "both", **prune}
    value["model"]["low_rank"] = {**LOW_RANK, "prune": prune}
    value["data"]["batch"] |= {"count": 2}
    value["training"] |= {"steps": steps, "checkpoint_every": 6, "log_every": 1, "max_grad_norm": 1.0}
    value["training"] |= {"learning_rate": 0.01}
    return Recipe.model_validate(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pruning")
    write_corpus(path)
    prepare(recipe_in(path, ONE))
    return path


@pytest.fixture(scope="module")
def run_of(pool, folder):
    """Return a function that trains a run, once for each layout, precision and pruning settings."""
    known = {}

    def of(layout, bf16=False, **prune):
        key = (layout, bf16, str(prune))
        if key not in known:
            known[key] = folder / f"run-{len(known)}"
            train(pool, recipe_in(folder, layout, STEPS, bf16, **prune), known[key], layout)
        return known[key]

    return of


@pytest.mark.parametrize(("layout", "bf16"), [(ONE, False), (DATA, True), (TENSOR, False), (TENSOR, True)])
def test_pruned_values_are_zero_for_the_weights_and_the_optimizer(run_of, layout, bf16):
    found = pruned_of(run_of(layout, bf16=bf16) / "checkpoints" / f"step-{STEPS}")
    assert len(found) == 2 * 2 * (6 + 10)  # matrices, halves, linear layers
    total = pruned = 0
    for name, (mask, values) in found.items():
        total, pruned = total + mask.numel(), pruned + int((~mask).sum())
        for key, value in values.items():
            assert not value[~mask].any(), (name, key)
            assert value[mask].any() or key != "weight", (name, key)
    assert pruned / total == pytest.approx(RATIO, abs=0.01)


def test_a_checkpoint_holds_what_is_left(run_of):
    checkpoint = run_of(ONE) / "checkpoints" / f"step-{STEPS}"
    (path,) = checkpoint.glob("mp_rank_*_model_states.pt")
    stored = torch.load(path, weights_only=True)["module"]
    packed = [name for name, value in stored.items() if isinstance(value, dict) and "values" in value]
    assert packed and all(name.endswith(("vertical", "flat")) for name in packed)
    whole = read_checkpoint(checkpoint).weights
    for name in packed:
        assert len(stored[name]["values"]) == int(whole[name].count_nonzero()) < whole[name].numel()


@pytest.mark.parametrize("over", ["matrix", "language", "layer"])
def test_each_group_is_pruned_to_the_ratio(run_of, folder, over):
    recipe = recipe_in(folder, ONE)
    found = pruned_of(run_of(ONE, over=over) / "checkpoints" / f"step-{STEPS}")
    from lsmoe_ds.methods.low_rank.bank import rows_of

    rows = dict(zip(recipe.languages.codes, rows_of(recipe.model.low_rank, recipe.languages), strict=True))
    groups: dict[object, list[torch.Tensor]] = {}
    for name, (mask, _) in found.items():
        kind = name.rpartition(".")[2]
        for code, own in rows.items():
            key = {"matrix": (name, code), "language": code, "layer": tuple(name.split(".")[:2])}[over]
            groups.setdefault((kind, key), []).append(mask[own].flatten())
    for key, masks in groups.items():
        joined = torch.cat(masks)
        assert int((~joined).sum()) == round(RATIO * joined.numel()), key


def test_languages_that_are_not_chosen_stay_whole(run_of, folder):
    recipe = recipe_in(folder, ONE)
    found = pruned_of(run_of(ONE, languages=["fr"], matrices="vertical") / "checkpoints" / f"step-{STEPS}")
    for name, (mask, _) in found.items():
        assert name.endswith("vertical")
        assert mask[:3].all() and int((~mask[3:]).sum()) > 0, "de has two rows, en one, fr the last three"
    assert recipe.languages.codes == ("de", "en", "fr")


def half_of(run, to) -> None:
    """Copy a run as it was after half of its steps."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / f"step-{STEPS}")


def test_a_training_resumes_in_the_middle_of_the_schedule_to_the_bit(pool, folder, run_of, tmp_path):
    half_of(run_of(ONE), tmp_path / "run")
    train(pool, recipe_in(folder, ONE), tmp_path / "run", ONE)
    assert losses(tmp_path / "run") == losses(run_of(ONE))
    whole = pruned_of(run_of(ONE) / "checkpoints" / f"step-{STEPS}")
    for name, (mask, values) in pruned_of(tmp_path / "run" / "checkpoints" / f"step-{STEPS}").items():
        wanted, others = whole[name]
        assert torch.equal(mask, wanted), name
        assert all(torch.equal(value, others[key]) for key, value in values.items()), name


@pytest.mark.parametrize(("before", "after"), [*pairwise([ONE, TENSOR, DATA, ONE])])
def test_a_training_is_resharded_in_the_middle_of_the_schedule(pool, folder, run_of, before, after, tmp_path):
    half_of(run_of(before), tmp_path / "run")
    train(pool, recipe_in(folder, after), tmp_path / "run", after)
    assert losses(tmp_path / "run") == pytest.approx(losses(run_of(ONE)), rel=1e-5)

"""Whole models out of real checkpoints of any layout."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.conversions import make_banked_run
from support.sameness import whole
from support.small_run import (
    PAIR_TOP1,
    TARGET_TOP2,
    TOKEN_TOP2,
    make_run,
)

from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import load
from lsmoe_ds.planning.costs import Parts
from lsmoe_ds.planning.memory import local_parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("consolidate")


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {"stage": 0}),
        (2, {"tensor": 2, "stage": 1}),
        (2, {"expert": 2, "stage": 2, "bf16": True}),
        (4, {"tensor": 2, "expert": 2, "stage": 1}),
        (4, {"expert": 2, "stage": 2}),  # two replicas of each expert
    ],
)
def test_a_checkpoint_of_any_layout_becomes_the_whole_model(pool, folder, world, layout):
    run, ranks = make_run(pool, folder, TARGET_TOP2, TOKEN_TOP2, world, **layout)
    wanted = whole([(rank,) for rank in ranks], layout.get("tensor", 1), 0)
    found = read_checkpoint(run / "checkpoints" / "step-2")
    assert found.step == 2
    assert found.weights.keys() == wanted.keys()
    assert sum(".experts.3." in name for name in found.weights) == 8
    for name, value in wanted.items():
        torch.testing.assert_close(found.weights[name], value, rtol=0, atol=0, msg=name)
    model = load(run, "cpu").model  # names and shapes are those of the whole model
    torch.testing.assert_close(
        model.embedding.tokens.weight, wanted["embedding.tokens.weight"], rtol=0, atol=0
    )


def test_banks_of_tensor_parallel_ranks_are_joined(pool, tmp_path):
    ranks = {"de": 1, "en": 4, "fr": 2}
    run, parts = make_banked_run(
        pool,
        tmp_path,
        {"rank": ranks, "index": "language", "at": "both", "fuse_distillation": True},
        2,
        tensor=2,
    )
    wanted = whole([(part,) for part in parts], 2, 0)
    found = read_checkpoint(run / "checkpoints" / "step-2").weights
    assert found.keys() == wanted.keys()
    banks = {name: value for name, value in found.items() if "_low_rank." in name}
    assert len(banks) == 2 * (
        5 * 2 + 8 * 4
    )  # flat and vertical: of 5 feed-forwards, and of 2 + 3 + 3 attentions
    assert banks["decoder.1.feed_forward.contract_low_rank.flat"].shape == (
        11,
        16,
    )  # all ranks and the shared one; width
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    for name, value in banks.items():
        rows = value.split(
            [1, 4, 2, 4]
        )  # each language's matrices were trained, and in each half of what is spread
        assert all(half.abs().max() > 0 for each in rows for half in each.chunk(2, 1)), name
    model = load(run, "cpu")
    assert (
        sum(value.numel() for value in found.values())
        == Parts.of(model.recipe).whole.total
        == model.parameters
    )
    for part in parts:
        assert sum(value.size for value, _ in part.values()) == sum(
            local_parameters(Parts.of(model.recipe).whole, 2, 1)
        )


@pytest.fixture(scope="module")
def run(pool, folder):
    return make_run(pool, folder, PAIR_TOP1, None, 1, stage=1)[0]


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def flip(path, at=-40):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_is_named(copy):
    step = copy / "checkpoints" / "step-2"
    model, expert = "mp_rank_00_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"
    optimizer = next(step.glob("*_optim_states.pt")).name
    for name in (model, expert, "state.json"):
        before = (step / name).read_bytes()
        flip(step / name)
        with pytest.raises(UserError, match=f"damaged.*{name}|{name} is damaged"):
            load(copy)
        (step / name).write_bytes(before)
    flip(step / optimizer)
    load(copy)  # its sum is not needed to use the model, its size is checked
    (step / optimizer).write_bytes(b"short")
    with pytest.raises(UserError, match=f"{optimizer} has 5 bytes"):
        load(copy)
    (step / optimizer).unlink()
    with pytest.raises(UserError, match=f"{optimizer} is missing"):
        load(copy)


def test_a_manifest_that_is_not_one_is_refused(copy):
    manifest = copy / "checkpoints" / "step-2" / "manifest.json"
    for text in (
        "{",
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": {"mp_rank_00_model_states.pt": {}}}',
        '{"files": {}}',
    ):
        manifest.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            load(copy)
    manifest.unlink()
    with pytest.raises(UserError, match=r"manifest\.json"):
        load(copy)


def test_a_checkpoint_that_would_run_code_is_refused(copy):
    class Evil:
        def __reduce__(self):
            return (copy.joinpath("ran").touch, ())

    step = copy / "checkpoints" / "step-2"
    path = step / "mp_rank_00_model_states.pt"
    torch.save({"module": {"a": Evil()}}, path)
    manifest = json.loads((step / "manifest.json").read_text())
    from lsmoe_ds.folders import describe_files

    manifest["files"] |= describe_files(step, [path.name])
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged"):
        load(copy)
    assert not (copy / "ran").exists()


def test_a_damaged_newest_checkpoint_names_an_earlier_one(copy):
    checkpoints = copy / "checkpoints"
    shutil.copytree(checkpoints / "step-2", checkpoints / "step-10")
    flip(checkpoints / "step-10" / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"an earlier checkpoint is .*step-2$"):
        load(copy)
    assert load(checkpoints / "step-2").step == 2


def test_what_is_no_model_is_refused(copy, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in ((tmp_path / "none", "there is no folder"), (empty, "neither a run folder")):
        with pytest.raises(UserError, match=message):
            load(path)
    monkeypatch.chdir(copy / "checkpoints" / "step-2")
    assert load(".").step == 2
    (copy / "vocabulary.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"vocabulary\.model"):
        load(copy)
    (copy / "vocabulary.model").unlink()
    with pytest.raises(UserError, match=r"vocabulary\.model is missing"):
        load(copy)
    shutil.rmtree(copy / "checkpoints")
    (copy / "vocabulary.model").touch()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load(copy)


def test_weights_of_another_recipe_are_refused(copy):
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("hidden: 16", "hidden: 32"))
    with pytest.raises(UserError, match="do not belong to the recipe"):
        load(copy)

"""The moving average of the weights is the same in every layout, resumes, is resharded, and translates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.commands import main
from support.layouts import BOTH, EXPERTS, FOUR, ONE, TENSOR, recipe_in, train
from support.loops import loop
from support.small_run import write_corpus

from lsmoe_ds.checkpoint.averages import EMA, read_average
from lsmoe_ds.checkpoint.optimizer import VALUES, open_optimizer
from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.optimizer import Adafactor
from lsmoe_ds.config.recipe import Ema
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.inference.load import load
from lsmoe_ds.planning.memory import memory

DECAY = 0.6


def recipe_of(folder: Path, layout=ONE, steps: int = 4, bf16: bool = False, decay: float | None = DECAY):
    """Make a recipe that saves every step."""
    recipe = recipe_in(folder, layout, steps, bf16)
    ema = None if decay is None else Ema(decay=decay)
    changes = {"ema": ema, "checkpoint_every": 1, "keep": 99}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ema")
    write_corpus(path)
    prepare(recipe_in(path, ONE))
    return path


@pytest.fixture(scope="module")
def run(pool, folder) -> Path:
    train(pool, recipe_of(folder), folder / "run", ONE)
    return folder / "run"


def stepped(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the float32 values that the optimizer has stepped."""
    checkpoint = run / "checkpoints" / f"step-{step}"
    whole, state = read_checkpoint(checkpoint), open_optimizer(checkpoint)
    names = whole.weights.keys() - whole.frozen
    return {
        name: state.whole(name, whole.weights.shape(name)).get(VALUES, whole.weights[name]) for name in names
    }


def averages(run: Path, step: int) -> dict[str, torch.Tensor]:
    weights = read_weights(find_model(run / "checkpoints" / f"step-{step}"), EMA).tensors
    return {name: weights[name] for name in weights}


def assert_average(run: Path, last: int, first: int = 1) -> None:
    """Compare the average in the last step with the sum of all weights, each with its share."""
    shares = [DECAY ** (last - step) for step in range(first, last + 1)]
    each = [stepped(run, step) for step in range(first, last + 1)]
    found = averages(run, last)
    moved = 0.0
    for name in each[0]:
        wanted = sum(share * values[name].double() for share, values in zip(shares, each, strict=True))
        torch.testing.assert_close(found[name].double(), wanted / sum(shares), rtol=1e-5, atol=1e-7)
        assert found[name].dtype == torch.float32
        moved = max(moved, float((found[name] - each[-1][name]).abs().max()))
    assert moved > 1e-3, "it is not the weights themselves"


LAYOUTS = [(EXPERTS, False), (TENSOR, False), (BOTH, False), (FOUR, True), (ONE, True), (EXPERTS, True)]


@pytest.mark.parametrize(("layout", "bf16"), LAYOUTS)
def test_every_layout_averages_what_it_steps(pool, folder, run, layout, bf16):
    there = folder / f"run-{'-'.join(map(str, layout))}-{bf16}"
    train(pool, recipe_of(folder, layout, bf16=bf16), there, layout)
    assert_average(there, 4)
    if not bf16:
        one, other = averages(run, 4), averages(there, 4)
        assert one.keys() == other.keys()
        for name, value in one.items():
            if not name.endswith("key.bias"):  # whose gradient is rounding, which Adam makes steps of
                torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("master_weights", (True, False))
def test_weights_of_16_bits_that_adafactor_steps_are_averaged_in_float32(pool, folder, master_weights):
    recipe = recipe_of(folder, bf16=True)
    changes = {"optimizer": "adafactor", "adafactor": Adafactor(master_weights=master_weights)}
    recipe = recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update=changes),
            "deepspeed": {**recipe.deepspeed, "zero_optimization": {"stage": 0}},
        }
    )
    there = folder / f"run-adafactor-{master_weights}"
    train(pool, recipe, there, ONE)
    assert_average(there, 4)


def test_one_process_averages_what_it_steps(run):
    assert_average(run, 4)
    first = averages(run, 1)
    assert all(torch.equal(first[name], value) for name, value in stepped(run, 1).items())


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_a_run_that_is_resumed_has_the_same_average_to_the_bit(pool, folder, optimizer):
    recipe = recipe_of(folder)
    recipe.training.optimizer = optimizer
    recipe.deepspeed["zero_optimization"] = {"stage": 0}
    whole, cut = folder / f"whole-{optimizer}", folder / f"cut-{optimizer}"
    train(pool, recipe, whole, ONE)
    pool.run(1, loop, recipe, cut, 3, KeyboardInterrupt())
    train(pool, recipe, cut, ONE)
    assert_average(cut, 4)
    one, other = averages(whole, 4), averages(cut, 4)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("after", [BOTH, EXPERTS])
def test_a_run_goes_on_averaging_in_another_layout(pool, folder, run, after, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    train(pool, recipe_of(folder, after, steps=6), tmp_path / "run", after)
    assert_average(tmp_path / "run", 6)


def test_what_is_frozen_is_taken_as_it_is(pool, folder, tmp_path):
    recipe = recipe_of(folder, EXPERTS)
    recipe.training.trainable = ["decoder.*"]
    train(pool, recipe, tmp_path / "run", EXPERTS)
    assert_average(tmp_path / "run", 4)
    whole = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-4")
    found = averages(tmp_path / "run", 4)
    assert whole.frozen and found.keys() == whole.weights.keys()
    assert all(torch.equal(found[name], whole.weights[name]) for name in whole.frozen)


def test_a_plan_counts_it(folder):
    with_it, without = recipe_of(folder), recipe_of(folder, decay=None)
    for stage, precision, each in ((0, "float32", 8), (0, "bfloat16", 12), (1, "float32", 12)):
        more, less = (memory(recipe, 2, stage, precision).optimizer for recipe in (with_it, without))
        assert more / less == pytest.approx((each + 4) / each)


def test_a_conversion_takes_the_average_and_agrees_with_it(run, tmp_path):
    record = convert(run, "consolidated", None, tmp_path / "whole", check=3, average=EMA)
    assert record["same_translations"] == record["sentences"] == 3
    assert record["largest_logit_difference"] == 0
    found, wanted = Tensors.of(read_weights(find_model(tmp_path / "whole")).tensors), averages(run, 4)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    provenance = json.loads((tmp_path / "whole" / "provenance.json").read_text())
    assert provenance["average"] == "ema"
    sums = json.loads((run / "checkpoints" / "step-4" / "manifest.json").read_text())["files"]
    optimizer = [name for name in provenance["source_files"] if "optim" in name or "states" in name]
    assert optimizer and all(provenance["source_files"][name] == sums[name]["sha256"] for name in optimizer)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "4, the moving average of the weights up to it" in card


def test_scores_and_translations_are_those_of_the_average(run, tmp_path, capsys, monkeypatch):
    convert(run, "consolidated", None, tmp_path / "whole", check=0, average=EMA)
    options = {"directions": ["en-de"], "beam": 1, "limit": 4, "progress": False}
    table = evaluate(run, average=EMA, out=tmp_path / "scores", **options)
    of_folder = evaluate(tmp_path / "whole", **options)
    assert table.directions[0].metrics == of_folder.directions[0].metrics
    assert table.question == "step-4.ema.test.beam-1.limit-4.en-de"
    stored = ScoreTable.read(tmp_path / "scores" / "scores" / f"{table.question}.json")
    assert stored.average == "ema"
    assert stored.describe(table.asked).startswith("Step 4, the moving average of the weights, test set, ")
    mean = evaluate(run, average=2, out=tmp_path / "scores", **options)
    assert mean.question == "step-4.mean-2.test.beam-1.limit-4.en-de"
    logits = [load(run, "cpu", average=each).model.embedding.tokens.weight for each in (1, 2, EMA)]
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_a_complete_evaluation_of_an_average_is_not_the_run_s(run, tmp_path):
    options = {"beam": 1, "progress": False, "out": tmp_path / "scores"}
    evaluate(run, average=EMA, **options)
    assert not (tmp_path / "scores" / "scores.json").exists()
    assert not (tmp_path / "scores" / "routing.json").exists()
    table = evaluate(run, **options)
    assert ScoreTable.read(tmp_path / "scores" / "scores.json").question == table.question


def test_merged_parts_are_of_one_average(run, tmp_path):
    out = ["--out", str(tmp_path), "--beam", "1", "--limit", "2"]
    for part in ("1/2", "2/2"):
        assert main(["evaluate", str(run), "--average", "ema", "--part", part, *out]) == 0
    assert main(["evaluate", str(run), "--merge", "2", *out]) == 2
    assert main(["evaluate", str(run), "--merge", "2", "--average", "ema", *out]) == 0
    assert (tmp_path / "scores" / "step-4.ema.test.beam-1.limit-2.json").is_file()


def test_what_is_no_average_is_refused(pool, folder, run, tmp_path, capsys):
    assert read_average("3") == 3 and read_average("ema") == "ema"
    for text in ("0", "-1", "two", "1.5", "", "EMA"):
        with pytest.raises(UserError, match=r"give a number N for the mean .* or ema"):
            read_average(text)
    train(pool, recipe_of(folder, decay=None, steps=1), tmp_path / "plain", ONE)
    with pytest.raises(UserError, match=r"--average ema is .* training.ema keeps, but .*plain was trained w"):
        load(tmp_path / "plain", "cpu", average=EMA)
    convert(run, "consolidated", None, tmp_path / "whole", check=0)
    with pytest.raises(UserError, match="--average is for the checkpoints of a run"):
        load(tmp_path / "whole", "cpu", average=EMA)
    for verb in (
        ["evaluate"],
        ["translate", "--direction", "en-de"],
        ["convert", "--as", "dense", "--out", "x"],
    ):
        assert main([verb[0], str(run), *verb[1:], "--average", "none"]) == 2
        assert "--average is 'none': give a number N" in capsys.readouterr().err


def test_a_damaged_optimizer_state_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-4"
    (name,) = open_optimizer(checkpoint).file_names
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*; an earlier checkpoint is .*step-3"):
        load(tmp_path / "run", "cpu", average=EMA)

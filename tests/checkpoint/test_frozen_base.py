"""What does not train is stored once for a run, and every reader of the run finds it there."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.alternating import alternating
from support.layouts import BOTH, EXPERTS, ONE, TENSOR, load_and_save, losses, states
from support.loops import assert_same_end, loop
from support.short_runs import ShortRuns
from support.small_run import TOKEN_TOP2

from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.checkpoint.run_folder import list_checkpoints, newest_whole
from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.training.start import check

EN_DE = Direction("en", "de")
PATTERNS = ["encoder.*_low_rank.*", "decoder.2.*"]  # the experts, which the second layer has, are frozen


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory):
    """Return runs that by default take three steps and train low-rank matrices, experts and routers."""
    training = {"steps": 3, "trainable": "methods", "validate_every": 3, "dropout": 0.1}
    matrices = {"low_rank": {"rank": 2, "at": "both"}}
    return ShortRuns(pool, tmp_path_factory.mktemp("frozen"), loop, matrices, **training)


def stored_in(checkpoint: Path) -> set[str]:
    """Names of all weights in DeepSpeed's files."""
    found = set()
    for path in checkpoint.glob("*model_states.pt"):
        values = torch.load(path, weights_only=False)
        assert values.get("frozen_param_fragments") is None
        values = values.get("module", values)
        found |= {name for name, value in values.items() if isinstance(value, torch.Tensor)}
    return found


CASES = [
    (ONE, "methods", False),
    (BOTH, "methods", False),
]
CASES += [
    (EXPERTS, PATTERNS, False),
    (BOTH, PATTERNS, False),
    (ONE, "methods", True),
    ((2, 2, 4, 0), PATTERNS, True),
    (BOTH, "methods", True),
]


@pytest.mark.parametrize(("layout", "trainable", "bf16"), CASES, ids=str)
def test_an_interrupted_run_ends_bit_equal(runs, layout, trainable, bf16, tmp_path):
    whole = runs.begun(layout, bf16, trainable=trainable, steps=6)
    cut, recipe = tmp_path / "cut", runs.recipe(layout, bf16, trainable=trainable, steps=6)
    runs.train(recipe, cut, layout, 5, KeyboardInterrupt())
    assert [path.name for path in list_checkpoints(cut)] == ["step-3"]
    written = {path: path.stat().st_mtime_ns for path in (cut / "frozen").iterdir()}
    runs.train(recipe, cut, layout)
    assert_same_end(whole, cut, 6)
    assert written == {path: path.stat().st_mtime_ns for path in (cut / "frozen").iterdir()}, "once for a run"
    first, last = (read_checkpoint(whole / "checkpoints" / f"step-{step}") for step in (3, 6))
    moved = {name for name in first.weights if not torch.equal(first.weights[name], last.weights[name])}
    assert moved and moved <= first.weights.keys() - first.frozen
    assert first.frozen == last.frozen and first.frozen
    names = stored_in(whole / "checkpoints" / "step-6")
    assert names and len(names) < len(first.weights)
    for name in names:
        of_methods = any(part in name for part in ("_low_rank.", "experts", "router"))
        assert of_methods or name.startswith("decoder.2."), name


def test_a_checkpoint_is_as_small_as_what_trains(runs):
    """Weights, float32 values and two moments of it; the base is written once."""
    run = runs.begun(ONE, trainable=["encoder.0.*_low_rank.flat"], steps=6)
    whole = read_checkpoint(run / "checkpoints" / "step-6")
    entries = whole.weights.entries
    trained = sum(entry.numbers for name, entry in entries.items() if name not in whole.frozen)
    assert len(whole.weights) - len(whole.frozen) == 6
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in list_checkpoints(run)]
    base = (run / "frozen" / "model.safetensors").stat().st_size
    assert base > 4 * (whole.weights.numbers - trained) and len(sizes) == 2
    assert max(sizes) < 12 * trained + 70_000 < base  # names, and what DeepSpeed notes for each


CHANGES = [(ONE, BOTH), (BOTH, EXPERTS), (EXPERTS, TENSOR), (TENSOR, ONE)]


@pytest.mark.parametrize(("change", "trainable"), alternating(CHANGES, ["methods", PATTERNS]), ids=str)
def test_every_value_is_dealt_anew(pool, runs, change, trainable, tmp_path):
    before, after = change
    first = runs.begun(before, trainable=trainable) / "checkpoints" / "step-3"
    tensor, expert, world, _ = after
    pool.run(
        world,
        load_and_save,
        runs.recipe(after, trainable=trainable),
        first,
        tmp_path,
        tensor=tensor,
        expert=expert,
    )
    second = tmp_path / "checkpoints" / "step-3"
    whole, again = read_checkpoint(first), read_checkpoint(second)
    assert whole.frozen == again.frozen and whole.weights.keys() == again.weights.keys()
    for name in whole.weights:
        assert torch.equal(whole.weights[name], again.weights[name]), name
    shapes = {name: value.shape for name, value in whole.weights.items() if name not in whole.frozen}
    wanted, found = states(first, shapes), states(second, shapes)
    for name, values in wanted.items():
        for key in values.keys() & found[name].keys():
            assert torch.equal(values[key], found[name][key]), (name, key)


def test_a_training_goes_on_in_another_layout(runs, tmp_path):
    quiet = {"dropout": 0.0}
    shutil.copytree(runs.begun(BOTH, **quiet), tmp_path / "run")
    runs.train(runs.recipe(EXPERTS, steps=6, **quiet), tmp_path / "run", EXPERTS)
    assert losses(tmp_path / "run") == pytest.approx(losses(runs.begun(ONE, steps=6, **quiet)), rel=1e-5)
    paths = list_checkpoints(tmp_path / "run")
    first, last = (json.loads((path / "state.json").read_text()) for path in paths)
    assert first["frozen"] == last["frozen"]


def test_a_copied_run_is_whole(runs, tmp_path):
    shutil.copytree(runs.begun(EXPERTS), tmp_path / "elsewhere")
    found, complaints = newest_whole(tmp_path / "elsewhere")
    assert found is not None and not complaints
    assert len(read_weights(find_model(found)).tensors) == len(read_checkpoint(found).weights)


def spoil(path: Path) -> None:
    value = bytearray(path.read_bytes())
    value[-1] ^= 1
    path.write_bytes(value)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            lambda base: shutil.rmtree(base),
            "frozen/manifest.json is missing: .* has the weights that do not train",
        ),
        (lambda base: (base / "model.safetensors").unlink(), "frozen/model.safetensors is missing"),
        (
            lambda base: spoil(base / "model.safetensors"),
            r"model.safetensors is not what was written \(its sha256 differs\)",
        ),
        (
            lambda base: (base / "manifest.json").write_text('{"files": {}}'),
            "frozen has other weights than those beside which",
        ),
    ],
    ids=["removed", "a file missing", "a bit changed", "another base"],
)
def test_a_lost_or_changed_base_is_one_sentence(runs, tmp_path, harm, sentence):
    run = tmp_path / "run"
    shutil.copytree(runs.begun(ONE), run)
    harm(run / "frozen")
    with pytest.raises(UserError, match=sentence) as error:
        newest_whole(run)
    said = str(error.value)  # what trained is whole: it is not to be removed
    assert (
        said.endswith("frozen back as it was; a copy of the run has the same") and said.count("sha256") <= 1
    )
    with pytest.raises(UserError, match=f"{sentence}.*; put .*frozen back as it was"):
        weights = read_weights(find_model(run)).tensors
        [weights[name] for name in weights]
    with pytest.raises(UserError, match=sentence):
        whole = read_checkpoint(run / "checkpoints" / "step-3")
        [whole.weights[name] for name in whole.weights]


def save_on_a_full_disk(topology, recipe, run):
    """Save a checkpoint to a disk that is full after three tensors, and return the rank's error message.

    The barrier afterwards passes only if the ranks can still talk to each other.
    """
    from unittest import mock

    import torch.distributed as dist

    from lsmoe_ds.checkpoint import frozen
    from lsmoe_ds.checkpoint.saving import Saver
    from lsmoe_ds.training.engine import build_engine

    def save(tensors, folder):
        for name in list(tensors)[:3]:
            tensors[name]
        raise OSError(errno.ENOSPC, "No space left on device")

    engine = build_engine(recipe, 140, topology)
    with mock.patch.object(frozen, "save_tensors", save), pytest.raises(UserError) as error:
        Saver(run, topology, keep=1).save(engine, 1, {})
    dist.barrier()
    return str(error.value)


def test_a_full_disk_is_one_sentence_on_every_rank(pool, runs, tmp_path):
    found = pool.run(2, save_on_a_full_disk, runs.recipe(TENSOR), tmp_path / "run", tensor=2)
    wanted = f"the disk is full: {tmp_path / 'run' / 'frozen'} cannot be written"
    assert found[0] == found[1] and found[0].startswith(wanted)
    assert list((tmp_path / "run").iterdir()) == []


def test_what_trains_cannot_change_in_a_run(runs):
    with pytest.raises(
        UserError,
        match=r"was started with training.trainable methods, the recipe now has all: set it back, or write",
    ):
        check(runs.recipe(ONE, trainable="all"), runs.begun(ONE))


def test_a_pattern_is_refused_before_a_process_is_started(runs, tmp_path):
    with pytest.raises(UserError, match=r"'decoder.7.\*', which matches no parameter"):
        check(runs.recipe(ONE, trainable=["decoder.7.*"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_readers_and_converters(runs, tmp_path):
    """Each takes the run as one whose every weight is in its checkpoints."""
    run = runs.begun(EXPERTS)
    weights = read_checkpoint(run / "checkpoints" / "step-3").weights
    same = {"check": 6}
    whole = convert(run, "consolidated", None, tmp_path / "whole", optimizer=True, **same)
    assert whole["largest_logit_difference"] == 0 and whole["same_translations"] == whole["sentences"] > 0
    again = read_weights(find_model(tmp_path / "whole")).tensors
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    for kind in ("dense", "huggingface", "ctranslate2"):
        record = convert(run, kind, EN_DE, tmp_path / kind, **same)
        assert record["same_translations"] == record["sentences"] > 0, kind
    assert yaml.safe_load((tmp_path / "dense" / "recipe.yaml").read_text())["training"]["trainable"] == "all"
    more = ["model.decoder.moe.experts=10"]
    grown = convert(run, "grown", None, tmp_path / "grown", overrides=more, **same)
    assert grown["parameters"] > whole["parameters"]
    said = [list(translate(load(path, "cpu"), EN_DE, ["bado"])) for path in (run, tmp_path / "whole")]
    assert said[0] == said[1]
    table = evaluate(run, ["en-de"], beam=1, limit=2, progress=False)
    assert table and list((run / "scores").glob("step-3.*.json"))


def test_a_hybrid_of_frozen_experts(runs, tmp_path):
    recipe = runs.recipe(ONE, trainable=["decoder.*_low_rank.*"])
    recipe.model.encoder.moe = MoE(**TOKEN_TOP2)
    runs.train(recipe, tmp_path / "run", ONE)
    record = convert(tmp_path / "run", "hybrid", EN_DE, tmp_path / "hybrid", check=6)
    assert record["largest_logit_difference"] < 1e-5
    assert any(".experts." in name for name in read_weights(find_model(tmp_path / "hybrid")).tensors)


def test_the_mean_of_checkpoints_keeps_the_base(runs, tmp_path):
    run = runs.begun(ONE, steps=6)
    first, last = (read_checkpoint(run / "checkpoints" / f"step-{step}") for step in (3, 6))
    mean = read_weights(find_model(run), average=2).tensors
    for name in last.weights:
        both = (first.weights[name].double() + last.weights[name].double()) / 2
        assert torch.equal(mean[name], last.weights[name] if name in last.frozen else both.float()), name


@pytest.mark.parametrize("consolidated", [False, True])
def test_another_layout_offline(pool, runs, tmp_path, consolidated):
    from lsmoe_ds.convert.layout import reshard

    stored = find_model(runs.begun(EXPERTS))
    if consolidated:
        convert(runs.begun(EXPERTS), "consolidated", None, tmp_path / "whole", check=0, optimizer=True)
        stored = find_model(tmp_path / "whole")
    shutil.copytree(runs.begun(EXPERTS), tmp_path / "run", ignore=lambda *_: ["checkpoints", "frozen"])
    pool.run(2, offline, reshard, stored, runs.recipe(TENSOR), tmp_path / "run", tensor=2)
    both = runs.begun(EXPERTS), tmp_path / "run"
    before, after = (read_checkpoint(run / "checkpoints" / "step-3") for run in both)
    assert before.frozen == after.frozen and before.weights.keys() == after.weights.keys()
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in before.weights)


def offline(topology, reshard, stored, recipe, run):
    reshard(stored, recipe, run, topology)


def test_matrices_beside_a_trained_model(pool, runs, tmp_path):
    """The usual way: grow a model, start from it, and train what is new."""
    from support.starts import first_steps

    convert(runs.begun(ONE), "consolidated", None, tmp_path / "base", check=0)
    recipe = runs.recipe(BOTH, trainable=["*_low_rank.*"], start_from=tmp_path / "base")
    recipe.data.vocabulary.file = tmp_path / "base" / "vocabulary.model"
    recipe.data.name = "matrices"
    prepare(recipe)
    pool.run(4, first_steps, recipe, tmp_path / "run", tensor=2, expert=2)
    base, after = (
        read_weights(find_model(tmp_path / "base")).tensors,
        read_checkpoint(tmp_path / "run" / "checkpoints" / "step-3"),
    )
    moved = {name for name in base if not torch.equal(base[name], after.weights[name])}
    assert moved and all("_low_rank." in name for name in moved)
    assert after.frozen == {name for name in base if "_low_rank." not in name}

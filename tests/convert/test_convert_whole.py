"""Whole models in other forms: consolidated, hybrid, averaged, in another layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from support.conversions import EN_DE, PAIR_TOP2, global_weights, random_loaded
from support.layouts import BOTH, EXPERTS, ONE, TENSOR, losses, recipe_in, train
from support.small_run import PAIR_TOP1, TARGET_TOP2, TOKEN_TOP2, make_run, write_corpus

from lsmoe_ds.checkpoint import tensors
from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.checkpoint.stored import Weights, find_model, read_weights
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors, open_tensors, save_tensors
from lsmoe_ds.cli import main
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.inference.load import build_model, load


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("whole"), TOKEN_TOP2, PAIR_TOP2, 4, tensor=2, expert=2)[0]


@pytest.fixture(scope="module")
def begun(pool, tmp_path_factory):
    """Train two runs and return their folder.

    ``run`` has three steps, with a checkpoint after each. ``undisturbed`` has six and is never interrupted.
    """
    folder = tmp_path_factory.mktemp("begun")
    write_corpus(folder)
    prepare(recipe_in(folder, ONE))
    every_step = {"checkpoint_every": 1, "keep": 3}
    recipe = recipe_in(folder, EXPERTS, 3)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=every_step)})
    train(pool, recipe, folder / "run", EXPERTS)
    train(pool, recipe_in(folder, EXPERTS, 6), folder / "undisturbed", EXPERTS)
    return folder


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shard", [2**29, 10_000], ids=["one file", "shards"])
def test_consolidated_is_the_whole_model(run, tmp_path, shard, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD", shard)
    out = tmp_path / "whole"
    record = convert(run, "consolidated", None, out, check=12)
    assert record["same_translations"] == record["sentences"] > 0 and record["largest_logit_difference"] == 0
    assert record["parameters"] == load(run, "cpu").parameters and not (run / "conversion.json").exists()
    files = {path.name: path.stat().st_size for path in out.glob("model*.safetensors")}
    assert len(files) == 1 if shard > 10_000 else len(files) > 5 and max(files.values()) < 16_000
    assert record["bytes"] >= 4 * record["parameters"]
    assert same(
        read_weights(find_model(out)).tensors, read_checkpoint(run / "checkpoints" / "step-2").weights
    )
    # and it is as good as the run where a model is wanted
    pair, with_experts = tmp_path / "pair", tmp_path / "hybrid"
    convert(out, "hybrid", EN_DE, pair, check=0)
    convert(run, "hybrid", EN_DE, with_experts, check=0)
    assert same(read_weights(find_model(pair)).tensors, read_weights(find_model(with_experts)).tensors)
    assert json.loads((pair / "provenance.json").read_text())["run"] == "small"


def test_only_one_shard_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD", 1000)
    alive: list[int] = []
    most = 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            alive.pop()

    def make() -> torch.Tensor:
        nonlocal most
        alive.append(1)
        most = max(most, len(alive))
        return torch.ones(100).as_subclass(Counted)

    names = save_tensors(Tensors({f"t{i}": LazyTensor((100,), make) for i in range(20)}), tmp_path)
    assert len(names) == 11 and most == 2
    assert same(open_tensors(tmp_path), {f"t{i}": torch.ones(100) for i in range(20)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda index: index["weight_map"].update(t0="../other.safetensors"),
            "only safetensors files beside it",
        ),
        (
            lambda index: index["weight_map"].update(t0="model-00001-of-00002.bin"),
            "only safetensors files beside it",
        ),
        (
            lambda index: index["weight_map"].update(t0="missing.safetensors"),
            "missing.safetensors is missing",
        ),
        (lambda index: index["weight_map"].update(t9="model-00001-of-00002.safetensors"), "lacks t9"),
        (lambda index: index.update(weight_map=[]), "no 'weight_map'"),
    ],
)
def test_a_hostile_index(tmp_path, monkeypatch, spoil, message):
    monkeypatch.setattr(tensors, "SHARD", 400)
    save_tensors({"t0": torch.ones(100), "t1": torch.ones(100)}, tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    spoil(index)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        (TOKEN_TOP2, PAIR_TOP2),
        (TOKEN_TOP2 | {"routing": "sentence"}, TARGET_TOP2),
        (TARGET_TOP2, TOKEN_TOP2),
        (TOKEN_TOP2, None),
    ],
    ids=["token encoder", "sentence encoder", "token decoder", "dense decoder"],
)
def test_a_hybrid_keeps_the_experts_that_it_must(run, encoder, decoder):
    sparse = random_loaded(run, encoder, decoder)
    weights, recipe = extract(global_weights(sparse.model), sparse.recipe, EN_DE, hybrid=True)
    by_task = {
        side for side, moe in (("encoder", encoder), ("decoder", decoder)) if moe and moe["routing"] == "task"
    }
    assert not any(name.startswith(side) and "experts" in name for side in by_task for name in weights)
    assert {settings.routing for _, _, settings in recipe.model.moe_layers()} == {
        moe["routing"] for moe in (encoder, decoder) if moe and moe["routing"] != "task"
    }
    model = build_model(recipe, sparse.vocabulary.size, Weights(weights, 0, {}), torch.device("cpu"))
    hybrid = replace(sparse, model=model, recipe=recipe, languages=recipe.languages, kind="hybrid")
    found = compare(sparse, hybrid, EN_DE, ["ba de fi", "ko la mi nobu", "tabi refu gosi kale mo ba"])
    assert found.same == found.sentences and found.largest_logit_difference <= 1e-4


def test_a_hybrid_is_made_only_where_it_is_needed(run, tmp_path):
    with pytest.raises(UserError, match=r"the encoder routes by token .* --as hybrid"):
        convert(run, "dense", EN_DE, tmp_path / "dense")
    convert(run, "hybrid", EN_DE, tmp_path / "hybrid", check=4)
    assert load(tmp_path / "hybrid", "cpu").kind == "hybrid"
    with pytest.raises(UserError, match="the encoder routes by token"):
        convert(tmp_path / "hybrid", "ctranslate2", EN_DE, tmp_path / "plain")
    plain = random_loaded(run, TARGET_TOP2, PAIR_TOP1)
    with pytest.raises(UserError, match="of this one --as dense makes an exact dense model"):
        extract(global_weights(plain.model), plain.recipe, EN_DE, hybrid=True)


def test_the_mean_of_the_last_checkpoints(begun, tmp_path):
    run = begun / "run"
    record = convert(run, "consolidated", None, tmp_path / "mean", check=3, average=2)
    assert record["same_translations"] == record["sentences"] == 3
    found = read_weights(find_model(tmp_path / "mean")).tensors
    parts = [read_checkpoint(run / "checkpoints" / f"step-{step}").weights for step in (2, 3)]
    for name, value in found.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-6, atol=1e-8)
        assert "norm" in name or "bias" in name or not torch.equal(value, parts[1][name])
    assert json.loads((tmp_path / "mean" / "provenance.json").read_text())["average"] == 2
    convert(run / "checkpoints" / "step-2", "consolidated", None, tmp_path / "mean", check=0, average=2)
    assert not same(read_weights(find_model(tmp_path / "mean")).tensors, found)
    with pytest.raises(UserError, match="--average 4 asks for more than the 3 checkpoints"):
        convert(run, "consolidated", None, tmp_path / "mean", average=4)
    with pytest.raises(UserError, match="--average is for the checkpoints of a run"):
        convert(tmp_path / "mean", "consolidated", None, tmp_path / "again", average=2)


def reshard_into(topology, path, recipe, run):
    from lsmoe_ds.convert.layout import reshard

    if topology.is_main:
        open_run(recipe, run, recipe.prepared / "vocabulary.model")
    reshard(find_model(path), recipe, run, topology)


@pytest.mark.parametrize("after", [ONE, TENSOR, BOTH])
@pytest.mark.parametrize("consolidated", [False, True], ids=["run", "consolidated"])
def test_a_run_goes_on_in_another_layout_that_was_made_offline(pool, begun, tmp_path, after, consolidated):
    source = begun / "run"
    if consolidated:
        source = tmp_path / "whole"
        convert(begun / "run", "consolidated", None, source, check=0, optimizer=True)
    tensor, expert, world, _ = after
    recipe = recipe_in(begun, after, 6)
    pool.run(world, reshard_into, source, recipe, tmp_path / "run", tensor=tensor, expert=expert)
    shutil.copy(begun / "run" / "metrics.jsonl", tmp_path / "run")
    train(pool, recipe, tmp_path / "run", after)
    assert losses(tmp_path / "run") == pytest.approx(losses(begun / "undisturbed"), rel=1e-5)


def test_layouts_on_the_command_line(begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, out = str(begun / "run"), str(tmp_path / "tensor")

    def lsmoe(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["lsmoe", "convert", run, "--as", "layout", *arguments])
        try:
            main()
        except SystemExit as status:
            return int(status.code or 0)
        return 0

    assert lsmoe("--set", "parallel.expert=1", "--set", "parallel.tensor=2", "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "kind": "layout",
        "processes": 2,
        "tensor": 2,
        "expert": 1,
        "run": out,
    }
    state = json.loads((tmp_path / "tensor" / "checkpoints" / "step-3" / "state.json").read_text())
    assert (state["step"], state["world"], state["tensor"], state["expert"]) == (3, 2, 2, 1)
    assert same(
        read_checkpoint(tmp_path / "tensor" / "checkpoints" / "step-3").weights,
        read_checkpoint(begun / "run" / "checkpoints" / "step-3").weights,
    )
    assert (tmp_path / "tensor" / "metrics.jsonl").read_text() == (
        begun / "run" / "metrics.jsonl"
    ).read_text()
    for arguments, message in [
        (
            ["--set", "training.learning_rate=1"],
            "was trained with training.learning_rate 0.01, and --set makes it 1.0: another layout is of the "
            "same training, so leave that --set out; it takes parallel, ",
        ),
        (["--set", "parallel.tensor=2", "--nproc", "3"], "does not divide the 3 processes"),
        (["--average", "2"], "keeps the whole run as it is"),
    ]:
        assert lsmoe(*arguments, "--out", str(tmp_path / "no")) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_consolidated_folder_without_optimizer_has_no_layout(run, tmp_path):
    from lsmoe_ds.convert.layout import convert_layout

    convert(run, "consolidated", None, tmp_path / "whole", check=0)
    with pytest.raises(UserError, match="holds no optimizer state"):
        convert_layout(tmp_path / "whole", [], tmp_path / "run", None)


def test_options_of_other_kinds(run, tmp_path):
    with pytest.raises(UserError, match="--optimizer is for --as consolidated, not for hybrid"):
        convert(run, "hybrid", EN_DE, tmp_path / "out", optimizer=True)
    with pytest.raises(UserError, match="keeps the whole model"):
        convert(run, "consolidated", EN_DE, tmp_path / "out")

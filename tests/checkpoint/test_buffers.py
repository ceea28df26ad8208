"""State of a method that is no parameter: masks and other buffers go where weights go, in their own type."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from support.layouts import BOTH, EXPERTS, ONE, TENSOR, losses
from support.loops import loop
from support.short_runs import ShortRuns
from torch import Tensor, nn

from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.checkpoint.stored import find_model, read_weights, write_folder
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors, open_tensors, save_tensors
from lsmoe_ds.config import model as model_section
from lsmoe_ds.config.method import MethodSection
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import LinearShape, Shape
from lsmoe_ds.convert.command import convert
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files, read_json, write_json
from lsmoe_ds.inference.load import load
from lsmoe_ds.methods.base import Method
from lsmoe_ds.methods.sites import LinearSite
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology

EN_DE = Direction("en", "de")
SEEN: list[Any] = []  # what the method met, in this process


class Masked(nn.Module):
    """``y = scale mask (W x + b)``, beside a column-parallel layer: all three change from step to step."""

    scale: Tensor
    mask: Tensor
    count: Tensor
    table: Tensor

    def __init__(self, outputs: int, topology: Topology) -> None:
        super().__init__()
        own = outputs // topology.tensor
        self.register_buffer("scale", torch.ones(own))
        self.register_buffer("mask", torch.ones(own, dtype=torch.bool))
        self.register_buffer("count", torch.tensor(2**40, dtype=torch.int64))
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        if topology.tensor > 1:
            compat.mark_tensor_parallel(self.scale, 0)
            compat.mark_tensor_parallel(self.mask, 0)

    def forward(self, base: nn.Module, x: Tensor, context: Any) -> Tensor:
        out: Tensor = base(x) * (self.scale * self.mask).to(x.dtype) + 0 * self.table[1].to(x.dtype)
        return out


class Structure(Method):
    name = "structure"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made: list[Masked] = []

    def make(self, site: LinearSite) -> Masked:
        self.made.append(Masked(site.outputs, self.topology))
        return self.made[-1]

    def before_step(self, model: nn.Module, number: int, steps: int) -> None:
        for place, each in enumerate(self.made):
            each.count += 1
            whole = torch.arange(len(each.scale) * self.topology.tensor)
            first = self.topology.tensor_rank * len(each.scale)
            own = slice(first, first + len(each.scale))
            each.mask.copy_(((whole + number + place) % 3 != 0)[own])
            each.scale.mul_((1 + whole / 1000)[own])

    def merge(self, weights: Tensors, direction: Direction | None, route: Any) -> Tensors:
        kept = {name: entry for name, entry in weights.entries.items() if not self.owns(name)}

        def factor(at: str, part: str) -> LazyTensor:
            def make() -> Tensor:
                each = weights[f"{at}_structure.scale"] * weights[f"{at}_structure.mask"]
                value = weights[f"{at}.{part}"]
                return value * (each[:, None] if part == "weight" else each)

            return weights.entries[f"{at}.{part}"]._replace(make=make)

        for name in weights:
            if name.endswith("_structure.mask"):
                at = name.removesuffix("_structure.mask")
                kept |= {f"{at}.{part}": factor(at, part) for part in ("weight", "bias")}
        return Tensors(kept)


class StructureSection(MethodSection):
    name = "structure"

    def is_at(self, site: Shape) -> bool:
        return isinstance(site, LinearShape) and site.name == "expand"

    def build(self, recipe: Recipe, topology: Topology) -> Structure:
        return Structure(self, recipe, topology)


@contextmanager
def structured() -> Iterator[None]:
    """Give the method to every model with experts; a dense one, which a conversion makes, has it no more."""
    given = model_section.Model.methods.fget

    def methods(model: Any) -> list[MethodSection]:
        return [*given(model), *([StructureSection()] if any(model.moe_layers()) else [])]

    with mock.patch.object(model_section._Model, "methods", property(methods)):
        yield


@pytest.fixture(autouse=True)
def with_structure():
    with structured():
        yield


def run_loop(topology, *arguments):
    with structured():
        return loop(topology, *arguments)


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory):
    return ShortRuns(pool, tmp_path_factory.mktemp("buffers"), run_loop)


def stored(run: Path, step: int = 6) -> Tensors:
    return read_checkpoint(run / "checkpoints" / f"step-{step}").weights


def buffers(weights: Tensors) -> dict[str, Tensor]:
    return {name: weights[name] for name, entry in weights.entries.items() if entry.is_buffer}


def wanted(steps: int) -> dict[str, Tensor]:
    """Return the buffers of the four dense layers after ``steps`` steps, computed on unsplit tensors."""
    found = {}
    for place, at in enumerate(("encoder.0", "encoder.1", "decoder.0", "decoder.2")):
        whole, scale = torch.arange(24), torch.ones(24)
        for _ in range(steps):
            scale.mul_(1 + whole / 1000)
        name = f"{at}.feed_forward.expand_structure"
        found |= {f"{name}.scale": scale, f"{name}.mask": (whole + steps + place) % 3 != 0}
        found[f"{name}.count"] = torch.tensor(2**40 + steps)
    return found


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys() and len(found) == 12
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("layout", [ONE, TENSOR, EXPERTS, BOTH], ids=str)
def test_every_layout_stores_the_same_state(runs, layout):
    """Spread over tensor-parallel ranks or not; in their own types; none that is not persistent."""
    assert_same(buffers(stored(runs.begun(layout))), wanted(6))
    assert not any("table" in name for name in stored(runs.begun(layout)))
    state = json.loads((runs.begun(layout) / "checkpoints" / "step-6" / "state.json").read_text())
    spread = {name for name in state["partition"] if "_structure." in name}
    assert len(spread) == (8 if layout[0] > 1 else 0) and not any("count" in name for name in spread)


@pytest.mark.parametrize("trainable", ["all", ["decoder.*"]], ids=["all", "frozen"])
@pytest.mark.parametrize("layout", [ONE, BOTH], ids=str)
def test_an_interrupted_run_ends_bit_equal(runs, tmp_path, layout, trainable):
    recipe = runs.recipe(layout, trainable=trainable)
    runs.train(recipe, tmp_path / "cut", layout, 5, KeyboardInterrupt())
    runs.train(recipe, tmp_path / "cut", layout)
    cut, whole = stored(tmp_path / "cut"), stored(runs.begun(layout, trainable=trainable))
    assert_same(buffers(cut), buffers(whole))
    assert cut.keys() == whole.keys() and all(torch.equal(cut[name], whole[name]) for name in whole)


CHANGES = [(ONE, BOTH), (BOTH, EXPERTS), (EXPERTS, TENSOR), (TENSOR, ONE)]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_a_training_goes_on_in_another_layout(runs, tmp_path, before, after):
    shutil.copytree(runs.begun(before, steps=3), tmp_path / "run")
    runs.train(runs.recipe(after), tmp_path / "run", after)
    assert_same(buffers(stored(tmp_path / "run")), wanted(6))
    assert losses(tmp_path / "run") == pytest.approx(losses(runs.begun(ONE)), rel=1e-5)


def test_bfloat16_changes_no_buffer(runs):
    assert_same(buffers(stored(runs.begun(BOTH, bf16=True))), wanted(6))


def moved_loop(topology, *arguments):
    """Train with buffers that are new tensors once DeepSpeed has the model, as on a GPU, to which it moves
    them.
    """

    def to(model, *_):
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.clone())
        return model

    with mock.patch.object(Transformer, "to", to):
        return run_loop(topology, *arguments)


def test_marks_outlive_a_move_to_another_device(pool, runs, tmp_path):
    recipe = runs.recipe(TENSOR, steps=3)
    assert pool.run(2, moved_loop, recipe, tmp_path / "run", tensor=2) == [None] * 2
    assert_same(buffers(stored(tmp_path / "run", 3)), wanted(3))


def test_exports(runs, tmp_path):
    run = runs.begun(BOTH)
    record = convert(run, "consolidated", None, tmp_path / "whole", check=6, optimizer=True)
    assert record["largest_logit_difference"] == 0 and record["same_translations"] == record["sentences"] > 0
    again = Tensors.of(read_weights(find_model(tmp_path / "whole")).tensors)
    assert_same(buffers(again), wanted(6))
    loaded = load(tmp_path / "whole", "cpu")
    assert record["parameters"] == loaded.parameters == again.numbers, "buffers are no parameters"
    masked = loaded.model.encoder[0].feed_forward.expand_structure
    assert (masked.mask.dtype, masked.count.dtype) == (torch.bool, torch.int64)
    assert masked.table.tolist() == [0, 1, 2]
    dense = convert(run, "dense", EN_DE, tmp_path / "dense", check=6)
    assert dense["largest_logit_difference"] < 1e-4 and dense["same_translations"] == dense["sentences"]
    assert not any("_structure" in name for name in read_weights(find_model(tmp_path / "dense")).tensors)
    more = ["model.decoder.moe.experts=10"]
    grown = convert(run, "grown", None, tmp_path / "grown", overrides=more, check=6)
    assert grown["same_translations"] == grown["sentences"]
    assert_same(buffers(Tensors.of(read_weights(find_model(tmp_path / "grown")).tensors)), wanted(6))


def test_a_mean_is_refused_where_buffers_differ(runs):
    with pytest.raises(
        UserError,
        match=r"^--average: \S+_structure.\w+ differs between checkpoints step-3 and step-6, and is no",
    ):
        read_weights(find_model(runs.begun(ONE)), average=2)


def test_a_mean_keeps_equal_buffers(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs.begun(ONE), run)
    first = run / "checkpoints" / "step-3" / "mp_rank_00_model_states.pt"
    values = torch.load(first, weights_only=False)
    last = torch.load(run / "checkpoints" / "step-6" / first.name, weights_only=False)["module"]
    values["module"] |= {name: value for name, value in last.items() if "_structure." in name}
    torch.save(values, first)
    manifest = read_json(first.parent / "manifest.json")
    manifest["files"] |= describe_files(first.parent, [first.name])
    write_json(first.parent / "manifest.json", manifest)
    assert_same(buffers(Tensors.of(read_weights(find_model(run), average=2).tensors)), wanted(6))


def test_a_grown_model_needs_to_know_what_a_buffer_begins_as(runs, tmp_path):
    found = find_model(runs.begun(ONE))
    entries = Tensors.of(read_weights(found).tensors).entries
    kept = Tensors({name: entry for name, entry in entries.items() if "_structure" not in name})
    made = {"kind": "consolidated", "run": "small", "step": 6}
    write_folder(tmp_path / "plain", kept, found.recipe, found.vocabulary, made)
    with pytest.raises(UserError, match=r"_structure\.scale cannot be added: nothing says what it begins as"):
        convert(tmp_path / "plain", "grown", None, tmp_path / "grown", check=0)


def test_types_survive_a_file(tmp_path):
    kinds = [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float64,
        torch.float32,
    ]
    values = {str(kind): torch.tensor([0, 1, 1]).to(kind) for kind in kinds}
    values |= {str(kind): torch.tensor([0.5, 1.0, 2.0]).to(kind) for kind in (torch.bfloat16, torch.float16)}
    save_tensors(values, tmp_path)
    for name, value in open_tensors(tmp_path).items():
        half = name in ("torch.bfloat16", "torch.float16")
        assert value.dtype == (torch.float32 if half else values[name].dtype)
        assert torch.equal(value, values[name].to(value.dtype))


@pytest.mark.parametrize("header", ["[[", "[" * 100_000, '{"a": 1}', "[1]", "null"], ids=range(5))
def test_a_hostile_list_of_buffers(tmp_path, header):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {"buffers": header})
    with pytest.raises(UserError, match=r"is damaged: its 'buffers' should be a list of names"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("shard", [None, 200], ids=["one file", "shards"])
def test_truth_values_take_a_bit_each_in_a_folder(tmp_path, shard):
    masks = {f"mask{i}": torch.arange(13 * 107).view(13, 107) % (i + 2) == 0 for i in range(3)}
    entries = {
        name: LazyTensor((107, 13), mask.t, torch.bool, name != "mask0") for name, mask in masks.items()
    }
    entries["weight"] = LazyTensor((3,), lambda: torch.ones(3))
    files = save_tensors(Tensors(entries), tmp_path, shard=shard)
    assert len(files) == (1 if shard is None else 3 + 1), "174 bytes each, the last with the weight"
    stored = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    values = {name: value for path in stored for name, value in safetensors.torch.load_file(path).items()}
    assert all(values[name].shape == (174,) and values[name].dtype == torch.uint8 for name in masks)
    found = open_tensors(tmp_path)
    assert [found.entries[f"mask{i}"].is_buffer for i in range(3)] == [False, True, True]
    for name, mask in masks.items():
        assert found[name].dtype == found.entries[name].dtype == torch.bool
        assert torch.equal(found[name], mask.t()) and found.shape(name) == (107, 13)
    assert torch.equal(found["weight"], torch.ones(3))


def test_truth_values_of_earlier_folders_are_read(tmp_path):
    mask = torch.arange(100) % 3 == 0
    safetensors.torch.save_file({"mask": mask}, tmp_path / "model.safetensors", {"buffers": '["mask"]'})
    found = open_tensors(tmp_path)
    assert torch.equal(found["mask"], mask) and found.entries["mask"].is_buffer


DAMAGED = {
    "no JSON": "{",
    "a list": "[]",
    "no shape": '{"mask": 80}',
    "a negative size": '{"mask": [-80]}',
    "more values": '{"mask": [8, 99]}',
    "bits of numbers": '{"weight": [16]}',
}


@pytest.mark.parametrize("header", DAMAGED.values(), ids=DAMAGED)
def test_damaged_shapes_of_truth_values(tmp_path, header):
    tensors = {"mask": torch.ones(10, dtype=torch.uint8), "weight": torch.ones(2)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"packed": header})
    with pytest.raises(UserError, match="is damaged: "):
        dict(open_tensors(tmp_path))


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """safetensors writes metadata in any order."""
    mask = LazyTensor((3, 5), lambda: torch.ones(3, 5, dtype=torch.bool), torch.bool, True)
    entries = {"ä.weight": LazyTensor((2, 2), lambda: torch.ones(2, 2)), "ä.mask": mask}
    written = set()
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_tensors(Tensors(entries), folder)
        (path,) = folder.glob("*.safetensors")
        written.add(path.read_bytes())
        assert path.stat().st_mode & 0o777 == folder.stat().st_mode & 0o666
    assert len(written) == 1
    assert open_tensors(folder)["ä.mask"].dtype == torch.bool

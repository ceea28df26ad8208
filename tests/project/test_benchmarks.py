"""Every benchmark can be started: what it imports is there, and its options are told."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
import torch
from support.sameness import VOCABULARY, recipe_for, steps_of
from torch._dynamo.utils import counters
from typer.testing import CliRunner

from lsmoe_ds.cli import app
from lsmoe_ds.model.build import build
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.shipped import ROOT

FOLDER = ROOT / "benchmarks"
HELPERS = ("common", "peers")  # which are no benchmark


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_it_starts(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module(name)
    if name in HELPERS:
        return
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert not left.value.code and "--out FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "nowhere"], "lsmoe: there is no folder nowhere: give a run folder"),
        (["--direction", "xx"], "lsmoe: "),
    ],
)
def test_a_users_error_is_one_sentence(options, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    common, serve = map(importlib.import_module, ("common", "serve"))
    monkeypatch.setattr(sys, "argv", ["serve.py", *options])
    with pytest.raises(SystemExit) as left:
        common.run_main(serve.main)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith(message) and said.count("\n") == 1


def test_the_page_and_the_help_list_each_and_no_other():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    names = {path.stem for path in FOLDER.glob("*.py")} - {*HELPERS}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == names
    told = re.sub(r"\W+", " ", CliRunner().invoke(app, ["bench"]).output)
    (listed,) = re.findall(r"The benchmark (.*?) ?\bor (\w+)", told)
    assert {*listed[0].split(), listed[1]} == names


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["feed-forwards", "layers"])
def test_compiled_units_compute_the_same_without_a_graph_for_each_shape(unit, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("common")
    recipe = recipe_for("dense", 1, 1, 0)
    batches = [batch for step in steps_of(recipe, 0, 1) for batch in step.batches]
    found = {}
    counters.clear()
    for chosen in ("nothing", unit):
        model = build(recipe, VOCABULARY)
        initialize(model, 1, Topology.single())
        # Traces and guards as inductor does, but does not call a C++ compiler.
        common.compile_model(model, chosen, backend="aot_eager")
        losses = [model(*batch.inputs).loss for batch in batches]
        sum(losses).backward()
        found[chosen] = losses, {name: each.grad for name, each in model.named_parameters()}
    torch.testing.assert_close(found[unit], found["nothing"])
    assert counters["stats"]["unique_graphs"] < len({batch.source.shape for batch in batches}) * 2
    assert not counters["graph_break"]

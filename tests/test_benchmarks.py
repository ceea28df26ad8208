"""Every benchmark can be started: what it imports is there, and its options are told."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
from typer.testing import CliRunner

from lsmoe_ds.cli import app
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


def test_the_page_and_the_help_list_each_and_no_other():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    names = {path.stem for path in FOLDER.glob("*.py")} - {*HELPERS}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == names
    told = re.sub(r"\W+", " ", CliRunner().invoke(app, ["bench"]).output)
    (listed,) = re.findall(r"The benchmark (.*?) ?\bor (\w+)", told)
    assert {*listed[0].split(), listed[1]} == names

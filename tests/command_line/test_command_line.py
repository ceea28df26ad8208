"""The commands as a person types them, from a corpus to a report, with the real deepspeed launcher."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from support.small_run import TARGET_TOP2, make_recipe, write_corpus

from lsmoe_ds import __version__
from lsmoe_ds.cli import main


def process(folder: Path, *arguments: str, text: str | None = None) -> str:
    """Run a command in a process of its own and return its standard output."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, "-m", "lsmoe_ds", *arguments]
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def lsmoe(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command in this process.

    This saves the imports that a process of its own would repeat for each command.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, text: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["lsmoe", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        assert left.value.code == 0, said.err
        return said.out

    return run


@pytest.mark.slow
def test_the_whole_way(tmp_path, lsmoe):
    write_corpus(tmp_path)
    value = yaml.safe_load(make_recipe(Path("."), TARGET_TOP2, TARGET_TOP2, expert=2).to_yaml())
    value["training"] |= {"steps": 20, "checkpoint_every": 20, "validate_every": 10, "log_every": 5}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(value))

    process(tmp_path, "data", "prepare", "small.yaml")
    shown = json.loads(lsmoe("data", "show", "small.yaml", "--json"))
    assert {row["direction"] for row in shown["rows"]} == {"en-de", "de-en", "en-fr", "fr-en"}
    assert "German" in lsmoe("data", "show", "small.yaml")

    process(tmp_path, "train", "small.yaml", "--nproc", "2", "--set", "training.steps=30")
    records = [json.loads(line) for line in (tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [5, 10, 15, 20, 25, 30]
    assert [r["step"] for r in records if "dev_loss" in r] == [10, 20, 30]
    assert sorted(p.name for p in (tmp_path / "runs/small/checkpoints").iterdir()) == ["step-20", "step-30"]
    assert list((tmp_path / "runs/small/tensorboard").iterdir())

    scores = json.loads(lsmoe("evaluate", "runs/small", "--json", "--limit", "5"))
    assert set(scores["directions"]) == {"en-de", "de-en", "en-fr", "fr-en"} and scores["step"] == 30

    chosen = ["--from", "en", "--to", "de"]
    summary = json.loads(lsmoe("convert", "runs/small", "--as", "dense", *chosen, "--out", "en-de", "--json"))
    assert summary["largest_logit_difference"] <= 1e-4
    assert summary["same_translations"] == summary["sentences"] > 0
    assert summary["dense_parameters"] < summary["sparse_parameters"]

    translated = [
        run("translate", model, "--from", "en", "--to", "de", text="bada kudi fo\n\nlu ki\n").split("\n")
        for run, model in ((lsmoe, "runs/small"), (partial(process, tmp_path), "en-de"))
    ]
    assert translated[0] == translated[1]
    assert len(translated[0]) == 4 and translated[0][1] == "" and translated[0][0] != ""
    listed = lsmoe("translate", "runs/small", *chosen, "--n-best", "3", text="bada kudi fo\n\nlu ki\n")
    rows = [line.split(" ||| ") for line in listed.removesuffix("\n").split("\n")]
    assert [number for number, *_ in rows] == ["0", "0", "0", "1", "2", "2", "2"]
    assert [rows[at][1] for at in (0, 3, 4)] == translated[0][:3]
    scores = [float(score) for _, _, score in rows]
    assert scores[3] == 0 and scores[:3] == sorted(scores[:3], reverse=True) and scores[0] < 0
    (_, text, score) = lsmoe("translate", "en-de", *chosen, "--n-best", "1", text="lu ki\n").split(" ||| ")
    assert text == rows[4][1] and float(score) == pytest.approx(scores[4], abs=2e-4)

    report = Path(tmp_path, lsmoe("report", "runs/small").strip())
    assert report.read_text(encoding="utf-8").lower().startswith("<!doctype html")


def test_version_and_help(tmp_path):
    assert process(tmp_path, "version").strip() == __version__
    assert "evaluate" in process(tmp_path, "--help")


def test_the_shell_completes_commands():
    environment = os.environ | {
        "COMP_WORDS": "lsmoe tra",
        "COMP_CWORD": "1",
        "_LSMOE_COMPLETE": "complete_bash",
    }
    done = subprocess.run(
        [sys.executable, "-m", "lsmoe_ds"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["train", "translate"]

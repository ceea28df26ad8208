"""What a run notes of the models that were made of it: each beside the others, and why a comparison is
missing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.small_run import PAIR_TOP1, TARGET_TOP2, make_run

from lsmoe_ds.convert.command import convert
from lsmoe_ds.directions import Direction

EN_DE, EN_FR = Direction("en", "de"), Direction("en", "fr")


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory) -> Path:
    return make_run(pool, tmp_path_factory.mktemp("record"), TARGET_TOP2, PAIR_TOP1)[0]


def test_conversions_of_different_kinds_stand_side_by_side(run, tmp_path):
    made = {
        "dense-en-de": convert(run, "dense", EN_DE, tmp_path / "1", check=2),
        "dense-en-fr": convert(run, "dense", EN_FR, tmp_path / "2", check=2),
        "ctranslate2-en-de": convert(run, "ctranslate2", EN_DE, tmp_path / "3", check=2),
        "ctranslate2-int8-en-de": convert(
            run, "ctranslate2", EN_DE, tmp_path / "4", check=2, quantization="int8"
        ),
    }
    kept = {path.stem: json.loads(path.read_text()) for path in (run / "conversions").iterdir()}
    assert kept == made
    assert json.loads((run / "conversion.json").read_text()) == made["ctranslate2-int8-en-de"]
    assert [record.get("quantization") for record in made.values()] == [None, None, "float32", "int8"]
    assert all(
        record["step"] == 2 and record["date"].startswith("20") and record["sentences"] == 2
        for record in made.values()
    )
    again = convert(run, "dense", EN_DE, tmp_path / "5", check=0)
    assert json.loads((run / "conversions" / "dense-en-de.json").read_text()) == again


def test_translations_that_all_differ_are_said(run, tmp_path, monkeypatch, capsys):
    told = {"largest_logit_difference": 3.0, "same_translations": 0, "sentences": 2}
    monkeypatch.setattr("lsmoe_ds.convert.command.check_agreement", lambda *arguments: told)
    convert(run, "dense", EN_DE, tmp_path / "out")
    said = (
        f"lsmoe: 0 of 2 sentences have the same translations as in {run}: evaluate {tmp_path / 'out'} before"
    )
    assert said in capsys.readouterr().err
    told["same_translations"] = 1
    convert(run, "dense", EN_DE, tmp_path / "other")
    assert "before you use it" not in capsys.readouterr().err


def test_why_nothing_is_compared_is_said(run, tmp_path):
    assert not {"not_checked", "sentences"} & convert(run, "dense", EN_DE, tmp_path / "none", check=0).keys()
    prepared = run.parent / "data" / "prepared"
    prepared.rename(prepared.with_name("elsewhere"))
    try:
        record = convert(run, "dense", EN_DE, tmp_path / "gone")
    finally:
        prepared.with_name("elsewhere").rename(prepared)
    assert record["not_checked"].startswith("no held-out text to compare on: there is no prepared data in ")


def test_a_run_that_cannot_be_written_keeps_no_record_but_the_model_is_made(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "conversions", ignore_errors=True)
    (tmp_path / "run" / "conversions").write_text("in the way")
    record = convert(tmp_path / "run", "dense", EN_DE, tmp_path / "out", check=0)
    assert record["kind"] == "dense" and (tmp_path / "out" / "model.safetensors").exists()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said.startswith("lsmoe: the model is written, its record for the run's report is not: ")
        and "conversions cannot be written" in said
    )

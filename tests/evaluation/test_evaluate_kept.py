"""What an evaluation keeps: each question beside the others, and every translation."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from sacrebleu.metrics import BLEU
from support.commands import tree
from support.small_run import PAIR_TOP1, TARGET_TOP2, make_run

from lsmoe_ds.analysis.command import analyze_routing
from lsmoe_ds.convert.command import convert
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate, open_data
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.parts import merge
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.export.subnetwork import convert_to_dense
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.report.report import render_report, write_report


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("kept"), TARGET_TOP2, PAIR_TOP1)[0]


def copy_run(run, folder):
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns("scores*", "routing.json", ".*"))


def test_questions_lie_side_by_side_and_only_a_complete_one_is_scores_json(run, tmp_path):
    copy = copy_run(run, tmp_path / "run")
    evaluate(copy, beam=2, limit=3, progress=False)
    assert not (copy / "scores.json").exists()
    assert (
        "Step 2, test set, 12 sentences, beam 2. This is no complete evaluation: only the first 3"
        in render_report(copy)
    )
    whole = evaluate(copy, beam=2, progress=False)
    assert ScoreTable.read(copy / "scores.json") == whole and whole.sentences == 80
    kept = {name: (copy / name).read_bytes() for name in ("scores.json", "routing.json")}
    for options in (
        {"limit": 3},
        {"limit": 3, "split": "dev"},
        {"limit": 3, "directions": ["en-de"]},
        {"split": "dev"},
        {"directions": ["en-de", "de-en", "en-fr"]},
        {"tokenize": "char"},
        {"beam": 1},  # as complete, but not a later one
    ):
        evaluate(copy, **{"beam": 2, **options}, progress=False)
        if options == {"beam": 1}:  # the latest of two that are alike in all but an unusual search
            kept["scores.json"] = (copy / "scores.json").read_bytes()
        assert {name: (copy / name).read_bytes() for name in kept} == kept, options
    names = {path.name for path in (copy / "scores").glob("*.json")}
    assert names == {
        "step-2.test.beam-2.json",
        "step-2.test.beam-2.limit-3.json",
        "step-2.dev.beam-2.limit-3.json",
        "step-2.test.beam-2.limit-3.en-de.json",
        "step-2.dev.beam-2.json",
        "step-2.test.beam-2.de-en+en-de+en-fr.json",
        "step-2.test.beam-2.tok-char.json",
        "step-2.test.beam-1.json",
    }
    assert "Step 2, test set, 80 sentences, beam 1." in render_report(
        copy
    ) and "no complete" not in render_report(copy)
    usual = evaluate(copy, progress=False)  # beam 5
    evaluate(copy, beam=2, progress=False)
    assert ScoreTable.read(copy / "scores.json") == usual
    later = json.loads((copy / "scores.json").read_text()) | {"step": 10}
    (copy / "scores.json").write_text(json.dumps(later))
    (copy / "routing.json").write_text(
        json.dumps(json.loads((copy / "routing.json").read_text()) | {"step": 10})
    )
    evaluate(copy, progress=False)
    assert (
        ScoreTable.read(copy / "scores.json").step
        == 10
        == json.loads((copy / "routing.json").read_text())["step"]
    )
    assert json.loads((copy / "scores/step-2.dev.beam-2/routing.json").read_text())["split"] == "dev"


def test_every_translation_is_kept_beside_its_source_and_reference(run, tmp_path):
    copy = copy_run(run, tmp_path / "run")
    table = evaluate(copy, ["en-de", "fr-en"], beam=2, progress=False)
    loaded, data = load(copy, "cpu"), open_data(load(copy, "cpu"))
    for score in table.directions:
        stem = copy / "scores" / table.question / str(score.direction)
        source, hypothesis, reference = (
            stem.with_suffix(f".{side}").read_bytes() for side in ("source", "hypothesis", "reference")
        )
        assert (source.decode().split("\n")[:-1], reference.decode().split("\n")[:-1]) == data.text(
            score.direction, "test"
        )
        lines = hypothesis.decode().split("\n")[:-1]
        assert lines == list(translate(loaded, score.direction, source.decode().split("\n")[:-1], beam=2))
        assert (
            BLEU().corpus_score(lines, [reference.decode().split("\n")[:-1]]).score == score.metrics["bleu"]
        )


def test_scores_of_a_run_that_cannot_be_written(run, tmp_path, monkeypatch, capsys):
    copy = copy_run(run, tmp_path / "run")
    (copy / "scores").write_text("a file in the place of the folder")
    before = tree(copy)
    with monkeypatch.context() as patched:
        patched.setattr(
            "lsmoe_ds.evaluation.evaluate.load_engine", None
        )  # refused before any model is loaded
        with pytest.raises(
            UserError,
            match=(
                r"run/scores cannot be written \(Not a directory\): give a folder for the scores with"
                r" --out DIR"
            ),
        ):
            evaluate(copy, beam=1, limit=2, progress=False)
    evaluate(copy, beam=1, progress=False, out=tmp_path / "out" / "here", part=Part(1, 1))
    merge(copy, 1, beam=1, out=tmp_path / "out" / "here")
    found = {path.name for path in (tmp_path / "out" / "here").iterdir() if not path.name.startswith(".")}
    assert tree(copy) == before and found == {"scores", "scores.json", "routing.json"}
    other = copy_run(run, tmp_path / "other")
    for out, owner in (
        (tmp_path / "out" / "here", copy),
        (run, run),
    ):  # another model's scores are not replaced
        with pytest.raises(
            UserError, match=f"holds the scores of {owner}: give those of {other} another folder"
        ):
            evaluate(other, beam=1, limit=2, progress=False, out=out)
    evaluate(copy, beam=1, limit=2, progress=False, out=tmp_path / "out" / "here")
    (tmp_path / "file").touch()
    for write in (
        lambda out: write_report(copy, out / "page.html"),
        lambda out: analyze_routing(copy, out / "maps"),
    ):
        with pytest.raises(
            UserError, match=r"file cannot be written \(.*\): choose another (file|folder) with --out"
        ):
            write(tmp_path / "file")
    # A conversion whose record cannot be kept has worked all the same.
    (copy / "conversion.json").mkdir()
    record = convert(copy, "dense", Direction("en", "de"), tmp_path / "dense", check=0)
    assert (
        record["dense_folder"] == str(tmp_path / "dense")
        and (tmp_path / "dense" / "model.safetensors").is_file()
    )
    assert "lsmoe: the model is written, its record for the run's report is not: " in capsys.readouterr().err


def test_a_test_set_of_ones_own(run, tmp_path, capsys):
    copy = copy_run(run, tmp_path / "run")
    text = {"en": ["kita", "", "mo ne  su"], "deu_Latn": ["kitaen", "moen", ""], "fr": ["atike", "x", "y"]}
    for code, lines in text.items():
        (tmp_path / f"my.set.{code}").write_text("".join(f"{line}\n" for line in lines))
    table = evaluate(copy, ["en-de", "de-en"], beam=1, progress=False, test=[str(tmp_path / "my.set")])
    assert re.fullmatch(r"my-set-[0-9a-f]{8}", table.split) and not (copy / "scores.json").exists()
    assert [score.sentences for score in table.directions] == [3, 3]
    folder = copy / "scores" / table.question
    assert (folder / "en-de.source").read_text() == "kita\n\nmo ne  su\n" and (
        folder / "en-de.reference"
    ).read_text() == "kitaen\nmoen\n\n"
    assert (folder / "en-de.hypothesis").read_text().split("\n")[
        1
    ] == ""  # as `lsmoe translate`: an empty line stays empty
    assert (folder / "de-en.source").read_text() == (folder / "en-de.reference").read_text()
    assert not (folder / "routing.json").exists()
    # Prepared data is not needed, and a set of the same name with other text is another set.
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(
        recipe.replace(f"directory: {run.parent}/data", f"directory: {tmp_path}/none")
    )
    (tmp_path / "my.set.en").write_text("kita\n\nmo\n")
    other = evaluate(
        copy, ["en-de", "de-en"], beam=1, progress=False, test=[str(tmp_path / "my.set")], part=Part(1, 1)
    )
    assert other.split[:7] == "my-set-" and other.split != table.split
    assert merge(copy, 1, ["de-en", "en-de"], beam=1, test=[str(tmp_path / "my.set")]).split == other.split
    # Experts chosen by the pair of languages know nothing of a pair that was not trained.
    with pytest.raises(UserError, match="direction de-fr is not in this system: it was never trained"):
        evaluate(copy, ["de-fr"], beam=1, progress=False, test=[str(tmp_path / "my.set")])
    convert_to_dense(run, Direction("en", "de"), tmp_path / "dense")  # has no parameters of another direction
    for test in ([str(tmp_path / "my.set")], []):  # no text would help
        with pytest.raises(UserError, match=r"direction de-en is not in this system: it knows en-de$"):
            evaluate(tmp_path / "dense", ["de-en"], beam=1, progress=False, test=test)
    with pytest.raises(UserError, match="language 'ru' is not in this system"):
        evaluate(copy, ["de-ru"], beam=1, progress=False, test=[str(tmp_path / "my.set")])
    (tmp_path / "my.set.fr").unlink()
    with pytest.raises(UserError, match=r"there is nothing to score: en-fr, fr-en have no text in my\.set"):
        evaluate(copy, ["en-fr", "fr-en"], beam=1, progress=False, test=[str(tmp_path / "my.set")])
    capsys.readouterr()
    evaluate(copy, beam=1, progress=False, test=[str(tmp_path / "my.set")])
    assert re.search(
        r"lsmoe: skipped: en-fr, fr-en have no text in my-set-[0-9a-f]{8}\n", capsys.readouterr().err
    )

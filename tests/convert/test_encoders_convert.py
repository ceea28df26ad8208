"""Encoders cut out for a language, and studies of them."""

import io
import json
import re
import subprocess

import pytest
import torch
from support import encoder_runs
from support.commands import main
from support.encoder_runs import DE, recipe_of
from support.host_runs import trained
from support.small_encoder import LANGUAGES, encoder_settings

from lsmoe_ds.analysis.neurons import analyze_neurons
from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.convert.agreement import Agreement, compare_labels
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.inference.label import label_all
from lsmoe_ds.inference.load import load
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.report.report import render_report
from lsmoe_ds.study.command import run_study
from lsmoe_ds.training.start_from import check_start_from

base = encoder_runs.base  # fixture

transformers = pytest.importorskip("transformers")
# What the cards' commands label, as a source line.
sentence_of = {
    "tag": "Words and punctuation marks between spaces .",
    "answer": json.dumps({"question": "A question?", "context": "A text that holds its answer."}),
}


@pytest.fixture(scope="module", params=("tag", "answer"))
def task(request):
    return request.param


@pytest.fixture(scope="module")
def run(pool, base, task):
    return trained(pool, recipe_of(base, task), base / f"run-{task}")


@pytest.mark.parametrize("route", ("specific", "shared"))
def test_a_language_is_cut_out_and_gives_the_same_labels(task, run, route, tmp_path):
    direction = DE if route == "specific" else None
    record = convert(run, "huggingface", direction, tmp_path / "out", check=6, route=route)
    same, of = {"tag": ("same_labels", "sentences"), "answer": ("same_answers", "questions")}[task]
    assert record[same] == record[of] == 6 and "same_translations" not in record
    assert 0 <= record["largest_logit_difference"] < 1e-4
    loaded = load(run, route=route)
    sources, _ = PreparedData.of(loaded.recipe).text(DE, "dev")
    assert label_all(load_engine(tmp_path / "out"), DE, sources) == label_all(loaded, DE, sources)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    kind = {"tag": "XLMRobertaForTokenClassification", "answer": "BertForQuestionAnswering"}[task]
    assert config.architectures == [kind]
    if task == "tag":
        assert list(config.id2label.values()) == loaded.recipe.data.labels


def test_the_code_of_a_card_runs(task, run, tmp_path, capsys):
    convert(run, "huggingface", DE, tmp_path, check=0)
    card = (tmp_path / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace('"FOLDER"', repr(str(tmp_path)))
    if task == "tag":
        code = code.replace("Words and punctuation marks between spaces .", "Anna wohnt in Bonn")
        wanted = label_all(load(run), DE, ["Anna wohnt in Bonn"])[0].split()
        exec(compile(code, "card", "exec"), {})
        found = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
        assert found == wanted
    else:
        line = json.dumps({"question": "A question?", "context": "A text that holds its answer."})
        exec(compile(code, "card", "exec"), {})
        assert capsys.readouterr().out.split() == label_all(load(run), DE, [line])[0].split()
    assert {"tag": "token-classification", "answer": "question-answering"}[task] in card


@pytest.mark.parametrize("kind", ("huggingface", "consolidated"))
def test_the_command_of_a_card_runs(task, run, kind, tmp_path, monkeypatch, capsys):
    convert(run, kind, DE if kind == "huggingface" else None, tmp_path, check=0)
    card = (tmp_path / "README.md").read_text()
    (command,) = re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
    line = label_all(load(run), DE, [sentence_of[task]])[0]
    text, _, ours = command.partition(" | lsmoe ")
    given = subprocess.run(["bash", "-c", text], capture_output=True, check=True).stdout
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert main(ours.replace("FOLDER", str(tmp_path)).split()) == 0
    assert capsys.readouterr().out == f"{line}\n"
    assert "translate" not in card


def test_the_report_speaks_of_the_task(task, run, tmp_path):
    convert(run, "huggingface", DE, tmp_path / "out", check=6)
    page = re.sub(r"<[^>]*>", " ", render_report(run).partition("<body")[2].split("<details><summary>Rec")[0])
    results, learned = {"tag": ("labels", "word"), "answer": ("answers", "end of an answer")}[task]
    for expected in (
        f"Same {results}",
        "6 of 6",
        f"nats for each {learned}",
        f"in nats a {learned}",
        "Language",
    ):
        assert expected in page, expected
    for other in ("ranslation", "target token", "irection"):
        assert other not in page, other


def test_what_an_encoder_cannot_become_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="--as peft is for models that translate"):
        convert(run, "peft", None, tmp_path / "out")
    with pytest.raises(UserError, match="--as dense is not for models of transformers"):
        convert(run, "dense", DE, tmp_path / "out")
    with pytest.raises(UserError, match="language en-de is not in this system: it knows de, en, fr"):
        convert(run, "huggingface", Direction("en", "de"), tmp_path / "out")


def test_models_that_differ_are_told_apart(run):
    one, other = load(run), load(run)
    sources, _ = PreparedData.of(one.recipe).text(DE, "dev")
    assert compare_labels(one, other, DE, sources) == Agreement(0.0, len(sources), len(sources))
    for name, parameter in other.model.named_parameters():
        if name.endswith(("classifier.weight", "qa_outputs.weight")):
            parameter.data.neg_()
    found = compare_labels(one, other, DE, sources)
    assert found.largest_logit_difference > 0.01 and found.same < found.sentences


def test_a_language_is_added_and_the_others_stay(task, run, tmp_path):
    convert(run, "grown", None, tmp_path / "grown", check=0, overrides=["data.languages=[de, en, fr, nl]"])
    grown, before = (read_weights(find_model(path)).tensors for path in (tmp_path / "grown", run))
    assert find_model(tmp_path / "grown").recipe.data.directions[-1] == "nl-nl"
    name = "encoder.0.feed_forward.expand_low_rank.flat"
    # Each language has two rows in the order of codes, and then what all share.
    assert torch.equal(grown[name][:6], before[name][:6]) and torch.equal(grown[name][8:], before[name][6:])
    head = {"tag": "host.classifier.weight", "answer": "host.qa_outputs.weight"}[task]
    assert torch.equal(grown[head], before[head])


def test_what_is_not_for_encoders_is_refused(base, task, run, tmp_path):
    with pytest.raises(UserError, match="holds an encoder, of which nothing is to be imported"):
        convert(base / task, "consolidated", None, tmp_path / "out", overrides=["data.languages=[de]"])
    with pytest.raises(UserError, match="'analyze neurons' knows the units of our own alone"):
        analyze_neurons(run, tmp_path / "out")


def test_labels_of_a_start_are_those_of_the_recipe(base, task, run, tmp_path):
    convert(run, "consolidated", None, tmp_path / "whole", check=0)
    recipe = recipe_of(base, task)
    vocabulary = recipe.prepared / "vocabulary.model"
    check_start_from(recipe, tmp_path / "whole", vocabulary)
    known = recipe.data.labels or []
    recipe.data.labels = [*known[:1], *known[:0:-1], "B-NEW"]
    with pytest.raises(UserError, match=r"its 'data.labels' are (O, .*|none): give the same in this order"):
        check_start_from(recipe, tmp_path / "whole", vocabulary)


def test_all_languages_are_kept_whole(task, run, tmp_path):
    convert(run, "consolidated", None, tmp_path / "whole", check=3)
    sources, _ = PreparedData.of(load(run).recipe).text(DE, "dev")
    assert label_all(load(tmp_path / "whole"), DE, sources) == label_all(load(run), DE, sources)


def test_a_plan_counts_the_head_and_the_languages(base, task):
    recipe = recipe_of(base, task)
    counted = plan(recipe)
    per_language = 2 * 2 * 2 * (32 + 48)  # rank 2 at both matrices of two layers
    plain = plan(type(recipe).model_validate(encoder_settings(base, base / task, task)))
    assert counted.parameters.whole.total - plain.parameters.whole.total == 4 * per_language
    assert counted.routes["shared"].whole.total - plain.parameters.whole.total == per_language


def test_a_study_of_tagging(base, tmp_path, monkeypatch):
    import yaml

    settings = encoder_settings(base, base / "tag")
    settings["training"] |= {"steps": 2, "log_every": 1, "checkpoint_every": 2}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings))
    low_rank = {"rank": 2, "index": "language", "at": "feed_forward"}
    study = {
        "name": "names",
        "recipe": "base.yaml",
        "seeds": [1],
        "baseline": "naive",
        "members": {
            "naive": {"title": "Naive"},
            "fd": {
                "title": "FD",
                "set": {"model": {"low_rank": {**low_rank, "fuse_distillation": True}}},
                "routes": ["specific", "shared"],
            },
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.chdir(tmp_path)
    comparison = run_study(tmp_path / "study.yaml")
    assert comparison.runs_missing == 0 and len(comparison.rows) == 3
    assert set(comparison.rows[0].directions) == {f"{code}-{code}" for code in LANGUAGES}
    text = (tmp_path / "runs/names/study.md").read_text()
    assert "F1" in text and "BLEU" not in text and "opying" not in text

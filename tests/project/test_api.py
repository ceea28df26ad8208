"""The Python interface: what it gives is what the commands give, and the page about it runs."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
import torch
from support.commands import main
from support.conversions import EN_DE
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_run

import lsmoe_ds
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.shipped import ROOT

TEXTS = ["ba de fi", "", "ko la mi nobu"]


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("api"), TOKEN_TOP2, TARGET_TOP2, 1)[0]


def test_it_translates_as_the_command_does(run, tmp_path):
    model = lsmoe_ds.load(run)
    assert model.directions == ["en-de", "de-en", "en-fr", "fr-en"]
    wanted = list(translate(load(run, "cpu"), EN_DE, TEXTS, beam=2))
    assert model.translate(TEXTS, "en", "de", beam=2) == wanted
    assert model.translate(TEXTS, "eng_Latn", "deu_Latn", beam=2) == wanted


def test_the_n_best_are_those_of_the_command(run, capsys, monkeypatch):
    model = lsmoe_ds.load(run)
    found = model.translate_n_best(TEXTS, "en", "de", n=3, beam=4)
    assert [len(each) for each in found] == [3, 1, 3]
    assert [best.text for best, *_ in found] == model.translate(TEXTS, "en", "de", beam=4)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode() + b"\n")))
    asked = ["--from", "en", "--to", "de", "--n-best", "3", "--beam", "4"]
    assert main(["translate", str(run), *asked]) == 0
    said = [line.split(" ||| ") for line in capsys.readouterr().out.splitlines()]
    assert [(int(line), text, float(score)) for line, text, score in said] == [
        (line, each.text, pytest.approx(each.score, abs=1e-4))
        for line, several in enumerate(found)
        for each in several
    ]
    with pytest.raises(UserError, match="5 best translations are wanted of a beam of 4"):
        model.translate_n_best(TEXTS, "en", "de", n=5, beam=4)


def test_texts_may_be_an_iterator_and_directions_are_checked(run):
    model = lsmoe_ds.load(run, direction="en-de")
    assert model.translate(iter(TEXTS), "en", "de") == model.translate(TEXTS, "en", "de")
    assert len(model.score(iter(TEXTS), iter(TEXTS), "en", "de")) == len(TEXTS)
    assert repr(model) == "<lsmoe_ds.Model small: en-de, de-en, en-fr, fr-en>"
    with pytest.raises(UserError, match="'it' is not in this system"):
        lsmoe_ds.load(run, direction="en-it")
    for penalty in (400, float("nan"), -11):
        with pytest.raises(UserError, match="must be a number from -10 to 10"):
            model.translate(TEXTS, "en", "de", length_penalty=penalty)


def test_scores_are_log_probabilities(run):
    model = lsmoe_ds.load(str(run))
    engine = load(run, "cpu")
    sources, targets = (side[:3] for side in PreparedData.of(engine.recipe, run).text(EN_DE, "test"))
    logits, scores = (each(sources, targets, "en", "de") for each in (model.logits, model.score))
    for source, target, own, score in zip(sources, targets, logits, scores, strict=True):
        ids = [engine.vocabulary.encode(each) for each in (source, target)]
        batch = engine.collate([ids[0]], [ids[1]], EN_DE)
        with torch.inference_mode():
            whole = engine.logits_of(batch)[0]
        assert own.shape == (len(ids[1]) + 1, engine.vocabulary.size)
        torch.testing.assert_close(own, whole[: len(ids[1]) + 1])
        labels = torch.tensor([*ids[1], 2])
        wanted = -float(torch.nn.functional.cross_entropy(own, labels, reduction="sum"))
        assert score == pytest.approx(wanted, rel=1e-5)


def test_a_model_in_ctranslate2(pool, tmp_path):
    run = make_run(pool, tmp_path, None, TARGET_TOP2, 1)[0]
    convert(run, "ctranslate2", EN_DE, tmp_path / "ct", check=0)
    model = lsmoe_ds.load(tmp_path / "ct")
    assert model.translate(TEXTS, "en", "de") == lsmoe_ds.load(run).translate(TEXTS, "en", "de")
    assert lsmoe_ds.load(run, engine="ctranslate2", direction="en-de").directions == ["en-de"]
    with pytest.raises(UserError, match="a model in CTranslate2 gives no logits"):
        model.score(["ba"], ["de"], "en", "de")


def test_plans_and_pairs(run):
    recipe = run / "recipe.yaml"
    assert lsmoe_ds.plan(recipe).to_dict() == plan(load_recipe(recipe)).to_dict()
    wide = lsmoe_ds.plan(recipe, ["model.hidden=32"])
    assert wide.parameters.whole.total > lsmoe_ds.plan(recipe).parameters.whole.total
    data = PreparedData.of(load_recipe(recipe))
    pairs = list(lsmoe_ds.read_pairs(recipe, "de-en"))
    tokens = data.tokens(Direction("de", "en"), "train")
    assert len(pairs) == len(tokens)
    assert data.vocabulary.encode(pairs[3][0]) == tokens.source[3].tolist()
    assert data.vocabulary.encode(pairs[3][1]) == tokens.target[3].tolist()


def test_mistakes_are_said(run):
    model = lsmoe_ds.load(run)
    for call, message in (
        (lambda: lsmoe_ds.load(run / "nothing"), "there is no folder"),
        (lambda: model.translate("ba de", "en", "de"), "texts are a list"),
        (lambda: model.translate([3], "en", "de"), "3 is no text"),
        (lambda: model.translate(["ba"], "en", "nl"), "'nl' is not in this system"),
        (lambda: model.score(["ba"], [], "en", "de"), "there are 1 texts, but 0 translations"),
        (lambda: next(lsmoe_ds.read_pairs(run / "recipe.yaml", "en-de", "trian")), "'trian' is no split"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        lsmoe_ds.lod  # noqa: B018


def test_the_page_about_it_runs(run, monkeypatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    code = code.replace('"runs/demo"', f'"{run}"').replace('"recipes/demo.yaml"', f'"{run}/recipe.yaml"')
    exec(compile(code, "python.md", "exec"), {})
    assert "parameters" in capsys.readouterr().out


def test_importing_the_package_is_quick():
    """The command's --help imports it."""
    code = "import sys, lsmoe_ds; lsmoe_ds.__version__; assert not {'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

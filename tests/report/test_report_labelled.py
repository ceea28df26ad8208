"""The report of a run and the card of a model that label words; what a report says of COMET."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support.labelled_scores import tagged
from support.pages import Page, make_run

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.model_card import model_card
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.report import report
from lsmoe_ds.report.report import write_report


def tagging(recipe: Recipe) -> Recipe:
    """Return a recipe of the languages of :func:`tagged`, whatever its corpora are for."""
    data = recipe.data.model_copy(update={"languages": ["de", "en", "oc"]})
    data = data.model_copy(update={"directions": ["de-de", "en-en", "oc-oc"]})
    model = recipe.model.model_copy(update={"task": "tag"})
    return recipe.model_copy(update={"data": data, "model": model})


def test_report_shows_what_was_scored(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    for name in ("routing.json", "conversion.json"):
        (run / name).unlink()
    replace(tagged(de=80, en=90, oc=40), name="demo").write(run / "scores.json")
    monkeypatch.setattr(report, "load_recipe", lambda path: tagging(load_recipe(path)))
    page = Page(write_report(run))
    table = page.source.partition("<h2>Scores by language</h2>")[2].partition("</section>")[0]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", table)[:5] == [
        "Language",
        "F1",
        "Precision",
        "Recall",
        "sentences",
    ]
    assert re.findall(r'<i style="width:([\d.]+)%">', table) == ["85.0", "75.6", "37.8", "66.1"]
    for expected in ("3 languages:", "F1, all languages", "70.0", "Occitan", "Samples", "B-PER O O"):
        assert expected in page.text, expected
    scores = page.text.partition("Scores by language")[2].partition("Models extracted")[0]
    for other in ("BLEU", "chrF", "opying", "irection", "beam", "→", "translation", "de-de"):
        assert other not in scores, other
    assert "the model is not a translator yet" not in page.text


def test_report_names_the_checkpoint_of_comet(tmp_path) -> None:
    run = make_run(tmp_path)
    table = ScoreTable.read(run / "scores.json")
    scores = [
        replace(score, comet=0.5, signatures={**score.signatures, "comet": "comet-1a2b"})
        for score in table.directions
    ]
    replace(table, directions=tuple(scores), comet="comet-1a2b").write(run / "scores.json")
    assert "COMET comet-1a2b" in Page(write_report(run)).text


def test_card_says_what_the_model_does(tmp_path) -> None:
    run = make_run(tmp_path)
    tagged(de=80, en=90, oc=40).write(run / "scores.json")
    provenance = {
        "run": "names",
        "version": "1",
        "step": 100,
        "route": "specific",
        "dense_parameters": 10,
        "sparse_parameters": 10,
    }
    card = model_card("dense", tagging(load_recipe(run / "recipe.yaml")), provenance, run)
    for expected in (
        "pipeline_tag: token-classification",
        "# names, all languages",
        "Finds names in text in German, English, Occitan.",
        "| language | de, en, oc |",
        "| language | F1 | Precision | Recall | sentences |\n|---|---:|---:|---:|---:|\n"
        "| de | 80.0 | 81.0 | 79.0 | 7 |\n",
    ):
        assert expected in card, expected
    scores = card.partition("## Scores")[2].partition("## Use")[0]
    assert "chrF" not in scores and "BLEU" not in scores and "de-de" not in card
    assert scores.endswith("| oc | 40.0 | 41.0 | 39.0 | 7 |\n\n")

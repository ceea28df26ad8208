"""What the report says of the layers with experts."""

from __future__ import annotations

import json
import re

import pytest
from support.pages import Page, make_run, routing_layer

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.report.report import write_report


def test_the_report_shows_the_numbers_of_each_layer(tmp_path) -> None:
    run = make_run(tmp_path)
    page = Page(write_report(run))
    # Chosen: de, nl, ru 0 1; en 2 3; he 1 2. Load (3, 4, 2, 1) / 10; relatives are de, en, nl.
    assert "Encoder layer 2by target1.600.451.85 (92%)1.72 (86%)0.500.660 of 4–" in page.text
    (run / "routing.json").write_text(
        json.dumps({"layers": [routing_layer(routing="sentence", task="source", dropped=0.125)]})
    )
    page = Page(write_report(run))
    assert "Encoder layer 2by sentence" in page.text and "0 of 412.5%" in page.text
    assert "the same set of experts" not in page.text and "chosen by the task" not in page.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing": "random"}, "none of those allowed"),
        ({"tokens": [1, 2]}, "need one count for each task"),
        ({"load": [0.5, 0.5]}, "needs one share for each expert"),
        ({"dropped": 2}, "the dropped share is not between 0 and 1"),
    ],
)
def test_bad_numbers_of_a_layer_are_refused(changes: dict, message: str, tmp_path) -> None:
    run = make_run(tmp_path)
    (run / "routing.json").write_text(json.dumps({"layers": [routing_layer(**changes)]}))
    with pytest.raises(UserError, match=message):
        write_report(run)


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ({"routing": "static", "task": "source"}, "used for each source language"),
        ({"routing": "sentence"}, "used for each sentence"),
        ({"routing": "token", "task": "pair"}, "used for each token"),
    ],
)
def test_the_summary_says_who_chooses(moe: dict, expected: str, tmp_path) -> None:
    run = make_run(tmp_path)
    recipe = (run / "recipe.yaml").read_text()
    for key, value in {"routing": "token", "task": "target", **moe}.items():
        recipe = re.sub(rf"\b{key}: (task|target)\n", f"{key}: {value}\n", recipe)
    (run / "recipe.yaml").write_text(recipe)
    assert expected in Page(write_report(run)).text


def test_the_summary_names_the_weights_that_training_started_from(tmp_path) -> None:
    run = make_run(tmp_path)
    recipe = (run / "recipe.yaml").read_text()
    recipe = recipe.replace("training:\n", "training:\n  start_from: bases/nllb\n")
    (run / "recipe.yaml").write_text(
        recipe.replace("  vocabulary:\n", "  vocabulary:\n    file: own.model\n")
    )
    assert "steps, starting from nllb." in Page(write_report(run)).text


def test_the_report_of_a_model_without_experts_speaks_of_none(tmp_path) -> None:
    run = make_run(tmp_path)
    recipe = load_recipe(run / "recipe.yaml").model_dump(exclude_none=True)
    for side in ("encoder", "decoder"):
        recipe["model"][side].pop("moe")
    recipe["model"]["low_rank"] = {
        "rank": {code: 4 if code == "en" else 2 for code in ("de", "en", "he", "nl", "ru")},
        "index": "language",
    }
    (run / "recipe.yaml").write_text(Recipe.model_validate(recipe).to_yaml())
    (run / "routing.json").unlink()
    (run / "timings.json").unlink()
    text = Page(write_report(run)).text
    assert (
        "transformer with low-rank matrices of each language (ranks 2 to 4) beside its feed-forwards, trained"
        " for 100 steps" in text
    )
    assert "What a direction has of its own merged into plain layers" in text
    assert not re.search(r"\b[Ee]xperts?\b|[Ss]parse|make demo", text.partition("name: demo")[0])

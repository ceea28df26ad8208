"""The tables and the page of a study whose members label words."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from support.labelled_scores import tagged
from support.pages import Page

from lsmoe_ds.study.comparing import compare
from lsmoe_ds.study.page import render_page
from lsmoe_ds.study.table import Comparison, Costs, Spread

ONE, EACH = ("one", "specific"), ("each", "specific")
SCORES = {
    ONE: {
        1: tagged(en=80, de=70, oc=30),
        2: tagged(en=82, de=70, oc=34),
        3: tagged(en=81, de=73, oc=32),
    },  # of all: 60, 62 and 62
    EACH: {
        1: tagged(en=84, de=74, oc=28),
        2: tagged(en=86, de=75, oc=34),
        3: tagged(en=85, de=76, oc=31),
    },  # of all: 62, 65 and 64
}


def comparison() -> Comparison:
    costs = {key: Costs(7_000_000, 6_000_000, 5_000_000) for key in SCORES}
    evaluate = {"beam": 5, "length_penalty": 1.0, "split": "test", "limit": 10}
    titles = {ONE: "One LoRA", EACH: "LoRA of each language"}
    return compare("names", 30, [1, 2, 3], evaluate, ONE, titles, costs, SCORES, "tag")


def test_means_gains_and_win_ratio() -> None:
    found = comparison()
    one, each = found.rows
    assert each.groups["all"]["f1"] == Spread(pytest.approx(191 / 3), 62, 65, 3)
    assert each.groups["all"]["recall"].mean == pytest.approx(188 / 3)
    assert each.groups["high"]["f1"].mean == 80 and set(each.groups) == {"all", "high", "low"}
    assert each.gain == pytest.approx(191 / 3 - 184 / 3)
    assert each.gain_by_direction == {"en-en": 4, "de-de": 4, "oc-oc": -1}
    assert each.win_ratio == pytest.approx(2 / 3) and not each.beyond_seeds and one.win_ratio is None
    assert (found.groups, found.classes, found.copy) == (["all", "high", "low"], [], {})
    assert found.about() == (
        "30 steps each on the same data, seeds 1, 2, 3; test set, the first 10 sentences of each language."
    )
    value = json.loads(json.dumps(found.to_dict()))
    assert (value["task"], value["score_of_gains"], value["copy"]) == ("tag", "f1", {})
    assert Comparison.from_dict(value) == found


def test_tables_and_page_have_what_was_scored(tmp_path) -> None:
    found = comparison()
    grids = {grid.title: grid for grid in found.grids()}
    assert list(grids) == ["Size and speed", "F1", "Precision", "Recall", "F1 by language"]
    assert grids["F1"].columns == [
        "Model",
        "All languages",
        "High resource",
        "Low resource",
        "Win ratio",
        "Difference",
    ]
    assert grids["F1"].rows[1][1:] == ["63.7 ±1.5", "80.0 ±0.8", "31.0 ±3.0", "67%", "within seed noise"]
    by_language = grids["F1 by language"]
    assert by_language.columns == ["Language", "One LoRA", "LoRA of each language"]
    assert sorted(row[0] for row in by_language.rows) == ["de", "en", "oc"]

    path = tmp_path / "study.html"
    path.write_text(render_page(found), encoding="utf-8")
    page = Page(path)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.render())
    summary = console.export_text()
    assert page.needs_nothing_else() and "Gain by language" in page.text and "Occitan" in page.text
    assert "F1 all" in summary and "Precision all" in summary and "one language" in summary
    for text in (page.text, found.to_markdown(), summary):
        for other in ("BLEU", "chrF", "opying", "irection", "beam", "→", "de-de"):
            assert other not in text, other

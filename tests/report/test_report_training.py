"""The training section of a report: records of a resumed run, and a chart of each method."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from support.pages import Page, make_run

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.report.progress import read_progress
from lsmoe_ds.report.report import write_report


def test_metrics_of_a_training_that_was_killed_and_resumed(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 10, "nll": 5.0},
        {"step": 20, "nll": 4.5},
        {"step": 10, "nll": 4.8},
        {"step": 20, "dev_loss": 4.6},
        {"step": 30, "nll": math.nan},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "nl', encoding="utf-8")
    progress = read_progress(path)
    assert progress.curves["nll"] == [(10, 4.8), (20, 4.5)]
    assert progress.curves["dev_loss"] == [(20, 4.6)] and progress.steps == 30


def charts(page: Page) -> list[dict[str, list[tuple[float, float]]]]:
    """Return the points of each curve of each chart, by the class of the curve."""
    found = []
    for drawing in re.findall(r'<div class="chart[^>]*>(<svg.*?</svg>)', page.source):
        paths = [
            (path.get("class", ""), path.get("d", ""))
            for path in ElementTree.fromstring(drawing).iter("path")
        ]
        curves = {
            kind: re.findall(r"[ML]([\d.]+) ([\d.]+)", drawn)
            for kind, drawn in paths
            if "dots" not in kind and kind != "grid"
        }
        found.append({kind: [(float(x), float(y)) for x, y in points] for kind, points in curves.items()})
    return found


@pytest.mark.parametrize("method", ["neither", "low_rank", "clsr"])
def test_training_charts_of_each_method(method: str, tmp_path) -> None:
    run = make_run(tmp_path)
    section = {"low_rank": {"rank": 2, "fuse_distillation": True}, "clsr": {"budget": 0.35}}.get(method, {})
    recipe = load_recipe(run / "recipe.yaml").model_dump(exclude_none=True)
    recipe["model"] |= {method: section} if section else {}
    (run / "recipe.yaml").write_text(Recipe.model_validate(recipe).to_yaml())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:  # every run has both columns, zeros without the method
        falling = 0.75 - record["step"] / 200
        if "loss" in record:
            record |= {
                "distillation": falling * (method == "low_rank"),
                "gates": falling * (method == "clsr"),
            }
        elif method == "low_rank":
            record["dev_loss_shared"] = record["dev_loss"] + 0.3
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(write_report(run))
    expected = {
        "dev, shared route": "low_rank",
        "Divergence of the two": "low_rank",
        "Mean gate; dashed its budget, 0.35": "clsr",
    }
    assert [text for text in expected if text in page.text] == [
        text for text, of in expected.items() if of == method
    ]
    loss, rate, *more = charts(page)
    assert list(loss) == [
        "faint",
        "line",
        *(["dev wide", "shared"] if method == "low_rank" else ["dev"]),
    ] and list(rate) == ["line"]
    assert [list(chart) for chart in more] == {"low_rank": [["line"]], "clsr": [["aim", "line"]]}.get(
        method, []
    )
    if more:
        ((first, high), *_, (last, low)) = more[0]["line"]
        assert (first, last) == (0, 1000) and high < low, "it falls"
    if method == "low_rank":
        assert [x for x, _ in loss["dev wide"]] == [x for x, _ in loss["shared"]] == [500, 1000]
        assert all(
            shared < dev for (_, shared), (_, dev) in zip(loss["shared"], loss["dev wide"], strict=True)
        ), "a larger loss is higher"
    if method == "clsr":
        ((left, budget), (right, same)) = more[0]["aim"]
        assert (left, right) == (0, 1000) and high < budget == same < low


def test_empty_metrics(tmp_path) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    assert "No training is recorded" in Page(write_report(run)).text


def test_the_chrf_of_dev_translations_has_a_chart(tmp_path) -> None:
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "dev_chrf": step / 10}) + "\n" for step in (50, 100))
    page = Page(write_report(run))
    assert "chrF of dev translations" in page.text
    ((left, low), (right, high)) = charts(page)[1]["dev"]
    assert (left, right) == (500, 1000) and high < low, "it rises"


@pytest.mark.parametrize("peak", [True, False])
def test_rates_are_figures_of_the_page_and_a_chart(peak: bool, tmp_path) -> None:
    run = make_run(tmp_path)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if "loss" in record:
            record |= {"tflops_per_rank": 100.0 + record["step"]} | (
                {"mfu": 0.3 + record["step"] / 1000} if peak else {}
            )
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(write_report(run))
    assert len(charts(page)) == 3 and "150 TFLOP/s a rank" in page.text
    assert ("Model FLOPs utilization" in page.text) == ("35.0 %" in page.text) == peak

"""The report of whole, partial and hostile run folders, and the order of expert maps."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
from support.pages import HOSTILE, Page, make_run, routing_layer

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import Direction, english_centric
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.direction_scores import score_direction
from lsmoe_ds.evaluation.groups import Metrics
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.report.progress import Progress
from lsmoe_ds.report.report import _caveat, write_report


def test_report_of_a_whole_run(tmp_path) -> None:
    path = write_report(make_run(tmp_path))
    page = Page(path)
    assert path.name == "report.html" and path.stat().st_size < 2_000_000
    assert page.needs_nothing_else() and "http" not in page.source
    for expected in (
        "5 languages in 8 directions",
        "English → German",
        "Hebrew",
        "Показать изменения",
        "21.9 M",
        "9,876,543 (45 %)",
        "2.0e-06",
        "99 of 100",
        "37.7 MiB",
        "nrefs:1|case:mixed|eff:no|tok:13a",
        "GPL-2+",
        "8 min",
        "Encoder layer 2",
        "Choose the same set of experts: Dutch, German, Russian.",
        "sentencepiece",
        "55 s of training",
        "11.0 k tokens",
        "chrF above copying the source. Of its 16 test translations 50% are word for word the reference",
        "All layers have one scale: full color is 50.0 %",
    ):
        assert expected in page.text, expected
    assert not [tag for tag, attributes in page.tags if attributes.get("class") == "absent"]
    samples = [attributes for tag, attributes in page.tags if tag == "p" and "lang" in attributes]
    assert {(a["lang"], a["dir"]) for a in samples} == {
        ("en", "auto"),
        ("de", "auto"),
        ("nl", "auto"),
        ("ru", "auto"),
        ("he", "rtl"),
    }


def test_scores_by_classes_of_source_and_target(tmp_path) -> None:
    run = make_run(tmp_path)
    table = ScoreTable.read(run / "scores.json")
    first = replace(
        table.directions[0],
        direction=Direction("de", "he"),
        metrics=Metrics({"bleu": 1.0, "chrf": 77.7, "chrfpp": 2.0}),
    )
    groups = {"de": "medium", "he": "very_low", "en": "high", "nl": "high", "ru": "high"}
    replace(table, directions=(first, *table.directions[1:]), groups=groups).write(run / "scores.json")
    page = Page(write_report(run))
    found = page.source.partition("By the resources of source and target")[2]
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", found.partition("</table>")[0])
    assert heads == ["from", "high", "medium", "very low", "high", "medium", "very low"]
    cells = re.findall(r'<td class="n">(.*?)</td>', found.partition("</table>")[0])
    assert cells[5] == '77.7 <span class="quiet">1</span>'  # from medium into very low
    assert cells[8] == ""  # from very low into very low
    table.write(run / "scores.json")
    assert "By the resources" not in Page(write_report(run)).text


def test_bars_are_as_long_as_the_scores(tmp_path) -> None:
    run = make_run(tmp_path)
    page = Page(write_report(run))
    widths = [float(w) for w in re.findall(r'<i style="width:([\d.]+)%"></i>', page.source)]
    values = [
        v
        for s in ScoreTable.read(run / "scores.json").directions
        for v in (s.metrics["chrf"], s.copy["chrf"])
    ]
    assert max(widths[: len(values)]) == 85
    for value in values:
        assert any(math.isclose(width, 85 * value / max(values), abs_tol=0.051) for width in widths)


OPTIONAL = ("metrics.jsonl", "scores.json", "routing.json", "conversion.json", "timings.json")


@pytest.mark.parametrize("absent", [*OPTIONAL, "all"])
def test_sections_without_their_file_say_so(absent: str, tmp_path) -> None:
    run = make_run(tmp_path)
    for name in OPTIONAL if absent == "all" else [absent]:
        (run / name).unlink()
    page = Page(write_report(run, tmp_path / "elsewhere.html"))
    notes = [attributes for tag, attributes in page.tags if attributes.get("class") == "absent"]
    assert len(notes) == {"all": 5, "scores.json": 2, "timings.json": 0}.get(absent, 1)
    assert "make demo" not in page.text
    assert not (run / "report.html").exists() and page.needs_nothing_else()


def test_hostile_text_stays_text(tmp_path) -> None:
    page = Page(write_report(make_run(tmp_path, extra=HOSTILE)))
    assert page.needs_nothing_else()
    assert "<script" not in page.source and "<img" not in page.source
    assert page.text.count("<script>alert('x')</script>") >= 8 * 2 * 3 + 3
    assert "{{ 7*7 }}" in page.text


def test_lone_surrogates_do_not_lose_the_report(tmp_path) -> None:
    run = make_run(tmp_path)
    text = (run / "scores.json").read_text(encoding="utf-8").replace("Show changes", "Show \\ud800 changes")
    (run / "scores.json").write_text(text, encoding="utf-8")
    assert "Show ? changes" in Page(write_report(run)).text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("scores.json", "{", "scores"),
        ("routing.json", '{"layers": [{"side": "encoder"}]}', "'shares' is missing"),
        (
            "routing.json",
            json.dumps({"layers": [routing_layer(shares=[[1, 1, 1, 1]] * 5)]}),
            "does not sum to 1",
        ),
        ("routing.json", json.dumps({"layers": [routing_layer(tasks=["de"])]}), "one row for each task"),
        ("routing.json", json.dumps({"layers": [routing_layer(side="middle")]}), "none of those allowed"),
        (
            "conversion.json",
            '{"direction": "en-de", "sparse_parameters": "many", "dense_parameters": 1}',
            "sparse_parameters",
        ),
        ("timings.json", "[1, 2]", "timings"),
        ("metrics.jsonl", 'nonsense\n{"step": 1}\n', "line 1"),
        ("recipe.yaml", "name: [", "recipe"),
    ],
)
def test_damaged_files_are_named_and_the_old_report_stays(
    name: str, text: str, message: str, tmp_path
) -> None:
    run = make_run(tmp_path)
    before = write_report(run).read_bytes()
    (run / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        write_report(run)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert (run / "report.html").read_bytes() == before


def test_folder_that_is_no_run(tmp_path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        write_report(make_run(tmp_path), tmp_path / "absent" / "report.html")


def test_what_is_missing_names_a_command_that_helps(tmp_path) -> None:
    run = make_run(tmp_path)
    for name in ("scores.json", "conversion.json"):
        (run / name).unlink()
    recipe = load_recipe(run / "recipe.yaml").model_dump(exclude_none=True)
    recipe["data"]["held_out"]["test"] = 0
    recipe["model"]["clsr"] = {"budget": 0.5}
    for side in ("encoder", "decoder"):
        recipe["model"][side].pop("moe")
    (run / "recipe.yaml").write_text(Recipe.model_validate(recipe).to_yaml())
    text = Page(write_report(run)).text
    assert "No scores yet: run lsmoe evaluate --test FILES." in text
    assert "so no dense model computes the same" in text and "lsmoe convert" not in text


def test_scores_of_an_earlier_step_are_told_apart_from_the_training(tmp_path) -> None:
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 300, "loss": 5.0, "tokens": 1000, "seconds": 5}) + "\n")
    text = Page(write_report(run)).text
    assert "Step 100, test set" in text and "Training has gone on to step 300 since." in text
    assert "of training the model scores" not in text, "the time is that of all steps"


def test_scores_that_lie_elsewhere(tmp_path) -> None:
    run, elsewhere = make_run(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(UserError, match=r"--scores .*elsewhere holds no scores of this run's directions"):
        write_report(run, scores=elsewhere)
    for name in ("scores.json", "routing.json"):
        (run / name).rename(elsewhere / name)
    page = Page(write_report(run, scores=elsewhere))
    assert (
        "Показать изменения" in page.text
        and "Encoder layer 2" in page.text
        and "No scores yet" not in page.text
    )


def test_every_conversion_is_told_with_what_it_is(tmp_path) -> None:
    run = make_run(tmp_path)
    record = json.loads((run / "conversion.json").read_text())
    int8 = {
        "kind": "ctranslate2",
        "quantization": "int8",
        "same_translations": 81,
        "largest_logit_difference": None,
        "step": 90,
    }
    reason = {
        "kind": "huggingface",
        "direction": "en-nl",
        "same_translations": None,
        "not_checked": "transformers is not installed",
    }
    (run / "conversions").mkdir()
    for name, change in (
        ("z", {"kind": "dense", "step": 100, "date": "2026-01-02T03:04:05+00:00"}),
        ("a", int8),
        ("b", reason),
    ):
        (run / "conversions" / f"{name}.json").write_text(json.dumps(record | change))
    (run / "conversion.json").write_text(json.dumps(record | int8))
    page = Page(write_report(run))
    rows = re.findall(r"<tr><td>(dense|Hugging Face|CTranslate2, int8)<br>(.*?)</tr>", page.source)
    assert [title for title, _ in rows] == ["dense", "Hugging Face", "CTranslate2, int8"]
    cells = [[re.sub(r"<[^>]+>", "", cell) for cell in row.split("</td><td")] for _, row in rows]
    assert "99 of 100" in cells[0][5] and cells[0][6].endswith("2026-01-02, of step 100, in 3.0 s")
    assert "not compared: transformers is not installed" in cells[1][5] and "English → Dutch" in cells[1][1]
    assert "81 of 100" in cells[2][5] and "of step 90" in cells[2][6]
    assert "Weights in int8 are rounded more" in page.text and "dense, one" not in page.text
    (run / "conversions" / "a.json").unlink()
    assert "int8" not in Page(write_report(run)).text


@pytest.mark.parametrize(
    ("ahead", "said"),
    [(3.21, "3.2 chrF above copying"), (-3.21, "3.2 chrF below copying"), (0.0, "the same chrF as copying")],
)
def test_the_caveat_compares_with_copying_in_plain_words(ahead: float, said: str) -> None:
    score = score_direction(english_centric(["de"])[0], ["a b c"], ["x y z"], ["q r s"])
    metrics = Metrics({"bleu": 0.0, "chrf": 20.0 + ahead, "chrfpp": 0.0})
    table = ScoreTable(
        "x",
        10,
        "test",
        5,
        1.0,
        (replace(score, metrics=metrics, copy=Metrics({"bleu": 0.0, "chrf": 20.0, "chrfpp": 0.0})),),
    )
    caveat = _caveat(table, Progress(steps=10, seconds=180.0))
    assert caveat is not None and caveat.startswith(
        f"After 3 min of training the model scores {said} the source. Of its 1 test"
    )

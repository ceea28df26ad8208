"""The report of whole, partial and hostile run folders, and the order of expert maps."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import Direction, english_centric
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.direction_scores import score_direction
from lsmoe_ds.evaluation.groups import Metrics
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.report.progress import Progress
from lsmoe_ds.report.report import _caveat, write_report

HOSTILE = (
    "<script>alert('x')</script>\"><img src=x onerror=1>&amp;\u202e\x00{{ 7*7 }} https://evil.example/x.js"
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def needs_nothing_else(self) -> bool:
        """Whether no tag or style makes a browser ask for anything, or run anything."""
        loads = {"src", "href", "srcset", "action", "data", "xlink:href"}
        active = {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
        for tag, attributes in self.tags:
            if tag in active or loads & set(attributes) or any(name.startswith("on") for name in attributes):
                return False
        styles = "".join(re.findall(r"<style>(.*?)</style>", self.source, re.S))
        return "url(" not in styles and "@import" not in styles


LINES = {
    "de": ["Seite", "Zeige die Änderungen"],
    "ru": ["Страница", "Показать изменения"],
    "he": ["דף", "MediaWiki הצג שינויים"],
}
LINES |= {"en": ["Page", "Show changes"], "nl": ["Pagina", "Wijzigingen tonen"]}


def make_run(folder: Path, *, extra: str = "") -> Path:
    """A run folder with every file; ``extra`` is put into all text that comes from data."""
    run = folder / "runs" / "demo"
    run.mkdir(parents=True)
    moe = {"experts": 4, "every": 2, "top_k": 2, "routing": "task", "task": "target"}
    side = {"layers": 2, "feed_forward": 16, "moe": moe}
    recipe = Recipe.model_validate(
        {
            "name": "demo",
            "data": {
                "corpora": ["mediawiki"],
                "directory": str(folder / "data"),
                "languages": ["de", "nl", "ru", "he"],
            },
            "model": {"hidden": 8, "heads": 2, "encoder": side, "decoder": side},
            "training": {"steps": 100},
            "deepspeed": {},
        }
    )
    (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    corpus = folder / "data" / "corpora" / "mediawiki"
    corpus.mkdir(parents=True)
    provenance = {
        "name": "mediawiki" + extra,
        "package": "mediawiki",
        "version": "1.39",
        "license": "GPL-2+",
        "date": "2026-01-01",
    }
    (corpus / "PROVENANCE.json").write_text(json.dumps(provenance), encoding="utf-8")
    records = [
        {
            "step": s,
            "loss": 9 - s / 50,
            "nll": 8 - s / 50,
            "learning_rate": 1e-4,
            "tokens": 1000,
            "tokens_per_second": 900 + s,
            "seconds": 5,
        }
        for s in range(0, 101, 10)
    ]
    records += [{"step": 50, "dev_loss": 7.1}, {"step": 100, "dev_loss": 6.2}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    scores = []
    for direction in english_centric(["de", "nl", "ru", "he"]):
        sources, references = (
            [line + extra for line in LINES[code]] for code in (direction.source, direction.target)
        )
        scores.append(
            score_direction(direction, sources, ["x" + extra, references[1]], references, seconds=1)
        )
    ScoreTable("demo", 100, "test", 5, 1.0, tuple(scores)).write(run / "scores.json")
    (run / "routing.json").write_text(
        json.dumps({"layers": [routing_layer("decoder"), routing_layer("encoder")]}), encoding="utf-8"
    )
    conversion = {
        "direction": "en-de",
        "sparse_parameters": 21_900_000,
        "dense_parameters": 9_876_543,
        "largest_logit_difference": 2e-6,
    }
    conversion |= {
        "same_translations": 99,
        "sentences": 100,
        "dense_bytes": 39_506_172,
        "seconds": 3,
        "dense_folder": "dense" + extra,
    }
    (run / "conversion.json").write_text(json.dumps(conversion), encoding="utf-8")
    (run / "timings.json").write_text(json.dumps({"train" + extra: 480.0, "evaluate": 65}), encoding="utf-8")
    return run


def routing_layer(side: str = "encoder", **changes: object) -> dict[str, object]:
    shares = {"de": [0.5, 0.3, 0.1, 0.1], "en": [0.1, 0.1, 0.4, 0.4], "he": [0.1, 0.4, 0.4, 0.1]}
    shares |= {"nl": [0.4, 0.5, 0.05, 0.05], "ru": [0.25, 0.25, 0.25, 0.25]}
    layer = {"side": side, "layer": 1, "experts": 4, "top_k": 2, "routing": "task", "task": "target"}
    return layer | {"tasks": list(shares), "shares": list(shares.values())} | changes


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
        ("routing.json", json.dumps({"layers": [routing_layer(tasks=["de"])]}), "one row a task"),
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

"""Invent a run folder, and read pages that are made of it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import english_centric
from lsmoe_ds.evaluation.direction_scores import score_direction
from lsmoe_ds.evaluation.scores import ScoreTable

HOSTILE = (
    "<script>alert('x')</script>\"><img src=x onerror=1>&amp;\u202e\x00{{ 7*7 }} https://evil.example/x.js"
)
VOID = {"meta", "img", "br", "link", "input", "hr"}
LINES = {
    "de": ["Seite", "Zeige die Änderungen"],
    "ru": ["Страница", "Показать изменения"],
    "he": ["דף", "MediaWiki הצג שינויים"],
}
LINES |= {"en": ["Page", "Show changes"], "nl": ["Pagina", "Wijzigingen tonen"]}


class Page(HTMLParser):
    """Check that tags are balanced; collect tags, attributes and text."""

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
        """Tell whether no tag or style makes a browser ask for anything, or run anything."""
        loads = {"src", "href", "srcset", "action", "data", "xlink:href"}
        active = {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
        for tag, attributes in self.tags:
            if tag in active or loads & set(attributes) or any(name.startswith("on") for name in attributes):
                return False
        styles = "".join(re.findall(r"<style>(.*?)</style>", self.source, re.S))
        return "url(" not in styles and "@import" not in styles


def make_run(folder: Path, *, extra: str = "") -> Path:
    """Make a run folder with every file; ``extra`` is put into all text that comes from data."""
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

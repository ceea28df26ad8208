"""Draw prepared data: pairs dropped by cleaning, lengths of sentences, and the amount of text by direction.

``lsmoe data show RECIPE --out DIR`` writes ``data.json``, ``data.csv`` (a row for each direction and split),
``cleaning.csv`` (pairs of each bitext by their fate), a picture of each grid, ``index.html`` and
``summary.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from lsmoe_ds.analysis.command import SUMMARY, check_out, write_csv
from lsmoe_ds.analysis.grids import draw_grid
from lsmoe_ds.analysis.heat_map import as_file
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.formats import SPLITS
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.summary import Summary, show
from lsmoe_ds.directions import Direction
from lsmoe_ds.folders import locked, replaced, write_json
from lsmoe_ds.languages import language_name
from lsmoe_ds.methods.findings import Grid
from lsmoe_ds.pages import open_template

FORMAT = "lsmoe_ds data"
EDGES = (4, 8, 16, 32, 64, 128)  # upper bounds of the columns' lengths, in tokens; the last column has none
SAMPLE = 1_000_000  # sentences of a side whose lengths are counted


def write_page(recipe: Recipe, out: str | Path) -> Summary:
    """Write the folder completely or not at all, replacing an earlier one; return the summary.

    Raises UserError if the data are not prepared, and if ``out`` holds files that were not written here.
    """
    out = Path(out)
    check_out(out, FORMAT)
    summary, data = show(recipe), PreparedData.of(recipe)
    pictures = [(grid, draw_grid(grid)) for grid in (*_cleaning(summary.cleaning), *_lengths(data))]
    with locked(out.resolve()), replaced(out.resolve()) as new:
        page = open_template("lsmoe_ds.analysis", "prepared.html")
        text = page.render(
            name=recipe.name,
            summary=summary,
            directions=list(_directions(summary)),
            alone=all(Direction.parse(row.direction).alone for row in summary.rows),
            pictures=pictures,
        )
        (new / "index.html").write_text(text, encoding="utf-8")
        for grid, picture in pictures:
            (new / f"{grid.name}.svg").write_text(as_file(Markup(picture)), encoding="utf-8")
        everything = {**summary.to_dict(), "grids": [vars(grid) for grid, _ in pictures]}
        (new / "data.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        rows = [asdict(row) for row in summary.rows]
        write_csv(new / "data.csv", rows[0], ([*row.values()] for row in rows))
        reasons = ["read", *_reasons(summary.cleaning)]
        counts = (
            [name, *(found.get(each, 0) for each in reasons)] for name, found in _read(summary.cleaning)
        )
        write_csv(new / "cleaning.csv", ["bitext", *reasons], counts)
        files = sorted(path.name for path in new.iterdir())
        write_json(new / SUMMARY, {"format": FORMAT, "name": recipe.name, "files": files})
    return summary


def _read(cleaning: Mapping[str, Mapping[str, int]]) -> list[tuple[str, Mapping[str, int]]]:
    """Return the bitexts whose text was read; others are joined from them (``data.pivot``) or zero-shot."""
    return [(name, found) for name, found in cleaning.items() if found.get("read")]


def _reasons(cleaning: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return why pairs were left out, the most frequent reason first."""
    total: dict[str, int] = {}
    for _, found in _read(cleaning):
        for name, count in found.items():
            total[name] = total.get(name, 0) + count
    return sorted(
        (name for name, count in total.items() if name != "read" and count), key=lambda n: -total[n]
    )


def _cleaning(cleaning: Mapping[str, Mapping[str, int]]) -> Iterator[Grid]:
    """Yield the grid of bitexts and reasons, unless nothing was left out."""
    reasons, read = _reasons(cleaning), _read(cleaning)
    if reasons:
        yield Grid(
            "cleaning",
            "What was left out",
            "The share of the pairs of a bitext that were read and are not trained on, by the first rule "
            "that a pair breaks. Held out: a side is, or nearly is, a sentence of the dev or test set.",
            [name for name, _ in read],
            reasons,
            [[found.get(each, 0) / found["read"] for each in reasons] for _, found in read],
        )


def _lengths(data: PreparedData) -> Iterator[Grid]:
    """Yield the grid of languages and lengths of their training sentences."""
    rows: dict[str, Any] = {}
    for direction in data.languages.directions:
        pairs = data.tokens(direction, "train")
        lengths = pairs.source.lengths[: min(SAMPLE, len(pairs))]
        places = np.searchsorted(EDGES, lengths)
        counts = np.bincount(places, minlength=len(EDGES) + 1)
        rows[direction.source] = rows.get(direction.source, 0) + counts
    rows = {code: counts for code, counts in rows.items() if counts.sum()}
    if rows:
        used = [column for column in range(len(EDGES) + 1) if any(counts[column] for counts in rows.values())]
        columns = _columns()
        yield Grid(
            "lengths",
            "How long sentences are",
            "The share of a language's training sentences, as sources, with so many tokens.",
            [language_name(code) for code in rows],
            [columns[column] for column in used],
            [[float(counts[column] / counts.sum()) for column in used] for counts in rows.values()],
        )


def _columns() -> Sequence[str]:
    starts = (0, *EDGES)
    return [f"{start + 1}-{end}" for start, end in zip(starts, EDGES, strict=False)] + [f"over {EDGES[-1]}"]


def _directions(summary: Summary) -> Iterator[dict[str, Any]]:
    """Yield the cells of each direction's line; ``bar`` is its share of the pairs of the largest."""
    rows = {(row.direction, row.split): row for row in summary.rows}
    train = [row for row in summary.rows if row.split == "train"]
    most = max(row.pairs for row in train)
    for row in train:
        direction = Direction.parse(row.direction)
        yield {
            "label": direction.label,
            "title": f"{language_name(direction.source)} to {language_name(direction.target)}",
            "row": row,
            "pairs": [rows[row.direction, split].pairs for split in SPLITS],
            "bar": row.pairs / max(1, most),
        }

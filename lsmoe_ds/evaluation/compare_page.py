"""Render a comparison of systems as one self-contained page: differences, intervals and all numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lsmoe_ds.analysis.plots import Scale, number
from lsmoe_ds.evaluation.compare import Comparison, Found
from lsmoe_ds.evaluation.metrics import METRICS
from lsmoe_ds.evaluation.significance import TRIALS
from lsmoe_ds.folders import check_can_write, write_whole
from lsmoe_ds.pages import open_template


def check_place(out: Path) -> None:
    """Raise UserError unless a page can be written there."""
    check_can_write(out.absolute().parent, "choose another file with --out", make=False)


def write_page(comparison: Comparison, out: Path) -> None:
    """Write the page, completely or not at all."""
    write_whole(out, render_page(comparison))


def render_page(comparison: Comparison) -> str:
    """Render the page. The template escapes everything that comes from data."""
    rows = comparison.rows
    return open_template("lsmoe_ds.evaluation", "compare.html", number=number).render(
        comparison=comparison,
        labels=comparison.labels,
        rows=rows,
        metrics=METRICS,
        scales={metric: Scale.of(_ends(rows, metric)) for metric in METRICS},
        trials=TRIALS * comparison.samples,
    )


def _ends(rows: list[tuple[str, Found]], metric: str) -> Iterator[float]:
    """Yield the differences of a metric and the ends of their intervals."""
    for _, found in rows:
        for outcome in found[metric][1:]:
            yield from (
                value for value in (outcome.low, outcome.high, outcome.difference) if value is not None
            )

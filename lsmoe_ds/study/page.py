"""Render the comparison as one self-contained page."""

from __future__ import annotations

from lsmoe_ds.analysis.plots import Scale, number
from lsmoe_ds.analysis.routing import task_name
from lsmoe_ds.pages import open_template
from lsmoe_ds.study.table import Comparison


def render_page(comparison: Comparison) -> str:
    """Return the page as text. The template escapes everything that comes from data."""
    rows = comparison.rows
    compared = [row for row in rows if not row.is_baseline]
    of_baseline = next((list(row.gain_by_seed.values()) for row in rows if row.is_baseline), [])
    largest = max((abs(gain) for row in rows for gain in row.gain_by_direction.values()), default=0.0)
    return open_template("lsmoe_ds.study", "page.html", number=number, direction_name=task_name).render(
        comparison=comparison,
        grids=comparison.grids(),
        rows=rows,
        compared=compared,
        directions=comparison.directions,
        scale=Scale.of(gain for row in rows for gain in row.gain_by_seed.values()),
        range=(min(of_baseline), max(of_baseline)) if len(of_baseline) > 1 else None,
        largest=largest or 1.0,
    )

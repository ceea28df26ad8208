"""Render the comparison as one self-contained page."""

from __future__ import annotations

from markupsafe import Markup

from lsmoe_ds.analysis.curves import draw_curve
from lsmoe_ds.analysis.plots import Scale, number
from lsmoe_ds.analysis.routing import task_name
from lsmoe_ds.methods.findings import Curve
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
        picture=draw_picture(comparison),
    )


def draw_picture(comparison: Comparison) -> Markup | None:
    """Draw each row's score against the parameters that serve one direction.

    None if all rows have the same number of parameters.
    """
    main, unit = comparison.scoring.main, comparison.scoring.unit
    points = [
        (row.costs.serving_one / 1e6, row.groups["all"][main].mean, row.title)
        for row in comparison.rows
        if len(row.directions) == len(comparison.directions) > 0  # the mean of some is another question
    ]
    if len({x for x, _, _ in points}) < 2:
        return None
    title = f"{comparison.main} against the parameters that serve one {unit}"
    x = f"million parameters that serve one {unit}"
    y = f"{comparison.main}, mean of all {unit}s"
    return draw_curve(Curve("study", title, "", x, y, points, joined=False))

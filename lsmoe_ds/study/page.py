"""The comparison as one page that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from lsmoe_ds.analysis.routing import task_name
from lsmoe_ds.evaluation.plots import number, ticks
from lsmoe_ds.study.table import Comparison, Row


@dataclass(frozen=True)
class Scale:
    """The axis of the gains; :meth:`at` is a place on it, in percent from the left."""

    ticks: list[float]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Scale:
        values = [0.0, *(gain for row in rows for gain in row.gain_by_seed.values())]
        return cls(ticks(min(values), max(values)))

    def at(self, value: float) -> float:
        return 100 * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def render_page(comparison: Comparison) -> str:
    """Return the page as text. Everything that comes from data is escaped by the template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lsmoe_ds.study", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "direction_name": task_name}
    rows = comparison.rows
    compared = [row for row in rows if not row.is_baseline]
    of_baseline = next((list(row.gain_by_seed.values()) for row in rows if row.is_baseline), [])
    largest = max((abs(gain) for row in rows for gain in row.gain_by_direction.values()), default=0.0)
    return environment.get_template("page.html").render(
        comparison=comparison,
        grids=comparison.grids(),
        rows=rows,
        compared=compared,
        directions=list(comparison.copy_by_direction),
        scale=Scale.of(rows),
        range=(min(of_baseline), max(of_baseline)) if len(of_baseline) > 1 else None,
        largest=largest or 1.0,
    )

"""The comparison of systems as one page that needs nothing beside itself: differences with their intervals,
and all numbers."""

from __future__ import annotations

from dataclasses import dataclass

import jinja2

from lsmoe_ds.evaluation.compare import Comparison, Found
from lsmoe_ds.evaluation.metrics import METRICS
from lsmoe_ds.evaluation.plots import number, ticks
from lsmoe_ds.evaluation.significance import TRIALS


@dataclass(frozen=True)
class Scale:
    """The axis of the differences of one metric; :meth:`at` is a place on it, in percent from the left."""

    ticks: list[float]

    @classmethod
    def of(cls, rows: list[tuple[str, Found]], metric: str) -> Scale:
        outcomes = [outcome for _, found in rows for outcome in found[metric][1:]]
        ends = [value for each in outcomes for value in (each.low, each.high, each.difference) if value is not None]
        return cls(ticks(min(0.0, *ends), max(0.0, *ends)))

    def at(self, value: float) -> float:
        return 100 * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def render_page(comparison: Comparison) -> str:
    """Render the page. Everything that comes from data is escaped by the template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lsmoe_ds.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    rows = comparison.rows
    return environment.get_template("compare.html").render(
        comparison=comparison,
        labels=comparison.labels,
        rows=rows,
        metrics=METRICS,
        scales={metric: Scale.of(rows, metric) for metric in METRICS},
        trials=TRIALS * comparison.samples,
    )

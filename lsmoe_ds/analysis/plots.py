"""Draw curves as inline SVG that stretches with the page.

Lines are in the SVG and labels in HTML, so that text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One curve of finite (x, y) points.

    ``kind`` is a line, a faint thin line behind others, a thin line with dots (dev, and dev by the shared
    route), or a dashed line that marks another curve's target.
    """

    points: Points
    kind: Literal["line", "faint", "dev", "dev wide", "shared", "aim"] = "line"


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """Average each point with the ``window`` points before and after it.

    Near the ends the window is smaller, but equal on both sides, so that the curve does not lag.
    """
    total = [0.0]
    for _, y in points:
        total.append(total[-1] + y)
    smoothed = []
    for index, (x, _) in enumerate(points):
        reach = min(window, index, len(points) - 1 - index)
        smoothed.append((x, (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)))
    return smoothed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers, from ``low`` or below to ``high`` or above."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Scale:
    """An axis for differences, which includes 0."""

    ticks: list[float]

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        """Make the axis that shows all values."""
        found = [0.0, *values]
        return cls(ticks(min(found), max(found)))

    def at(self, value: float) -> float:
        """Return the position of a value, in percent from the left."""
        return 100 * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def thin(points: Points, most: int = 800) -> Points:
    """Return at most ``most`` of the points, evenly spread, including the last."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def line_chart(series: Sequence[Series], description: str, tall: bool = True) -> Markup:
    """Draw a chart of at least one point; the x axis is the training step."""
    everything = [point for one in series for point in one.points]
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    x_ticks, y_ticks = ticks(0, max(xs)), ticks(min(ys), max(ys), 5 if tall else 2)
    x_high, y_low, y_high = max(max(xs), 1.0), y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return 1000 * x / x_high, 1000 * (y_high - y) / (y_high - y_low)

    marks: list[Markup] = []
    for tick in y_ticks:
        y = place(0, tick)[1]
        marks.append(Markup('<path class="grid" d="M0 {:.1f}H1000"/>').format(y))
    for one in series:
        placed = [place(x, y) for x, y in thin(one.points)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        marks.append(Markup('<path class="{}" d="{}"/>').format(one.kind, path))
        if one.kind in (
            "dev",
            "dev wide",
            "shared",
        ):  # a line of zero length with round ends is a dot that stays round when the drawing is stretched
            dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in placed)
            marks.append(Markup('<path class="{} dots" d="{}"/>').format(one.kind, dots))
    label = Markup('<span class="{}" style="{}:{:.2f}%">{}</span>')
    labels = [label.format("y", "top", place(0, tick)[1] / 10, number(tick)) for tick in y_ticks]
    labels += [
        label.format("x", "left", place(tick, 0)[0] / 10, number(tick)) for tick in x_ticks if tick <= x_high
    ]
    svg = Markup(
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(Markup("").join(marks))
    chart = Markup('<div class="chart{}" role="img" aria-label="{}">{}{}</div>')
    return chart.format("" if tall else " low", description, svg, Markup("").join(labels))


def number(value: float) -> str:
    """Format a number in a short, readable form: ``12,500``, ``0.75``, ``1.5e-4``."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"

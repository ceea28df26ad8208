"""Draw points along a line as an SVG picture."""

from __future__ import annotations

from markupsafe import Markup

from lsmoe_ds.analysis.plots import number, ticks
from lsmoe_ds.methods.findings import Curve

STYLE = """
.curve text{font:12px system-ui,sans-serif;fill:#1d2329;fill:var(--text,#1d2329)}
.curve .quiet{fill:#5c6670;fill:var(--quiet,#5c6670)}
.curve .middle{text-anchor:middle}
.curve .end{text-anchor:end}
.curve .rule{stroke:#dde2e7;stroke:var(--rule,#dde2e7)}
.curve .line{fill:none;stroke:#0072b2;stroke:var(--model,#0072b2);stroke-width:2}
.curve circle{fill:#0072b2;fill:var(--model,#0072b2)}
"""
WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 52, 40, 30, 44


def draw_curve(curve: Curve) -> Markup:
    """Return an SVG element with a dot and a label for each point; the x axis begins at 0."""
    xs, ys = [x for x, _, _ in curve.points], [y for _, y, _ in curve.points]
    x_ticks, y_ticks = ticks(0, max(xs)), ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right, low = x_ticks[-1], y_ticks[0]
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * x / right,
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (y_ticks[-1] - low),
        )

    text = Markup('<text class="{}" x="{:.0f}" y="{:.0f}">{}</text>')
    rule = Markup('<path class="rule" d="M{} {:.1f}H{}"/>')
    parts = [text.format("quiet", 4, 14, curve.y)]
    for tick in y_ticks:
        _, y = place(0, tick)
        parts += [
            rule.format(LEFT, y, WIDTH - RIGHT),
            text.format("quiet end", LEFT - 6, y + 4, number(tick)),
        ]
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(text.format("quiet middle", x, HEIGHT - BOTTOM + 18, number(tick)))
    parts.append(text.format("quiet middle", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, curve.x))
    placed = [(*place(x, y), label) for x, y, label in curve.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in placed)
    parts.append(Markup('<path class="line" d="{}"/>').format(path))
    for x, y, label in placed:
        parts.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4"/>').format(x, y))
        parts.append(text.format("middle", x, y - 9, label))
    svg = Markup(
        '<svg class="curve" role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">'
        "<style>{}</style>{}</svg>"
    )
    sizes = (WIDTH, HEIGHT, WIDTH, HEIGHT)
    return svg.format(curve.title, *sizes, Markup(STYLE), Markup("").join(parts))

"""Draw points, along a line or each by itself, as an SVG picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
.curve .lead{fill:none;stroke:#5c6670;stroke:var(--quiet,#5c6670);stroke-width:0.7}
.curve circle{fill:#0072b2;fill:var(--model,#0072b2)}
"""
WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 52, 40, 30, 44
TEXT = Markup('<text class="{}" x="{:.0f}" y="{:.0f}">{}</text>')
LETTER, LINE = 6.2, 13  # about the width of a letter, and the height of a line


def draw_curve(curve: Curve) -> Markup:
    """Return an SVG element with a dot and a label for each of at least one point; the x axis begins at 0."""
    xs, ys = [x for x, _, _ in curve.points], [y for _, y, _ in curve.points]
    x_ticks, y_ticks = ticks(0, max(xs)), ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right, low = x_ticks[-1], y_ticks[0]
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * x / right,
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (y_ticks[-1] - low),
        )

    rule = Markup('<path class="rule" d="M{} {:.1f}H{}"/>')
    parts = [TEXT.format("quiet", 4, 14, curve.y)]
    for tick in y_ticks:
        _, y = place(0, tick)
        parts += [
            rule.format(LEFT, y, WIDTH - RIGHT),
            TEXT.format("quiet end", LEFT - 6, y + 4, number(tick)),
        ]
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(TEXT.format("quiet middle", x, HEIGHT - BOTTOM + 18, number(tick)))
    parts.append(TEXT.format("quiet middle", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, curve.x))
    placed = [(*place(x, y), label) for x, y, label in curve.points]
    if curve.joined:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in placed)
        parts.append(Markup('<path class="line" d="{}"/>').format(path))
        parts += [TEXT.format("middle", x, y - 9, label) for x, y, label in placed]
    else:
        parts += _beside(placed)
    parts += [Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4"/>').format(x, y) for x, y, _ in placed]
    svg = Markup(
        '<svg class="curve" role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">'
        "<style>{}</style>{}</svg>"
    )
    sizes = (WIDTH, HEIGHT, WIDTH, HEIGHT)
    return svg.format(curve.title, *sizes, Markup(STYLE), Markup("").join(parts))


def _beside(placed: Sequence[tuple[float, float, str]]) -> Iterator[Markup]:
    """Yield labels to the right or left of their points; a label that would cover another is moved down and
    connected by a line.
    """
    taken: list[tuple[float, float, float]] = []  # left, right, y

    def move(left: float, right: float, at: float) -> float:
        while any(abs(at - other) < LINE and left < end and start < right for start, end, other in taken):
            at += 1
        return at

    for x, y, label in sorted(placed, key=lambda each: each[1]):
        long = LETTER * len(label)
        lefts = {1: x + 8, -1: x - 8 - long}
        fits = [side for side, left in lefts.items() if left >= LEFT and left + long <= WIDTH] or [1]
        found = [(move(lefts[side], lefts[side] + long, y + 4), -side) for side in fits]
        at, side = min(found)[0], -min(found)[1]
        taken.append((lefts[side], lefts[side] + long, at))
        if at > y + 4 + LINE / 2:
            lead = Markup('<path class="lead" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>')
            yield lead.format(x, y, x + 7 * side, at - 4)
        yield TEXT.format("end" if side < 0 else "", x + 8 * side, at, label)

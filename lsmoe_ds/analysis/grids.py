"""Draw a grid of numbers as an SVG picture."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from lsmoe_ds.methods.findings import Grid

STYLE = """
.grid text{font:12px system-ui,sans-serif;fill:#1d2329;fill:var(--text,#1d2329)}
.grid .quiet{fill:#5c6670;fill:var(--quiet,#5c6670)}
.grid .n{text-anchor:middle;font-size:11px}
.grid .half{fill:#10151a}
.grid .over{fill:#fff;fill:var(--over,#fff)}
.grid .more{fill:#0072b2;fill:var(--model,#0072b2)}
.grid .less{fill:#d55e00;fill:var(--other,#d55e00)}
"""
LETTER = 6.6  # the largest average width of a letter in the usual system fonts
WIDTH, HEIGHT = 52, 24
LEGEND = 24  # the height of the line below a grid
SMALL = 16  # width and height of a cell without a number
COLUMNS = 20  # a grid with more columns has small cells


def draw_grid(grid: Grid) -> Markup:
    """Return an SVG element with a row for each of the grid's rows, and a color for each number.

    Cells show their numbers, unless there are many columns. Below a signed grid are its unit and scale.
    """
    small = len(grid.columns) > COLUMNS
    cell_width, cell_height = (SMALL, SMALL) if small else (WIDTH, HEIGHT)
    left = 10 + max(LETTER * len(name) for name in grid.rows)
    longest = max(len(name) for name in grid.columns)
    turned = LETTER * longest > cell_width - 4
    top = 20 + (LETTER * longest * 0.75 if turned else 0)
    width = left + cell_width * len(grid.columns) + (LETTER * longest * 0.7 if turned else 4)
    bottom = top + cell_height * len(grid.rows)
    height = bottom + (LEGEND if grid.signed else 4)
    full = _full(grid)
    parts = [*_heads(grid, left, top, turned, cell_width), *_cells(grid, left, top, small, full)]
    if grid.signed:
        legend = f"percentage points; colors are full at ±{100 * full:.0f}"
        width = max(width, 10 + LETTER * len(legend))
        parts.append(
            Markup('<text class="quiet" x="0" y="{:.0f}">{}</text>').format(bottom + LEGEND - 6, legend)
        )
    svg = Markup(
        '<svg class="grid" role="img" aria-label="{}" width="{:.0f}" height="{:.0f}" '
        'viewBox="0 0 {:.0f} {:.0f}"><style>{}</style>{}</svg>'
    )
    sizes = (width, height, width, height)
    return svg.format(grid.title, *sizes, Markup(STYLE), Markup("").join(parts))


def _heads(grid: Grid, left: float, top: float, turned: bool, width: int) -> Iterator[Markup]:
    for number, name in enumerate(grid.columns):
        x = left + width * (number + 0.5)
        if turned:
            text = Markup('<text class="quiet" transform="translate({:.0f},{:.0f}) rotate(-45)">{}</text>')
            yield text.format(x, top - 6, name)
        else:
            yield Markup('<text class="quiet n" x="{:.0f}" y="{:.0f}">{}</text>').format(x, top - 6, name)


def _full(grid: Grid) -> float:
    """Return the distance from the middle at which a value has full color."""
    far = (abs(v - grid.middle) for row in grid.values for v in row if v is not None)
    return grid.full or max(far, default=0.0) or 1.0


def _points(value: float) -> str:
    """Write a share in percentage points, with a sign unless it rounds to 0."""
    return f"{100 * value:+.0f}" if abs(value) >= 0.005 else "0"


def _cells(grid: Grid, left: float, top: float, small: bool, full: float) -> Iterator[Markup]:
    width, height = (SMALL, SMALL) if small else (WIDTH, HEIGHT)
    for i, (name, row) in enumerate(zip(grid.rows, grid.values, strict=True)):
        y = top + height * i
        baseline = y + (12 if small else 16)
        yield Markup('<text x="0" y="{:.0f}">{}</text>').format(baseline, name)
        for j, value in enumerate(row):
            if value is None:
                continue
            strength, x = _strength(grid, abs(value - grid.middle), full), left + width * j
            number = _points(value) if grid.signed else f"{value:.2f}"
            title = f"{name}, {grid.columns[j]}: {f'{value:+.1%}' if grid.signed else number}"
            cell = Markup(
                '<rect class="{}" x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="2" '
                'fill-opacity="{:.2f}"><title>{}</title></rect>'
            )
            side = "less" if value < grid.middle else "more"
            yield cell.format(side, x + 1, y + 1, width - 2, height - 2, 0.04 + 0.96 * strength, title)
            if small:
                continue
            ink = "n over" if strength > 0.8 else "n half" if strength > 0.55 else "n"
            text = Markup('<text class="{}" x="{:.0f}" y="{:.0f}">{}</text>')
            yield text.format(ink, x + width / 2, baseline, number)


def _strength(grid: Grid, value: float, full: float) -> float:
    """Return the strength of a color, from 0 to 1."""
    return (value - grid.low) / (full - grid.low) if full > grid.low else 1.0

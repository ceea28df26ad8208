"""Draw the shares of a layer as an SVG picture, with a row for each task and a column for each expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lsmoe_ds.analysis.routing import LayerRouting, task_family, task_name, task_section

# Larger maps have low rows without numbers, and cells of a row are grouped by color: a map of 204 tasks and
# 128 experts must fit on a page, and drawing its 26,112 cells one by one would take megabytes.
MOST_TASKS, MOST_CELLS = 60, 4000
STEPS = 20
NAMED = 5  # experts that the title of a low row names
# Colors come from custom properties, which a page can set for light and dark; otherwise the fallbacks apply.
STYLE = """
.heat text{font:12px system-ui,sans-serif;fill:#1d2329;fill:var(--text,#1d2329)}
.heat .quiet{fill:#5c6670;fill:var(--quiet,#5c6670)}
.heat .family{font-size:11px}
.heat .section{font-weight:600}
.heat .low{font-size:10px}
.heat .n{text-anchor:middle;font-size:11px}
.heat .half{fill:#10151a}
.heat .over{fill:#fff;fill:var(--over,#fff)}
.heat rect,.heat path{fill:#0072b2;fill:var(--model,#0072b2)}
.heat .frame{fill:none;stroke:#1d2329;stroke:var(--text,#1d2329);stroke-width:1.5}
"""


@dataclass(frozen=True)
class Look:
    """Sizes in pixels. ``letter`` is the largest average width of a letter in the usual system fonts."""

    width: int
    height: int
    heading: int
    base: int  # the baseline of a row's text below the row's top
    letter: float
    numbers: bool  # whether shares are written as numbers

    @classmethod
    def of(cls, layer: LayerRouting) -> Look:
        narrow = 18 if layer.experts <= 32 else 7
        if is_large(layer):
            return cls(narrow, 13, 16, 10, 5.4, False)
        return cls(26 if layer.experts <= 16 else narrow, 24, 19, 16, 6.4, layer.experts <= 16)


def is_large(layer: LayerRouting) -> bool:
    return len(layer.tasks) > MOST_TASKS or len(layer.tasks) * layer.experts > MOST_CELLS


def largest_share(layers: Iterable[LayerRouting]) -> float:
    """Return the largest share of any task in any of the layers, so that maps on one page have one scale."""
    return max((share for layer in layers for row in layer.shares for share in row), default=0.0) or 1.0


def heat_map(layer: LayerRouting, full: float) -> Markup:
    """Draw a layer as an SVG element, with a row for each task and a column for each expert.

    Rows are grouped by section and family. A cell is darker the larger its share; ``full`` is the share in
    full color. If all tokens of a task use the same experts, these are framed. Shares are written in percent
    if there are at most 16 experts, and not too many tasks.
    """
    look, large = Look.of(layer), is_large(layer)
    names = [task_name(task) for task in layer.tasks]
    left = 6 + max((look.letter * len(name) for name in names), default=0)
    parts: list[Markup] = []
    for expert in range(layer.experts):
        if look.width > 20 or expert % 8 == 0 or (look.width > 7 and expert % 2 == 0):
            parts.append(_text(left + (expert + 0.5) * look.width, 13, expert + 1, "quiet n"))
    y = 20.0
    for index, headings in enumerate(_headings(layer.tasks)):
        for heading, kind in headings:
            parts.append(_text(0, y + look.heading - 4, heading, kind))
            y += look.heading
        parts.append(_text(0, y + look.base, names[index], "low" if large else ""))
        parts += (_low_row if large else _row)(layer, index, names[index], left, y, full, look)
        y += look.height
    total = (_n(left + layer.experts * look.width + 2), _n(y + 2))
    svg = Markup(
        '<svg class="heat" role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">{}{}</svg>'
    )
    style = Markup("<style>{}</style>").format(Markup(STYLE))
    return svg.format(f"Expert shares of {layer.title}", *total, *total, style, Markup("").join(parts))


def as_file(svg: Markup) -> str:
    """Return the element as the text of a separate file, on a white background."""
    opened, closed, rest = str(svg).partition("</style>")
    opened = opened.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f'{opened}{closed}<rect width="100%" height="100%" style="fill:#fff"/>{rest}\n'


def _headings(tasks: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Yield for each task the headings before it, with their classes.

    A heading that would cover all tasks is left out.
    """
    sections = [task_section(task)[1] for task in tasks]
    # "Indo-European, Slavic" is shown as its branch, "Niger-Congo, other" as a whole.
    families = [
        whole if whole.endswith(", other") else whole.split(", ")[-1] for whole in map(task_family, tasks)
    ]
    for index in range(len(tasks)):
        section = index == 0 or sections[index] != sections[index - 1]
        branch = section or families[index] != families[index - 1]
        found = [(sections[index], "section")] if section and len(set(sections)) > 1 else []
        yield found + ([(families[index], "quiet family")] if branch and len(set(families)) > 1 else [])


def _row(
    layer: LayerRouting, index: int, name: str, left: float, y: float, largest: float, look: Look
) -> Iterator[Markup]:
    """Yield a rectangle for each cell, with a title, and a frame around each chosen one."""
    chosen = layer.chosen(index) if layer.by_task else frozenset()
    size = look.width - 2, look.height - 2
    for expert, share in enumerate(layer.shares[index]):
        x, strength = left + expert * look.width, share / largest
        title = f"{name}, expert {expert + 1}: {share:.1%}" + (", chosen" if expert in chosen else "")
        cell = Markup(
            '<rect x="{}" y="{}" width="{}" height="{}" rx="2" fill-opacity="{}"><title>{}</title></rect>'
        )
        yield cell.format(_n(x + 1), _n(y + 1), *size, _n(0.04 + 0.96 * strength), title)
        if look.numbers:
            yield _text(x + look.width / 2, y + look.base, f"{100 * share:.0f}", _ink(strength))
    for expert in sorted(chosen):
        frame = Markup('<rect class="frame" x="{}" y="{}" width="{}" height="{}" rx="3"/>')
        yield frame.format(_n(left + expert * look.width + 1), _n(y + 1), *size)


def _low_row(
    layer: LayerRouting, index: int, name: str, left: float, y: float, largest: float, look: Look
) -> Iterator[Markup]:
    """Yield the cells of each step of color as one path, over one pale rectangle.

    The row's title names the experts with the largest shares.
    """
    row, chosen = layer.shares[index], layer.chosen(index) if layer.by_task else frozenset()
    steps: dict[int, list[int]] = {}
    for expert, share in enumerate(row):
        steps.setdefault(round(STEPS * share / largest), []).append(expert)
    best = sorted(range(layer.experts), key=lambda expert: (-row[expert], expert))[:NAMED]
    title = f"{name}: " + ", ".join(f"expert {expert + 1} {row[expert]:.1%}" for expert in best)
    yield Markup("<g><title>{}</title>").format(title)
    ground = Markup('<rect x="{}" y="{}" width="{}" height="{}" fill-opacity="0.04"/>')
    yield ground.format(_n(left), _n(y), layer.experts * look.width, look.height - 1)
    for step, experts in sorted(steps.items()):
        if step:
            yield Markup('<path fill-opacity="{}" d="{}"/>').format(
                _n(step / STEPS), _cells(experts, left, y, look)
            )
    if chosen:
        yield Markup('<path class="frame" d="{}"/>').format(_cells(sorted(chosen), left, y, look))
    yield Markup("</g>")


def _cells(experts: Sequence[int], left: float, y: float, look: Look) -> str:
    """Return a path of one rectangle for each expert."""
    width, height = look.width - 1, look.height - 1
    return "".join(
        f"M{_n(left + expert * look.width)} {_n(y)}h{width}v{height}h-{width}z" for expert in experts
    )


def _ink(strength: float) -> str:
    """Return the class of a number on a cell, so that it is legible on pale, medium and full color."""
    return "n over" if strength > 0.8 else "n half" if strength > 0.55 else "n"


def _text(x: float, y: float, content: object, classes: str) -> Markup:
    return Markup('<text x="{}" y="{}" class="{}">{}</text>').format(_n(x), _n(y), classes, content)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")

"""Render the analysis in words, as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from lsmoe_ds.analysis.heat_map import heat_map, largest_share
from lsmoe_ds.analysis.measures import LayerMeasures, measure_layer
from lsmoe_ds.analysis.routing import LayerRouting, Routing, task_name
from lsmoe_ds.notices import counted
from lsmoe_ds.pages import open_template

COLUMNS = {
    "Layer": "counted from 1",
    "Routing": "who chooses the experts",
    "Balance": "the largest share of all tokens times the number of experts: 1 is even",
    "Variation": "standard deviation of the experts' shares of all tokens over their mean: 0 is even",
    "Entropy": (
        "of the experts' shares of all tokens, in bits; in brackets as a share of the greatest possible"
    ),
    "Of a task": "entropy of the shares of a task, mean over tasks: the lower, the more focused",
    "Alike, one family": (
        "mean similarity of two tasks of the same family: the sum over experts of the smaller share; 1 is the"
        " same"
    ),
    "Other families": "mean similarity of two tasks of different families",
    "Unused": "experts that received nothing",
    "Dropped": "share of choices that were dropped because their expert was full",
}


def measures_table(layers: Sequence[LayerRouting]) -> Markup:
    """Return an HTML table with a row for each layer."""
    heads = [
        Markup('<th{} title="{}">{}</th>').format(_number(place), about, name)
        for place, (name, about) in enumerate(COLUMNS.items())
    ]
    rows = []
    for layer in layers:
        cells = [
            Markup("<td{}>{}</td>").format(_number(place), cell)
            for place, cell in enumerate(_cells(layer, measure_layer(layer)))
        ]
        rows.append(Markup("<tr>{}</tr>\n").format(Markup("").join(cells)))
    table = Markup('<table class="measures">\n<thead><tr>{}</tr></thead>\n<tbody>\n{}</tbody>\n</table>')
    return table.format(Markup("").join(heads), Markup("").join(rows))


def _number(place: int) -> Markup:
    return Markup(' class="n"') if place > 1 else Markup("")


def _cells(layer: LayerRouting, measures: LayerMeasures) -> list[str]:
    return [
        layer.title.capitalize(),
        (
            f"{layer.task} {layer.routing}"
            if layer.routing == "static"
            else f"by {layer.task}"
            if layer.by_task
            else f"by {layer.routing}"
        ),
        f"{measures.balance:.2f}",
        f"{measures.variation:.2f}",
        f"{measures.entropy:.2f} ({measures.relative_entropy:.0%})",
        (
            "–"
            if measures.task_entropy is None
            else f"{measures.task_entropy:.2f} ({measures.relative_task_entropy:.0%})"
        ),
        _share(measures.same_family),
        _share(measures.different_families),
        f"{len(measures.unused)} of {layer.experts}",
        "–" if layer.dropped is None else f"{layer.dropped:.1%}",
    ]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def reading(layer: LayerRouting) -> str | None:
    """Describe which tasks share experts; None if a layer does not choose experts for whole tasks."""
    if not layer.by_task:
        return None
    alike = "; ".join(", ".join(task_name(task) for task in tasks) for tasks in layer.alike())
    same, different = layer.overlap()
    verb = "Choose" if layer.routing == "task" else "Use"
    what = "expert" if layer.top_k == 1 else "set of experts"
    text = f"{verb} the same {what}: {alike}." if alike else f"No two tasks {verb.lower()} the same {what}."
    if same is not None and different is not None:
        of = f"of {counted(layer.top_k, 'expert')} on average"
        text += f" Two tasks of one family share {same:.2f} {of}, two of different families {different:.2f}."
    return text


def render_page(name: str, step: int, routing: Routing) -> str:
    """Return the self-contained page as text. The template escapes everything that comes from data."""
    full = largest_share(routing.layers)
    maps = [(layer, heat_map(layer, full), reading(layer)) for layer in routing.layers]
    measures = measures_table(routing.layers)
    page = open_template("lsmoe_ds.analysis", "page.html")
    return page.render(
        name=name, step=step, routing=routing, measures=measures, columns=COLUMNS, maps=maps, full=full
    )

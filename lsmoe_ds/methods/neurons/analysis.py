"""Measure how the units of directions overlap, between related directions and across layers ("Neuron
Specialization", section 3.2 and appendix A.5 and A.6).

D directions, F units of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds.directions import Direction, task_order
from lsmoe_ds.languages import family
from lsmoe_ds.methods.findings import Findings, Grid

TITLE = "Units that directions share"
DRAWN = 40  # most directions in a picture; if there are more, its rows are languages
QUANTILES = {"largest": 1.0, "upper quartile": 0.75, "median": 0.5, "lower quartile": 0.25, "smallest": 0.0}


def overlaps(masks: Tensor) -> Tensor:
    """Return the intersection over union of every two directions' units: masks [D, F] -> [D, D].

    The overlap of two directions that both use no unit is 1.
    """
    used = masks.double()
    both, sizes = used @ used.t(), used.sum(1)
    union = sizes[:, None] + sizes[None] - both
    return torch.where(union > 0, both / union.clamp(min=1), 1.0)


def are_related(one: Direction, other: Direction) -> bool:
    """Tell whether two directions share one language and their other languages are of one family."""
    if one.source == other.source:
        return family(one.target) == family(other.target)
    return one.target == other.target and family(one.source) == family(other.source)


def find_overlaps(directions: Sequence[Direction], masks: Mapping[str, Tensor], units: str) -> Findings:
    """Compare the masks [D, F] of each layer, keyed by a name such as ``encoder.0``.

    ``units`` says in words what the masks hold.
    """
    order = sorted(range(len(directions)), key=lambda i: task_order(str(directions[i])))
    ordered = [directions[i] for i in order]
    found = {name: overlaps(mask[order]) for name, mask in masks.items()}
    kept = {name: mask[order].double().mean(1) for name, mask in masks.items()}
    grids = [_spread(found, units), _kept(ordered, kept)]
    for side in ("encoder", "decoder"):
        own = [name for name in masks if name.startswith(side)]
        for name in dict.fromkeys([*own[:1], *own[-1:]]):
            grids.append(_picture(name, ordered, found[name]))
    return Findings(
        TITLE,
        _said(ordered, found),
        [
            {"side": _side(name), "layer": _layer(name), "direction": str(d), "kept": round(float(share), 6)}
            for name, shares in kept.items()
            for d, share in zip(ordered, shares, strict=True)
        ],
        grids,
        more={"overlaps": _pairs(ordered, found)},
    )


def _side(name: str) -> str:
    return name.split(".")[0]


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def _label(name: str) -> str:
    return f"{_side(name)} {_layer(name) + 1}"


def _pairs(directions: Sequence[Direction], found: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [
        {
            "side": _side(name),
            "layer": _layer(name),
            "direction": str(one),
            "other": str(directions[j]),
            "overlap": round(float(each[i, j]), 6),
        }
        for name, each in found.items()
        for i, one in enumerate(directions)
        for j in range(i + 1, len(directions))
    ]


def _of_pairs(each: Tensor) -> Tensor:
    """Return the overlaps of all pairs of different directions."""
    rows, columns = torch.triu_indices(len(each), len(each), 1)
    return each[rows, columns]


def _spread(found: Mapping[str, Tensor], units: str) -> Grid:
    values = [
        [float(_of_pairs(each).quantile(part)) if len(each) > 1 else None for each in found.values()]
        for part in QUANTILES.values()
    ]
    return Grid(
        "spread",
        "How much every two directions share, layer by layer",
        f"Intersection over union of {units}, of every two directions: 1 where they use the same ones.",
        list(QUANTILES),
        [_label(name) for name in found],
        values,
        full=1.0,
    )


def _kept(directions: Sequence[Direction], kept: Mapping[str, Tensor]) -> Grid:
    names, rows, about = _rows(directions, None)

    def share(shares: Tensor, own: list[int]) -> float | None:
        return float(shares[own].mean()) if own else None

    values = [[share(shares, rows(name, _side(layer))) for layer, shares in kept.items()] for name in names]
    return Grid(
        "kept",
        "How many of a layer's units a direction uses",
        f"The share of all units; what is left is how sparse the layer is for the direction.{about}",
        names,
        [_label(name) for name in kept],
        values,
        full=1.0,
    )


def _picture(layer: str, directions: Sequence[Direction], each: Tensor) -> Grid:
    """Draw the overlaps of one layer."""
    names, rows, about = _rows(directions, _side(layer))
    index = [rows(name, _side(layer)) for name in names]
    values = [[float(_mean(each, one, other)) for other in index] for one in index]
    return Grid(
        f"overlap-{_side(layer)}-{_layer(layer) + 1}",
        f"Overlap in {_label(layer)}",
        f"Related languages are neighbors.{about}",
        names,
        names,
        values,
        full=1.0,
        low=min(min(row) for row in values),
    )


def _rows(
    directions: Sequence[Direction], side: str | None
) -> tuple[list[str], Callable[[str, str], list[int]], str]:
    """Return a picture's row names, a function from (name, side) to direction numbers, and a description.

    If there are more than DRAWN directions, a row is a language: all directions from it in the encoder, or
    into it in the decoder.
    """
    if len(directions) <= DRAWN:
        names = [str(direction) for direction in directions]
        return names, lambda name, side: [names.index(name)], ""
    attributes = {"encoder": "source", "decoder": "target"}

    def of(name: str, side: str) -> list[int]:
        return [i for i, each in enumerate(directions) if getattr(each, attributes[side]) == name]

    codes = {code for each in directions for code in (each.source, each.target)}
    used = sorted(codes, key=task_order)
    if side is not None:
        used = [code for code in used if of(code, side)]
    return used, of, " A row is the mean over all directions from a language, in the decoder into it."


def _mean(each: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Return the mean overlap of different directions; 1 for one direction with itself."""
    part = each[list(rows)][:, list(columns)]
    different = torch.tensor([[i != j for j in columns] for i in rows])
    return part[different].mean() if different.any() else part.mean()


def _said(directions: Sequence[Direction], found: Mapping[str, Tensor]) -> str:
    """Summarize the paper's questions: how overlaps change over layers, and whether relatives share more."""
    if len(directions) < 2:
        return "one direction shares its units with none"
    medians = []
    for side in ("encoder", "decoder"):
        own = [float(_of_pairs(each).quantile(0.5)) for name, each in found.items() if _side(name) == side]
        if own:
            medians.append(f"from {own[0]:.2f} to {own[-1]:.2f} in the {side}")
    parts = [f"the median overlap goes {' and '.join(medians)}"] if medians else []
    last = next((name for name in reversed(list(found)) if _side(name) == "decoder"), None)
    rows, columns = torch.triu_indices(len(directions), len(directions), 1)
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    into = [(i, j) for i, j in pairs if directions[i].source == directions[j].source]
    related = [pair for pair in into if are_related(directions[pair[0]], directions[pair[1]])]
    others = [pair for pair in into if pair not in set(related)]
    if last is not None and related and others:
        means = [sum(float(found[last][i, j]) for i, j in each) / len(each) for each in (related, others)]
        parts.append(
            f"in {_label(last)} directions from one language into relatives share {means[0]:.2f}, into "
            f"others {means[1]:.2f}"
        )
    return "; ".join(parts)

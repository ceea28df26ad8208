"""The results of analyzing a trained model's weights: numbers for files, grids and curves for pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe


@dataclass(frozen=True)
class Grid:
    """A table of numbers that is drawn in colors; None is an empty cell.

    ``name`` is the name of its file. Colors go from ``low`` to ``full``, by default the largest value, both
    measured from ``middle``; values below ``middle`` are red. ``signed`` values are shares, drawn in
    percentage points with their color scale below the grid.
    """

    name: str
    title: str
    about: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    signed: bool = False
    full: float | None = None
    low: float = 0.0
    middle: float = 0.0


@dataclass(frozen=True)
class Curve:
    """Points (x, y, label), connected by a line if they are ``joined``; ``x`` and ``y`` name the axes."""

    name: str
    title: str
    about: str
    x: str
    y: str
    points: Sequence[tuple[float, float, str]]
    joined: bool = True


@dataclass(frozen=True)
class Findings:
    """What one analysis found.

    ``records`` are the rows of a CSV file, with the same keys in each. ``recipe`` is a recipe that the
    analysis suggests; ``said`` is its conclusion in one sentence. ``more`` has further tables by file name.
    """

    title: str
    said: str
    records: Sequence[Mapping[str, Any]]
    grids: Sequence[Grid | Curve]
    recipe: Recipe | None = None
    more: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

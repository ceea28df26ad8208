"""What a method finds in the weights of a trained model: numbers for files, grids and curves for pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe


@dataclass(frozen=True)
class Grid:
    """A table of numbers that is drawn in colors; None is an empty cell.

    ``name`` is that of its file. Colors go from ``low`` to ``full``, by default the largest value; those of
    values below ``middle`` are red, and both are distances from there. ``signed`` values are shares that are
    drawn in percentage points, with the scale of their colors below the grid.
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
    """Points (x, y, label) that are drawn along a line, or unless they are ``joined`` each by itself; ``x``
    and ``y`` name the axes.
    """

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

    ``records`` are the rows of a CSV file, with the same keys in each. ``recipe`` is one that the analysis
    suggests, ``said`` what it says in a sentence. ``more`` are further tables, by the names of their files.
    """

    title: str
    said: str
    records: Sequence[Mapping[str, Any]]
    grids: Sequence[Grid | Curve]
    recipe: Recipe | None = None
    more: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

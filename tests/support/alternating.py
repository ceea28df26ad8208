"""Half of the cases that a product of factors has."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any


def alternating(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return every second case of the product, as the black squares of a chessboard.

    Each value of a factor meets every second value of another one, or all of them if there is a third factor
    of at least two values.
    """
    values = [list(factor) for factor in factors]
    return [
        tuple(factor[place] for factor, place in zip(values, places, strict=True))
        for places in product(*(range(len(factor)) for factor in values))
        if sum(places) % 2 == 0
    ]

"""Measure a MoE layer's routing: how even its load, how focused a task, how similar related tasks are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.analysis.routing import LayerRouting

Shares = NDArray[np.float64]


@dataclass(frozen=True)
class LayerMeasures:
    """The measures of a layer with E experts, counted from 0.

    Entropies are in bits; relative ones are divided by log2 E.
    """

    load: tuple[float, ...]  # share of all tokens that each expert receives [E]
    balance: float  # the largest load times E: 1 is even, E means that one expert receives everything
    variation: float  # standard deviation of the load divided by its mean: 0 is even
    entropy: float  # of the load
    relative_entropy: float
    task_entropy: float | None  # of a task's shares, mean over tasks; None without tasks
    relative_task_entropy: float | None
    unused: tuple[int, ...]  # experts that receive nothing
    same_family: float | None  # mean similarity of two tasks of one family; None if there are no two
    different_families: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_layer(layer: LayerRouting) -> LayerMeasures:
    load = total_load(layer)
    most = math.log2(layer.experts)
    entropy = entropy_of(load)
    task_entropy = float(np.mean([entropy_of(row) for row in layer.shares])) if layer.tasks else None
    similar = similarity(layer)
    same, different = (
        _mean(similar[a, b] for a, b, kin in layer.kin() if kin is wanted) for wanted in (True, False)
    )
    return LayerMeasures(
        load=tuple(load.tolist()),
        balance=float(load.max() * layer.experts),
        variation=float(load.std() * layer.experts),
        entropy=entropy,
        relative_entropy=entropy / most if most else 1.0,
        task_entropy=task_entropy,
        relative_task_entropy=None if task_entropy is None else task_entropy / most if most else 1.0,
        unused=tuple(np.flatnonzero(load == 0).tolist()),
        same_family=same,
        different_families=different,
    )


def total_load(layer: LayerRouting) -> Shares:
    """Return the share of all tokens that each expert receives [E].

    If it was not measured, it is the mean over tasks, weighted by their tokens if these are known.
    """
    if layer.load is not None and any(layer.load):
        return np.array(layer.load, dtype=np.float64)
    if not layer.tasks:
        return np.zeros(layer.experts)
    tokens = layer.tokens if layer.tokens is not None and any(layer.tokens) else None
    return np.average(
        [layer.used(index) for index in range(len(layer.tasks))], axis=0, weights=tokens
    ).astype(np.float64)


def entropy_of(shares: Iterable[float]) -> float:
    """Return the entropy in bits of shares that sum to 1."""
    return -sum(share * math.log2(share) for share in shares if share > 0) + 0.0


def similarity(layer: LayerRouting) -> Shares:
    """Return the overlap of every two tasks' shares [tasks, tasks].

    It is the sum over experts of min(p_t(e), p_u(e)), which is 1 for equal shares.
    """
    shares = np.array(layer.shares, dtype=np.float64).reshape(len(layer.tasks), layer.experts)
    return np.array([np.minimum(row, shares).sum(axis=1) for row in shares]).reshape(
        len(layer.tasks), len(layer.tasks)
    )


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None

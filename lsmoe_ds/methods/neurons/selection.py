"""Choose the units of each direction, by how often they are active. D directions, F units of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lsmoe_ds.directions import Direction
from lsmoe_ds.methods.neurons.settings import kept_at_random


def most_active(counts: Tensor, share: float) -> Tensor:
    """Return masks [..., F] of the most active units that together have ``share`` percent of the activations.

    ``counts`` [..., F] has the activations of each unit. Units are chosen in descending order of activity
    (the first of equal ones first) until their sum reaches the share ("Neuron Specialization", equation 1).
    0 chooses no unit; 100 chooses all, even those that are never active.
    """
    if share >= 100:
        return torch.ones_like(counts, dtype=torch.bool)
    order = counts.argsort(dim=-1, descending=True, stable=True)
    sorted_counts = counts.gather(-1, order).double()
    before = sorted_counts.cumsum(-1) - sorted_counts
    taken = 100 * before < share * sorted_counts.sum(-1, keepdim=True)
    return torch.zeros_like(taken).scatter(-1, order, taken)


def at_random(directions: int, units: int, part: float, generator: torch.Generator) -> Tensor:
    """Return masks [D, F] that keep ``part`` of the units of each direction, at random."""
    kept = kept_at_random(units, part)
    order = torch.rand(directions, units, generator=generator).argsort(-1)
    return torch.zeros(directions, units, dtype=torch.bool).scatter(-1, order[:, :kept], True)


def relatives(
    directions: Sequence[Direction], known: Sequence[bool], named: Mapping[int, int]
) -> dict[int, int]:
    """Map each direction that copies another one's mask to that direction, both as numbers.

    A direction in ``named`` copies the mask that is named there. One that is not ``known`` copies the mask of
    the first known direction with the same target. Raises KeyError, with the number, if there is none.
    """
    found = dict(named)
    for number, direction in enumerate(directions):
        if not known[number] and number not in named:
            alike = (i for i, each in enumerate(directions) if known[i] and each.target == direction.target)
            found[number] = next(alike, number)
    for new, other in found.items():
        if not known[other]:
            raise KeyError(new)
    return found

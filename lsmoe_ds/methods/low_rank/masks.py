"""Masks of pruned matrices: 0 where a value is pruned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def smallest(values: Sequence[Tensor], masks: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """Prune tensors together: return masks in which ``round(ratio * n)`` of their n values are 0.

    Values that ``masks`` have already pruned are chosen first, then those of smallest magnitude; of equal
    ones the first.
    """
    sizes = [value.numel() for value in values]
    count = round(ratio * sum(sizes))
    found = torch.cat([value.detach().float().abs().flatten() for value in values])
    before = torch.cat([mask.flatten() for mask in masks])
    found[~before] = -1.0
    keep = before.clone()
    if count:
        limit = found.kthvalue(count).values
        keep &= found > limit
        alike = (found == limit).nonzero().flatten()
        keep[alike[count - int((found < limit).sum()) :]] = True
        keep &= before
    parts = keep.split(sizes)
    return [part.view_as(value) for part, value in zip(parts, values, strict=True)]


def is_untrained(values: Tensor, mask: Tensor) -> bool:
    """Tell whether a matrix is untrained: all its values are 0 and none is pruned."""
    return bool(mask.all()) and not bool(values.any())

"""Learning-rate schedules."""

from __future__ import annotations


def inverse_square_root(step: int, peak: float, warmup: int) -> float:
    """Return the learning rate of ``step``, counted from 1: linear up to ``peak`` at ``warmup``, then falling
    with 1/sqrt(step).

    "Attention is all you need", section 5.3, with the peak given instead of the model width.
    """
    if step < warmup:
        return peak * step / warmup
    return peak * (max(warmup, 1) / step) ** 0.5

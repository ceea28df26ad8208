"""Learning-rate schedules."""

from __future__ import annotations

import math

from lsmoe_ds.config.recipe import Schedule


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: Schedule) -> float:
    """Return the learning rate of ``step``, counted from 1: linear up to ``peak`` at ``warmup``, then down.

    - ``inverse_square_root``: peak * sqrt(warmup / step), as in "Attention is all you need", section 5.3,
      with the peak given instead of the model width.
    - ``linear``, ``cosine``: to 0 in the step after the last of ``steps``, along a line or half a cosine.
    """
    if step < warmup:
        return peak * step / warmup
    start = max(warmup, 1)
    if schedule == "inverse_square_root":
        return peak * (start / step) ** 0.5
    left = max(steps + 1 - step, 0) / (steps + 1 - start)
    return peak * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

"""The exponential moving average of the weights (``training.ema``)."""

from __future__ import annotations

from typing import Any

import torch

from lsmoe_ds.checkpoint.averages import EMA
from lsmoe_ds.parallel import deepspeed_engine


@torch.no_grad()
def update_ema(engine: Any, decay: float, number: int) -> None:
    """Update the average with the weights after step ``number``, counted from 1.

    With decay d it is a weighted mean of the weights w_s after each step s up to step t, without the initial
    weights::

        sum_s d^(t-s) w_s / sum_s d^(t-s)

    It is float32 and part of each parameter's optimizer state. So in any layout every rank averages the
    values that it steps, and the average is saved and resharded like Adam's moments.
    """
    newest = (1 - decay) / (1 - decay**number)
    averages, weights = [], []
    for holder, state in deepspeed_engine.optimizer_states(engine).items():
        values = state.get(deepspeed_engine.VALUES, holder).detach()
        if EMA in state:
            averages.append(state[EMA])
            weights.append(values.float())
        elif state:  # to an optimizer, a state that is not empty is initialized
            state[EMA] = values.to(torch.float32, copy=True)
    if averages:
        torch._foreach_lerp_(averages, weights, newest)

"""The exponential moving average of the weights that a training keeps beside them (``training.ema``)."""

from __future__ import annotations

from typing import Any

import torch

from lsmoe_ds.checkpoint.averages import EMA
from lsmoe_ds.parallel import deepspeed_engine


@torch.no_grad()
def update_ema(engine: Any, decay: float, number: int) -> None:
    """Take the weights after step ``number``, counted from 1, into their average.

    With decay d it is the mean of the weights after each step s up to step t; those before the first are no
    part of it::

        sum_s d^(t-s) w_s / sum_s d^(t-s)

    It is float32, and lies with the optimizer's state of each parameter: so every rank averages what it
    steps, in whatever layout, and saving and resharding treat it as they do Adam's moments.
    """
    newest = (1 - decay) / (1 - decay**number)
    averages, weights = [], []
    for holder, state in deepspeed_engine.optimizer_states(engine).items():
        values = state.get(deepspeed_engine.VALUES, holder).detach()
        if EMA in state:
            averages.append(state[EMA])
            weights.append(values.float())
        elif state:  # an optimizer takes a state that is not empty for one that it has begun
            state[EMA] = values.to(torch.float32, copy=True)
    if averages:
        torch._foreach_lerp_(averages, weights, newest)

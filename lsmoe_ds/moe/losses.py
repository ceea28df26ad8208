"""Auxiliary losses of routing, over the whole batch of a step.

Each micro-batch leaves a :class:`RoutingRecord` of sums. Only the counts of first choices have to be known over the whole
step before the first gradient (they have none themselves); all else is a sum over tokens. So the values and the
gradients do not depend on how the step was cut into micro-batches and ranks, nor on padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsmoe_ds.config.moe import MoE
from lsmoe_ds.moe.routers import DROPPED, Routes

NAME = "moe"  # of its notes


@dataclass
class RoutingRecord:
    """What one MoE layer did with one micro-batch of S tokens."""

    settings: MoE
    counts: Tensor  # [E] int64: tokens whose first choice is each expert, before any is dropped
    probabilities: Tensor  # [E]: sum over tokens; with gradient
    squares: Tensor  # scalar: sum over tokens of (log sum_e exp(logit_e))^2; with gradient
    dropped: Tensor  # scalar: choices that found their expert full
    choices: int  # S K


def count_first_choices(routes: Routes, experts: int) -> Tensor:
    """[E] int64."""
    return torch.bincount(routes.experts[:, 0], minlength=experts)


def record_routing(settings: MoE, chosen: Routes, kept: Routes) -> RoutingRecord:
    """``chosen`` before and ``kept`` after the capacity was applied."""
    return RoutingRecord(
        settings,
        count_first_choices(chosen, settings.experts),
        chosen.probabilities.sum(0),
        chosen.log_sums.square().sum(),
        (kept.experts == DROPPED).sum(),
        kept.experts.numel(),
    )


def balance_loss(record: RoutingRecord, counts: Tensor, tokens: int) -> Tensor:
    """This micro-batch's part of ``E sum_e f_e P_e`` (GShard, Switch): f the share of first choices, P the mean probability.

    ``counts`` [E] are those of the whole step, which has ``tokens`` tokens; the parts of all micro-batches sum to the loss.
    It is 1 when the choices are balanced.
    """
    return record.settings.experts * (counts / tokens * (record.probabilities / tokens)).sum()


def z_loss(record: RoutingRecord, tokens: int) -> Tensor:
    """This micro-batch's part of the mean over tokens of ``(log sum_e exp(logit_e))^2`` (ST-MoE, equation 5)."""
    return record.squares / tokens

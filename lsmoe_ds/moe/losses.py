"""Auxiliary routing losses over the whole batch of a step.

Each micro-batch records sums in a :class:`RoutingRecord`. Only the counts of first choices, which have no
gradient, must be known over the whole step before the first gradient; the rest is a sum over tokens. So
values and gradients do not depend on padding or on how the step is split into micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lsmoe_ds.config.moe import MoE
from lsmoe_ds.moe.routers import DROPPED, Routes, count

NAME = "moe"  # the key of the layers' notes


@dataclass
class RoutingRecord:
    """What one MoE layer did with one micro-batch of S tokens."""

    settings: MoE
    counts: Tensor  # [E] int64: tokens whose first choice is each expert, before any choice is dropped
    probabilities: Tensor  # [E]: sum over tokens; with gradient
    squares: Tensor  # scalar: sum over tokens of (log sum_e exp(logit_e))^2; with gradient
    dropped: Tensor  # scalar: choices dropped because their expert was full
    choices: int  # S K


def count_first_choices(routes: Routes, experts: int) -> Tensor:
    """Count the tokens whose first choice is each expert: [E] int64."""
    return count(routes.experts[:, 0], experts)


def record_routing(settings: MoE, chosen: Routes, kept: Routes) -> RoutingRecord:
    """Record the routing of one micro-batch: ``chosen`` before and ``kept`` after the capacity limit."""
    return RoutingRecord(
        settings,
        count_first_choices(chosen, settings.experts),
        chosen.probabilities.sum(0),
        chosen.log_sums.square().sum(),
        (kept.experts == DROPPED).sum(),
        kept.experts.numel(),
    )


def balance_loss(record: RoutingRecord, counts: Tensor, tokens: int) -> Tensor:
    """Return this micro-batch's part of the balance loss ``E sum_e f_e P_e`` (GShard, Switch).

    f is the share of first choices, P the mean probability. ``counts`` [E] and ``tokens`` are of the whole
    step; the parts of all micro-batches sum to the loss. The loss is 1 when the choices are balanced.
    """
    return record.settings.experts * (counts / tokens * (record.probabilities / tokens)).sum()


def z_loss(record: RoutingRecord, tokens: int) -> Tensor:
    """Return this micro-batch's part of the z-loss, over the ``tokens`` tokens of the whole step.

    The z-loss is the mean over tokens of ``(log sum_e exp(logit_e))^2`` (ST-MoE, equation 5).
    """
    return record.squares / tokens

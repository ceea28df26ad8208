"""Auxiliary losses of routing."""

from __future__ import annotations

import torch
from torch import Tensor

from lsmoe_ds.moe.routers import Routes


def expert_shares(routes: Routes, experts: int) -> Tensor:
    """Share of the tokens whose first choice is each expert, [E]; zeros if there are no tokens."""
    counts = torch.bincount(routes.experts[:, 0], minlength=experts).float()
    return counts / max(routes.experts.shape[0], 1)


def balance_loss(routes: Routes) -> Tensor:
    """``E sum_e f_e P_e`` (GShard, Switch): f the share of first choices, P the mean probability. 1 when balanced.

    It is computed over one micro-batch. The micro-batches of a step are the same on any number of ranks, and the loop
    averages over them by their tokens, so the value does not depend on the parallel layout.
    """
    experts = routes.probabilities.shape[-1]
    tokens = max(routes.probabilities.shape[0], 1)
    return experts * (expert_shares(routes, experts) * routes.probabilities.sum(0) / tokens).sum()

"""Fuse distillation: condense language-specific feed-forwards or matrices into shared ones.

The method is from "Condensing Multilingual Knowledge", sections 3 and 4. Each batch goes through the model by
two routes, the specific parameters (probabilities p_l) and the shared ones (p_s). Both routes run at once, as
one batch whose second half repeats the first. The loss is (equation 3)

    1/2 (CE(y || p_l) + CE(y || p_s)) + D

For low-rank matrices D is the symmetric divergence 1/2 (KL(p_l || p_s) + KL(p_s || p_l)) (equation 4), from
which both routes learn. For feed-forwards, with ``teacher``, D is KL(p_l || p_s) without gradient for p_l
(equation 2), from which only the shared route learns. The shared feed-forward is beside a layer's experts
(``moe.fuse_distillation``), with any router. A static router with as many experts as languages gives the
paper's language-specific feed-forwards.

N tokens of the single batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.methods.objective import Objective, TokenLosses
from lsmoe_ds.parallel.layers import Projected, smoothing_loss
from lsmoe_ds.parallel.topology import Topology

AT_ONCE = 2**20  # logits per block: a block and the values computed from it should fit a processor's cache


class _RouteLosses(torch.autograd.Function):
    """Compute the summed loss 1/2 (CE + CE) + D and, without gradient, each token's -log p(label) and D.

    The last two are [2, N] and [N]. ``logits`` [2 N, V / tensor] are of this rank's part of the vocabulary,
    first the specific route, then the shared one; ``labels`` [2 N].

    Let z_l and z_s be the logits of the two routes, d = log p_l - log p_s,
    a = E_l[d] = KL(p_l || p_s) and b = E_s[d] = -KL(p_s || p_l). Then the symmetric divergence of a token is
    (a - b) / 2. The gradients of its loss, with y equal to 1 at the label and 0 elsewhere, are

        for z_l:  1/2 (p_l (d - a + 2) - p_s - y)        for z_s:  -1/2 (p_s (d - b - 2) + p_l + y)

    With ``teacher`` D is a, and the gradients are 1/2 (p_l - y) and 3/2 p_s - p_l - 1/2 y. The computation
    takes a few tokens at a time, and the gradient overwrites the logits, so that no second [2 N, V] tensor is
    ever stored. Only the normalizers, a, b and the labels' logits are sums over the vocabulary: the ranks
    exchange the largest logits and then six numbers per token. The gradients need no exchange.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, topology: Topology, teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        group = topology.tensor_group if topology.tensor > 1 else None
        halves, labels = logits.view(2, -1, logits.shape[1]), labels.view(2, -1, 1)
        local = labels - topology.tensor_rank * logits.shape[1]
        here = (local >= 0) & (local < logits.shape[1])
        local = local.where(here, 0)
        largest = halves.amax(2)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = halves.new_empty(3, 2, halves.shape[1])
        for z, tokens in _few(halves):
            p = z - largest[:, tokens, None]
            d = p[0] - p[1]
            p.exp_()
            sums[0, :, tokens] = p.sum(2)
            sums[1, :, tokens] = torch.linalg.vecdot(p, d)
        sums[2] = (halves.gather(2, local) * here).squeeze(2)
        if group is not None:
            dist.all_reduce(sums, group=group)
        normalizers, weighted, label_logits = sums
        log_sums = largest + normalizers.log()
        a, b = weighted / normalizers + (log_sums - largest).diff(dim=0)  # d above used the shifted logits
        divergence = a if teacher else (a - b) / 2
        nll = log_sums - label_logits
        ctx.save_for_backward(logits, local, here, log_sums, a, b)
        ctx.teacher = teacher
        ctx.mark_non_differentiable(nll, divergence)
        return nll.sum() / 2 + divergence.sum(), nll, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, local, here, log_sums, a, b = ctx.saved_tensors
        half = gradients[0] / 2
        halves = logits.view(2, -1, logits.shape[1])
        for p, tokens in _few(halves):
            p -= log_sums[:, tokens, None]
            if ctx.teacher:
                p.exp_()
                p[1].mul_(3).sub_(p[0], alpha=2)
            else:
                d = p[0] - p[1]
                p.exp_()
                grad_specific = (d + (2 - a[tokens, None])).mul_(p[0]).sub_(p[1])
                p[1] = d.sub_(2 + b[tokens, None]).mul_(p[1]).add_(p[0]).neg_()
                p[0] = grad_specific
            p *= half
        halves.scatter_add_(2, local, here * -half)
        return logits, None, None, None


def _few(halves: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Yield blocks of a few tokens of ``halves`` [2, N, V], each with the slice of its tokens."""
    each = max(1, AT_ONCE // halves.shape[2])
    for start in range(0, halves.shape[1], each):
        tokens = slice(start, start + each)
        yield halves[:, tokens], tokens


class FuseDistillation(Objective):
    """Train a model on both routes; with ``teacher`` only the shared route learns from the divergence."""

    routes = ("specific", "shared")
    route = "both"

    def __init__(self, teacher: bool) -> None:
        self.teacher = teacher

    def expand(self, batch: tuple[Tensor, ...], ids: SentenceIds) -> tuple[tuple[Tensor, ...], SentenceIds]:
        """Repeat the sentences: [B, ...] -> [2 B, ...]. The second half takes the shared route."""
        again = torch.arange(batch[0].shape[0], device=batch[0].device).repeat(2)
        return tuple(each[again] for each in batch), ids.select(again)

    def losses(
        self, projected: Projected, labels: Tensor, smoothing: float, topology: Topology
    ) -> TokenLosses:
        """Return the losses of logits [2 N, V / tensor] with labels [2 N] of both routes, summed over N
        tokens.

        ``loss`` is the mean of the two smoothed cross-entropies; its gradient includes that of the
        divergence. ``nll`` is the specific route's negative log-likelihood, and ``further`` has the
        divergence as ``distillation``.
        """
        loss, nll, divergence = _RouteLosses.apply(projected.logits, labels, topology, self.teacher)
        if smoothing:
            loss = loss + smoothing_loss(projected, labels, smoothing, topology) / 2
        return TokenLosses(loss - divergence.sum(), nll[0].sum(), {"distillation": divergence.sum()})

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

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.methods.objective import Objective, TokenLosses
from lsmoe_ds.parallel.cross_entropy import blocks, log_sums_of, places, sum_over_vocabulary
from lsmoe_ds.parallel.topology import Topology


class _RouteLosses(torch.autograd.Function):
    """Compute the summed loss 1/2 (CE + CE) + D and, without gradient, each token's -log p(label) and D.

    The last two are [2, N] and [N]. ``logits`` [2 N, V / tensor] are of this rank's part of the vocabulary,
    first the specific route, then the shared one; ``labels`` [2 N]. CE is smoothed by s.

    Let z_l and z_s be the logits of the two routes, d = log p_l - log p_s,
    a = E_l[d] = KL(p_l || p_s) and b = E_s[d] = -KL(p_s || p_l). Then the symmetric divergence of a token is
    (a - b) / 2. The gradients of its loss, with y equal to 1 - s at the label and 0 elsewhere, plus s / V,
    are

        for z_l:  1/2 (p_l (d - a + 2) - p_s - y)        for z_s:  -1/2 (p_s (d - b - 2) + p_l + y)

    With ``teacher`` D is a, and the gradients are 1/2 (p_l - y) and 3/2 p_s - p_l - 1/2 y. As in
    :mod:`lsmoe_ds.parallel.cross_entropy`, the computation takes a few tokens at a time, and the gradient
    overwrites the logits. Only sums over the vocabulary are exchanged: the gradients need no exchange.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, smoothing: float, topology: Topology, teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        halves = logits.view(2, -1, logits.shape[1])
        local, here = places(labels.view(2, -1), logits.shape[1], topology)
        log_sums = log_sums_of(halves, topology)
        sums = log_sums.new_zeros(3, *log_sums.shape)  # d by the probabilities, the label's logit, all logits
        for block, tokens in blocks(halves):
            p = block - log_sums[:, tokens, None]
            d = p[0] - p[1]
            sums[0, :, tokens] = torch.linalg.vecdot(p.exp_(), d)
        sums[1] = halves.gather(2, local[:, :, None]).squeeze(2) * here
        if smoothing:
            sums[2] = halves.sum(2, dtype=torch.float32)
        sum_over_vocabulary(sums, topology)
        (a, b), label_logits, all_logits = sums
        divergence = a if teacher else (a - b) / 2
        nll = log_sums - label_logits
        ctx.save_for_backward(logits, local, here, log_sums, a, b)
        ctx.smoothing, ctx.vocabulary, ctx.teacher = smoothing, logits.shape[1] * topology.tensor, teacher
        ctx.mark_non_differentiable(nll, divergence)
        smoothed = nll + smoothing * (label_logits - all_logits / ctx.vocabulary)
        return smoothed.sum() / 2 + divergence.sum(), nll, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, local, here, log_sums, a, b = ctx.saved_tensors
        at_label = ((ctx.smoothing - 1) * here).float()[:, :, None]
        for block, tokens in blocks(logits.view(2, -1, logits.shape[1])):
            p = block.float()  # in float32 the block itself
            p.sub_(log_sums[:, tokens, None])
            if ctx.teacher:
                p.exp_()
                p[1].mul_(3).sub_(p[0], alpha=2)
            else:
                d = p[0] - p[1]
                p.exp_()
                grad_specific = (d + (2 - a[tokens, None])).mul_(p[0]).sub_(p[1])
                p[1] = d.sub_(2 + b[tokens, None]).mul_(p[1]).add_(p[0]).neg_()
                p[0] = grad_specific
            if ctx.smoothing:
                p.sub_(ctx.smoothing / ctx.vocabulary)
            p.scatter_add_(2, local[:, tokens, None], at_label[:, tokens]).mul_(gradients[0] / 2)
            if p is not block:
                block.copy_(p)
        return logits, None, None, None, None


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

    def losses(self, logits: Tensor, labels: Tensor, smoothing: float, topology: Topology) -> TokenLosses:
        """Compute the losses of both routes, logits [2 N, V / tensor] and labels [2 N], summed over N tokens.

        ``loss`` is the mean of the two smoothed cross-entropies; its gradient includes the gradient of the
        divergence. ``nll`` is the specific route's negative log-likelihood, and ``further`` has the
        divergence as ``distillation``.
        """
        loss, nll, divergence = _RouteLosses.apply(logits, labels, smoothing, topology, self.teacher)
        return TokenLosses(loss - divergence.sum(), nll[0].sum(), {"distillation": divergence.sum()})

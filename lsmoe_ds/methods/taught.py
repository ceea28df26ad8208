"""Word-level distillation: learn from a teacher's distributions ("Sequence-Level Knowledge Distillation",
section 3.1).

With the probabilities q of the teacher and p of the model, the loss of a token is

    (1 - w) CE(y || p) + w KL(q || p)

The teacher reads the same batch; it is a whole model on each rank. N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.methods.objective import Objective, TokenLosses
from lsmoe_ds.parallel.cross_entropy import blocks, log_sums_of, places, sum_over_vocabulary
from lsmoe_ds.parallel.topology import Topology

# Returns the teacher's logits [N, V] for a batch, at the flat positions of its real labels.
Teacher = Callable[[Tensor, Tensor, SentenceIds, Tensor], Tensor]


class _TaughtLosses(torch.autograd.Function):
    """Compute the summed loss and, without gradient, each token's -log p(label) and KL(q || p) [N].

    For logits z of the model and u of the teacher, [N, V / tensor], and smoothing s the gradient is
    p - w q - (1 - w) (s / V, plus 1 - s at the label). As in :mod:`lsmoe_ds.parallel.cross_entropy`, the
    computation processes a few tokens at a time, and the gradient overwrites z.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, u: Tensor, labels: Tensor, smoothing: float, weight: float, topology: Topology
    ) -> tuple[Tensor, Tensor, Tensor]:
        local, here = places(labels, z.shape[1], topology)
        log_sums, theirs = log_sums_of(z, topology), log_sums_of(u, topology)
        sums = log_sums.new_zeros(3, len(z))  # the label's logit, all logits, KL(q || p)
        sums[0] = z.gather(1, local[:, None]).squeeze(1) * here
        if smoothing:
            sums[1] = z.sum(1, dtype=torch.float32)
        for block, tokens in blocks(u):
            log_q = block.float() - theirs[tokens, None]
            log_p = z[tokens].float() - log_sums[tokens, None]
            sums[2, tokens] = torch.linalg.vecdot(log_q.exp(), log_q - log_p)
        sum_over_vocabulary(sums, topology)
        ctx.save_for_backward(z, u, local, here, log_sums, theirs)
        ctx.smoothing, ctx.weight, ctx.vocabulary = smoothing, weight, z.shape[1] * topology.tensor
        nll, divergence = log_sums - sums[0], sums[2]
        ctx.mark_non_differentiable(nll, divergence)
        smoothed = nll + smoothing * (sums[0] - sums[1] / ctx.vocabulary)
        return ((1 - weight) * smoothed + weight * divergence).sum(), nll, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        z, u, local, here, log_sums, theirs = ctx.saved_tensors
        learned = 1 - ctx.weight
        at_label = (learned * (ctx.smoothing - 1) * here).float()[:, None]
        for block, tokens in blocks(z):
            p = block.float()  # not a copy if the block is float32 already
            p.sub_(log_sums[tokens, None]).exp_()
            p.sub_((u[tokens].float() - theirs[tokens, None]).exp_(), alpha=ctx.weight)
            if ctx.smoothing:
                p.sub_(learned * ctx.smoothing / ctx.vocabulary)
            p.scatter_add_(1, local[tokens, None], at_label[tokens]).mul_(gradients[0])
            if p is not block:
                block.copy_(p)
        return z, None, None, None, None, None


class Taught(Objective):
    """Train a model on the labels and, with the ``weight`` w, on the teacher's distributions."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.teacher: Teacher | None = None  # set before training
        self._said: Tensor | None = None

    @torch.no_grad()
    def see(self, source: Tensor, decoder_input: Tensor, ids: SentenceIds, index: Tensor) -> None:
        """Compute the teacher's logits of the batch."""
        assert self.teacher is not None
        self._said = self.teacher(source, decoder_input, ids, index)

    def losses(self, logits: Tensor, labels: Tensor, smoothing: float, topology: Topology) -> TokenLosses:
        """Compute the losses of logits [N, V / tensor] and labels [N].

        ``loss`` is (1 - w) times the smoothed cross-entropy; its gradient includes the gradient of w times
        the divergence. ``further`` has the divergence as ``distillation``.
        """
        assert self._said is not None
        said, self._said = self._said, None
        own = said.narrow(1, topology.tensor_rank * logits.shape[1], logits.shape[1])
        loss, nll, divergence = _TaughtLosses.apply(logits, own, labels, smoothing, self.weight, topology)
        further = self.weight * divergence.sum()
        return TokenLosses(loss - further, nll.sum(), {"distillation": further})

"""Cross-entropy of logits whose vocabulary may be spread over the tensor-parallel ranks.

The logits are processed a few tokens at a time, and their gradient overwrites them: except for the [N, V]
logits, in the type of the output layer, nothing of that size is ever stored.

N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsmoe_ds.parallel.topology import Topology

# Values per block. On a CPU a block and its intermediate results should fit the cache; a GPU needs many
# values to be busy.
AT_ONCE, AT_ONCE_ON_GPU = 2**20, 2**26


def blocks(logits: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Yield views of a few tokens of ``logits`` [..., N, V], each with the slice of its tokens."""
    values = (AT_ONCE_ON_GPU if logits.is_cuda else AT_ONCE) // logits.shape[-1]
    for start in range(0, logits.shape[-2], max(1, values)):
        tokens = slice(start, start + max(1, values))
        yield logits[..., tokens, :], tokens


def places(labels: Tensor, vocabulary: int, topology: Topology) -> tuple[Tensor, Tensor]:
    """Return the index of labels [...] in this rank's ``vocabulary`` logits, and whether they are there.

    The index of a label on another rank is 0.
    """
    local = labels - topology.tensor_rank * vocabulary
    here = (local >= 0) & (local < vocabulary)
    return local.where(here, 0), here


def sum_over_vocabulary(sums: Tensor, topology: Topology) -> None:
    """Add up, in place, the ranks' sums over their parts of the vocabulary."""
    if topology.tensor > 1:
        dist.all_reduce(sums, group=topology.tensor_group)


def log_sums_of(logits: Tensor, topology: Topology) -> Tensor:
    """Return log sum_v exp z_v over the whole vocabulary, float32 [...], of logits z [..., V / tensor]."""
    found = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    for block, tokens in blocks(logits):
        found[..., tokens] = block.float().logsumexp(-1)
    if topology.tensor > 1:
        largest = found.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=topology.tensor_group)
        found.sub_(largest).exp_()
        sum_over_vocabulary(found, topology)
        found.log_().add_(largest)
    return found


class _CrossEntropy(torch.autograd.Function):
    """Compute the summed loss and, without gradient, each token's -log p(label) [N].

    For logits z with probabilities p the smoothed loss of a token with the label y is

        (1 - s) (-log p_y) + s mean_v(-log p_v) = log sum_v exp z_v - (1 - s) z_y - s mean_v z_v

    and its gradient p - s / V, less 1 - s at the label. (Megatron's own label smoothing averages over the
    local part of the vocabulary only, so its loss changes with the number of ranks.)
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, smoothing: float, topology: Topology
    ) -> tuple[Tensor, Tensor]:
        local, here = places(labels, logits.shape[1], topology)
        log_sums = log_sums_of(logits, topology)
        sums = log_sums.new_zeros(2, logits.shape[0])  # the label's logit, all logits
        sums[0] = logits.gather(1, local[:, None]).squeeze(1) * here
        if smoothing:
            sums[1] = logits.sum(1, dtype=torch.float32)
        sum_over_vocabulary(sums, topology)
        ctx.save_for_backward(logits, local, here, log_sums)
        ctx.smoothing, ctx.vocabulary = smoothing, logits.shape[1] * topology.tensor
        nll = log_sums - sums[0]
        ctx.mark_non_differentiable(nll)
        return (nll + smoothing * (sums[0] - sums[1] / ctx.vocabulary)).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, local, here, log_sums = ctx.saved_tensors
        smoothing, gradient = ctx.smoothing, gradients[0]
        at_label = ((smoothing - 1) * here).float()[:, None]
        for block, tokens in blocks(logits):
            p = block.float()  # not a copy if the block is float32 already
            p.sub_(log_sums[tokens, None]).exp_()
            if smoothing:
                p.sub_(smoothing / ctx.vocabulary)
            p.scatter_add_(1, local[tokens, None], at_label[tokens]).mul_(gradient)
            if p is not block:
                block.copy_(p)
        return logits, None, None, None


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float, topology: Topology
) -> tuple[Tensor, Tensor]:
    """Return the summed label-smoothed cross-entropy, and each token's negative log-likelihood [N].

    ``logits`` [N, V / tensor] of any floating-point type; ``labels`` [N]. The second result has no gradient.
    The backward pass overwrites the logits.
    """
    loss, nll = _CrossEntropy.apply(logits, labels, smoothing, topology)
    return loss, nll

"""Fuse distillation: what the language-specific matrices know, condensed into shared ones ("Condensing Multilingual Knowledge",
sections 3 and 4).

Each batch goes through the model twice, by way of the specific matrices (probabilities p_l) and of the shared ones (p_s); here
both at once, as one batch whose second half repeats the first. The loss is (equation 3)

    1/2 (CE(y || p_l) + CE(y || p_s)) + D

where D is the symmetric divergence 1/2 (KL(p_l || p_s) + KL(p_s || p_l)) (equation 4), from which both sides learn; or, with
``teacher``, KL(p_l || p_s) without gradient for p_l (equation 2), from which the shared side alone learns.

N tokens of the single batch, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lsmoe_ds.config import Recipe
from lsmoe_ds.languages import SentenceIds
from lsmoe_ds.parallel.layers import cross_entropy, project
from lsmoe_ds.parallel.topology import Topology


class _Divergence(torch.autograd.Function):
    """Logits [2 N, V / tensor], specific then shared, of this rank's part of the vocabulary -> the summed divergence.

    With d = log p_l - log p_s, a = E_l[d] = KL(p_l || p_s) and b = E_s[d] = -KL(p_s || p_l), the symmetric divergence of a token
    is (a - b) / 2 and its gradients are

        of z_l:  1/2 (p_l (d - a) + p_l - p_s)        of z_s:  1/2 (-p_s (d - b) + p_s - p_l)

    With ``teacher`` the divergence is a, and its gradients are 0 and p_s - p_l. Only the two normalizers, a and b are sums over
    the vocabulary: the ranks exchange the largest logits and then four numbers a token; the gradients need no exchange.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup | None, teacher: bool) -> Tensor:
        halves = logits.view(2, -1, logits.shape[1])
        largest = halves.amax(2, keepdim=True)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        p = halves - largest
        d = p[0] - p[1]
        p = p.exp_()
        sums = torch.stack([p.sum(2), (p * d).sum(2)])
        if group is not None:
            dist.all_reduce(sums, group=group)
        normalizers, weighted = sums  # [2, N] each
        p /= normalizers[:, :, None]
        apart = normalizers[0].log() - normalizers[1].log()
        d -= apart[:, None]
        a, b = weighted / normalizers - apart
        difference = p[0] - p[1]
        if teacher:
            gradient = torch.stack([torch.zeros_like(difference), -difference])
        else:
            gradient = torch.stack([p[0] * (d - a[:, None]) + difference, -p[1] * (d - b[:, None]) - difference]) / 2
        ctx.save_for_backward(gradient.view_as(logits))
        return a.sum() if teacher else (a - b).sum() / 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def divergence(logits: Tensor, topology: Topology, teacher: bool = False) -> Tensor:
    """Summed divergence of N tokens from float32 logits [2 N, V / tensor], those of the specific route first (see above)."""
    out: Tensor = _Divergence.apply(logits, topology.tensor_group if topology.tensor > 1 else None, teacher)
    return out


@dataclass(frozen=True)
class FuseDistillation:
    """How a model is trained on both routes."""

    teacher: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> FuseDistillation | None:
        """None where the recipe asks for none. Low-rank matrices stand beside shared weights, so they learn from each other."""
        settings = recipe.model.low_rank
        return cls() if settings is not None and settings.fuse_distillation else None

    def losses(
        self, hidden: Tensor, labels: Tensor, embedding: nn.Module, smoothing: float, topology: Topology
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [2 N, H] and labels [2 N] of both routes -> mean of the two smoothed cross-entropies, divergence, both with
        gradient, and the specific route's negative log-likelihood; each summed over N tokens."""
        projected = project(hidden, embedding, topology)
        apart = divergence(projected.logits, topology, self.teacher)  # first: cross-entropy may overwrite the logits
        loss, nll = cross_entropy(projected, labels, embedding, smoothing, topology)
        return loss / 2, apart, nll[: nll.shape[0] // 2].sum()


def twice(source: Tensor, decoder_input: Tensor, ids: SentenceIds) -> tuple[Tensor, Tensor, SentenceIds]:
    """The batch, and once more the batch: [B, ...] -> [2 B, ...]."""
    again = torch.arange(source.shape[0], device=source.device).repeat(2)
    return source[again], decoder_input[again], ids.select(again)

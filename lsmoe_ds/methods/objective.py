"""What a model is trained on: the label-smoothed cross-entropy of one route, unless an objective says otherwise.

N target tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from lsmoe_ds.languages import SentenceIds
from lsmoe_ds.methods.context import Route
from lsmoe_ds.parallel.layers import cross_entropy, project
from lsmoe_ds.parallel.topology import Topology


class TokenLosses(NamedTuple):
    """Losses of the N target tokens of a micro-batch, summed."""

    loss: Tensor  # label-smoothed cross-entropy; its gradient is also that of ``further``
    nll: Tensor  # negative log-likelihood by the specific route, without gradient
    further: dict[str, Tensor]  # other losses by name, without gradient; the step adds them to ``loss``


class Objective:
    """Train on the label-smoothed cross-entropy by the specific route."""

    routes: ClassVar[tuple[Route, ...]] = ("specific",)  # those that are trained, and so validated
    route: ClassVar[Route] = "specific"  # the one that a training batch takes, after :meth:`expand`

    def expand(self, batch: tuple[Tensor, ...], ids: SentenceIds) -> tuple[tuple[Tensor, ...], SentenceIds]:
        """Return the sentences [B, ...] as the model is to read them in training."""
        return batch, ids

    def losses(self, hidden: Tensor, labels: Tensor, embedding: nn.Module, smoothing: float, topology: Topology) -> TokenLosses:
        """Return the losses of hidden states [N, H] with labels [N], by the tied output layer ``embedding``."""
        loss, nll = cross_entropy(project(hidden, embedding, topology), labels, embedding, smoothing, topology)
        return TokenLosses(loss, nll.sum(), {})

"""The training objective: the label-smoothed cross-entropy of one route, unless a subclass says otherwise.

N target tokens.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor

from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.methods.context import Route
from lsmoe_ds.parallel.cross_entropy import cross_entropy
from lsmoe_ds.parallel.topology import Topology


class TokenLosses(NamedTuple):
    """The losses of a micro-batch, each summed over its N target tokens."""

    loss: Tensor  # label-smoothed cross-entropy; its gradient includes the gradient of ``further``
    nll: Tensor  # negative log-likelihood by the specific route, without gradient
    further: dict[str, Tensor]  # other losses by name, without gradient; the step adds them to ``loss``


class Objective:
    """Train on the label-smoothed cross-entropy by the specific route."""

    routes: ClassVar[tuple[Route, ...]] = ("specific",)  # the routes that are trained and validated
    route: ClassVar[Route] = "specific"  # the route of a training batch after :meth:`expand`

    def expand(self, batch: tuple[Tensor, ...], ids: SentenceIds) -> tuple[tuple[Tensor, ...], SentenceIds]:
        """Return the sentences [B, ...] that the model reads in training."""
        return batch, ids

    def see(self, source: Tensor, decoder_input: Tensor, ids: SentenceIds, index: Tensor) -> None:
        """Receive a training batch before :meth:`losses` is called.

        ``index`` [N] has the flat positions of its real labels.
        """

    def losses(self, logits: Tensor, labels: Tensor, smoothing: float, topology: Topology) -> TokenLosses:
        """Compute the losses of logits [N, V / tensor] and labels [N].

        The backward pass overwrites the logits.
        """
        loss, nll = cross_entropy(logits, labels, smoothing, topology)
        return TokenLosses(loss, nll.sum(), {})

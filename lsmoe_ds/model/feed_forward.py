"""The position-wise feed-forward network. B sentences, T positions, H hidden, F feed-forward width."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lsmoe_ds.config.shapes import feed_forward_linears
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.sites import Linears
from lsmoe_ds.parallel.layers import column_linear, row_linear
from lsmoe_ds.parallel.topology import Topology


class FeedForward(Linears):
    """``relu(x W_1 + b_1) W_2 + b_2``, [..., H] -> [..., H]; F is spread over the tensor-parallel ranks."""

    is_plain = True  # relu between two linear layers, so grouped products may compute a rank's experts

    def __init__(self, hidden: int, width: int, topology: Topology) -> None:
        super().__init__()
        self.shapes = feed_forward_linears(hidden, width)
        self.expand = column_linear(hidden, width, topology)
        self.contract = row_linear(width, hidden, topology)
        self.observer: Callable[[Tensor], None] | None = None  # set by analyses; receives the hidden units

    def forward(self, x: Tensor, context: LanguageContext | None = None) -> Tensor:
        """Apply the network, x [..., H] -> [..., H]. Only modules added by methods need the context."""
        hidden = self.linear("expand", x, context)
        for added in self.within:
            hidden = added(hidden, self.expand.bias, context)
        active = F.relu(hidden)
        if self.observer is not None:
            self.observer(active)
        return self.linear("contract", active, context)

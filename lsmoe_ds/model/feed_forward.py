"""The position-wise feed-forward network. B sentences, T positions, H hidden, F feed-forward width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.language_specific.low_rank import Banks, linear
from lsmoe_ds.model.guide import Guide
from lsmoe_ds.parallel.layers import column_linear, row_linear
from lsmoe_ds.parallel.topology import Topology


class FeedForward(nn.Module):
    """``relu(x W_1 + b_1) W_2 + b_2``, [..., H] -> [..., H]; F is spread over the tensor-parallel ranks."""

    def __init__(self, hidden: int, width: int, topology: Topology, banks: Banks | None = None) -> None:
        super().__init__()
        self.expand = column_linear(hidden, width, topology)
        self.contract = row_linear(width, hidden, topology)
        self.expand_low_rank = banks.make(hidden, width, "column") if banks else None
        self.contract_low_rank = banks.make(width, hidden, "row") if banks else None

    def forward(self, x: Tensor, guide: Guide | None = None) -> Tensor:
        """Only banks need the guide."""
        inner = F.relu(linear(self.expand, self.expand_low_rank, x, guide))
        return linear(self.contract, self.contract_low_rank, inner, guide)

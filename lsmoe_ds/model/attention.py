"""Multi-head attention with key-value caches. B sentences, T positions, H hidden, A heads of this rank, D head size."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.language_specific.low_rank import Banks, linear
from lsmoe_ds.moe.guide import Guide
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.layers import column_linear, row_linear
from lsmoe_ds.parallel.topology import Topology

Cache = tuple[Tensor, Tensor]  # keys and values, each [B, A, T, D]


class Attention(nn.Module):
    """Attention of queries [B, T, H] over a memory [B, M, H]; heads are spread over the tensor-parallel ranks."""

    def __init__(self, hidden: int, heads: int, dropout: float, topology: Topology, banks: Banks | None = None) -> None:
        super().__init__()
        self.query = column_linear(hidden, hidden, topology)
        self.key = column_linear(hidden, hidden, topology)
        self.value = column_linear(hidden, hidden, topology)
        self.output = row_linear(hidden, hidden, topology)
        self.query_low_rank = banks.make(hidden, hidden, "column") if banks else None
        self.key_low_rank = banks.make(hidden, hidden, "column") if banks else None
        self.value_low_rank = banks.make(hidden, hidden, "column") if banks else None
        self.output_low_rank = banks.make(hidden, hidden, "row") if banks else None
        self.heads = heads // topology.tensor
        self.dropout = dropout
        self.tensor = topology.tensor

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def project(self, memory: Tensor, guide: Guide) -> Cache:
        """Keys and values of a memory [B, M, H]."""
        key, value = linear(self.key, self.key_low_rank, memory, guide), linear(self.value, self.value_low_rank, memory, guide)
        return self._split(key), self._split(value)

    def forward(self, x: Tensor, keys_values: Cache, guide: Guide, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x [B, T, H] -> [B, T, H]. ``mask`` [B, 1, 1, M] is true where a key may be seen."""
        query = self._split(linear(self.query, self.query_low_rank, x, guide))
        dropout = self.dropout if self.training else 0.0
        # Each tensor-parallel rank drops in its own heads, so it needs its own random numbers there.
        with compat.tensor_parallel_random() if dropout and self.tensor > 1 else contextlib.nullcontext():
            mixed = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        joined = mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        return linear(self.output, self.output_low_rank, joined, guide)


def extend(cache: Cache | None, new: Cache) -> Cache:
    """A cache with the keys and values of further positions."""
    return new if cache is None else (torch.cat([cache[0], new[0]], 2), torch.cat([cache[1], new[1]], 2))

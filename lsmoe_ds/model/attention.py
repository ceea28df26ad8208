"""Multi-head attention with key-value caches.

B sentences, T positions, M memory positions, H hidden, A heads of this rank, D head size.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.config.shapes import attention_linears
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.packing import Packing
from lsmoe_ds.methods.sites import Linears
from lsmoe_ds.model.packed_attention import attend_packed
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.layers import column_linear, row_linear
from lsmoe_ds.parallel.topology import Topology

Cache = tuple[Tensor, Tensor]  # keys and values, each [B, A, T, D]
ROOM = 8  # further positions for which a growing cache has room: few, since beam search copies them, too
Mask = Tensor | Packing  # which keys there are: true where one is [B, 1, 1, M], or the packing of their rows


class Attention(Linears):
    """Attention over a memory [B, M, H]. The heads are spread over the tensor-parallel ranks."""

    def __init__(self, hidden: int, heads: int, dropout: float, topology: Topology) -> None:
        super().__init__()
        self.shapes = attention_linears(hidden)
        self.query = column_linear(hidden, hidden, topology)
        self.key = column_linear(hidden, hidden, topology)
        self.value = column_linear(hidden, hidden, topology)
        self.output = row_linear(hidden, hidden, topology)
        self.heads = heads // topology.tensor
        self.dropout = dropout
        self.tensor = topology.tensor
        self.packed: tuple[Tensor, ...] = ()  # after :meth:`pack`: joint weight [3 H, H] and bias [3 H]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def pack(self) -> None:
        """Prepare to compute the query, key and value of an input in one product, for inference.

        Their weights become views of a joint weight. Does nothing under tensor parallelism, or if a method
        has added a module beside one of the three.
        """
        parts = (self.query, self.key, self.value)
        if {"query", "key", "value"} & self.beside.keys() or self.tensor > 1:
            return
        for name in ("weight", "bias"):
            packed = torch.cat([getattr(part, name).detach() for part in parts])
            for part, view in zip(parts, packed.chunk(3), strict=True):
                setattr(part, name, nn.Parameter(view, requires_grad=False))
            self.packed = (*self.packed, packed)

    def project_q(self, x: Tensor, context: LanguageContext) -> Tensor:
        """Compute the queries of x [B, T, H]: [B, A, T, D]."""
        return self._split(self.linear("query", x, context))

    def project_kv(self, memory: Tensor, context: LanguageContext) -> Cache:
        """Compute the keys and values of a memory [B, M, H]: each [B, A, M, D]."""
        return self._split(self.linear("key", memory, context)), self._split(
            self.linear("value", memory, context)
        )

    def project_qkv(self, x: Tensor, context: LanguageContext) -> tuple[Tensor, Cache]:
        """Compute the queries, keys and values of x [B, T, H]: each [B, A, T, D]."""
        if not self.packed:
            return self.project_q(x, context), self.project_kv(x, context)
        query, key, value = (self._split(part) for part in F.linear(x, *self.packed).chunk(3, -1))
        return query, (key, value)

    def forward(
        self,
        query: Tensor,
        keys_values: Cache,
        context: LanguageContext,
        mask: Mask | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend from queries [B, A, T, D] to keys and values: [B, T, H].

        ``mask`` [B, 1, 1, M] is true where queries may attend to a key. If queries are packed, it is the
        packing of the keys.
        """
        dropout = self.dropout if self.training else 0.0
        # Each tensor-parallel rank applies dropout to its own heads, so it needs its own random numbers.
        with compat.tensor_parallel_random() if dropout and self.tensor > 1 else contextlib.nullcontext():
            if isinstance(mask, Packing):
                assert context.packing is not None
                mixed = attend_packed(query, *keys_values, context.packing, mask, dropout, causal)
            else:
                mixed = F.scaled_dot_product_attention(
                    query, *keys_values, attn_mask=mask, dropout_p=dropout, is_causal=causal
                )
        return self.linear("output", mixed.transpose(1, 2).flatten(2), context)


class GrowingCache:
    """The keys and values of the target's positions so far, with room for more.

    Appending copies only the new positions, except when the room is used up.
    """

    def __init__(self, first: Cache) -> None:
        self._parts, self._length = list(first), first[0].shape[2]  # [B, A, C, D] each, C >= length

    @property
    def filled(self) -> Cache:
        """Return the keys and values of the positions so far, as views."""
        keys, values = (part[:, :, : self._length] for part in self._parts)
        return keys, values

    def append(self, new: Cache) -> None:
        """Add the keys and values of further positions."""
        begin, self._length = self._length, self._length + new[0].shape[2]
        for i, part in enumerate(new):
            if self._length > self._parts[i].shape[2]:
                batch, heads, _, size = part.shape
                larger = part.new_empty(batch, heads, self._length + ROOM, size)
                larger[:, :, :begin] = self._parts[i][:, :, :begin]
                self._parts[i] = larger
            self._parts[i][:, :, begin : self._length] = part

    def select(self, rows: Tensor) -> GrowingCache:
        """Return a copy that has these rows of the batch, in this order."""
        chosen = GrowingCache((self._parts[0].index_select(0, rows), self._parts[1].index_select(0, rows)))
        chosen._length = self._length
        return chosen

"""Token embeddings and sinusoidal positions, as in M2M-100. B sentences, T positions, H hidden, V
vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lsmoe_ds.languages import PAD
from lsmoe_ds.parallel.layers import vocabulary_embedding
from lsmoe_ds.parallel.topology import Topology

FIRST_POSITION = PAD + 1  # as in fairseq and M2M-100, where positions start after the padding id


def sinusoids(first: int, count: int, hidden: int) -> Tensor:
    """Compute rows ``first`` to ``first + count`` of M2M-100's position table: [count, H].

    The first half of each row are sines, the second half cosines.
    """
    half = hidden // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.arange(first, first + count, dtype=torch.float32)[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


class Embedding(nn.Module):
    """``sqrt(H) E[token] + position``. ``tokens.weight`` [V, H] is shared by encoder, decoder and output
    layer.
    """

    def __init__(self, vocabulary: int, hidden: int, topology: Topology) -> None:
        super().__init__()
        self.tokens = vocabulary_embedding(vocabulary, hidden, topology)
        self.scale = math.sqrt(hidden)
        self.hidden = hidden
        self.table = sinusoids(FIRST_POSITION, 512, hidden)  # not a buffer: never saved, and always float32

    def forward(self, ids: Tensor, offset: int = 0) -> Tensor:
        """Embed ids [B, T], the first of them at position ``offset``: [B, T, H]."""
        end = offset + ids.shape[1]
        if end > self.table.shape[0] or self.table.device != ids.device:
            self.table = sinusoids(FIRST_POSITION, max(512, 2 ** math.ceil(math.log2(end))), self.hidden).to(
                ids.device
            )
        embedded: Tensor = self.tokens(ids) * self.scale
        return embedded + self.table[offset:end].to(embedded.dtype)

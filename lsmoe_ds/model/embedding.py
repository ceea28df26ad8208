"""Token embeddings and sinusoidal positions, as in M2M-100.

B sentences, T positions, N real tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lsmoe_ds.languages import PAD
from lsmoe_ds.methods.packing import Packing
from lsmoe_ds.parallel.layers import vocabulary_embedding
from lsmoe_ds.parallel.topology import Topology

FIRST_POSITION = PAD + 1  # as in fairseq and M2M-100, where positions start after the padding id


def sinusoids(first: int, count: int, hidden: int) -> Tensor:
    """Compute rows ``first`` to ``first + count`` of M2M-100's position table: [count, H].

    The first half of each row has sines, the second half cosines.
    """
    half = hidden // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.arange(first, first + count, dtype=torch.float32)[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


class Embedding(nn.Module):
    """Compute ``sqrt(H) E[token] + position``.

    Encoder, decoder and output layer share ``tokens.weight`` [V, H].
    """

    def __init__(self, vocabulary: int, hidden: int, topology: Topology) -> None:
        super().__init__()
        self.tokens = vocabulary_embedding(vocabulary, hidden, topology)
        self.scale = math.sqrt(hidden)
        self.hidden = hidden
        self.table = sinusoids(FIRST_POSITION, 512, hidden)  # not a buffer: never saved, and always float32

    def forward(self, ids: Tensor, offset: int = 0, packing: Packing | None = None) -> Tensor:
        """Embed ids [B, T], whose positions start at ``offset``: [B, T, H].

        With a packing, return the rows of real tokens [N, 1, H].
        """
        end = offset + ids.shape[1]
        if end > self.table.shape[0] or self.table.device != ids.device:
            self.table = sinusoids(FIRST_POSITION, max(512, 2 ** math.ceil(math.log2(end))), self.hidden).to(
                ids.device
            )
        embedded: Tensor = self.tokens(ids if packing is None else packing.pack(ids)) * self.scale
        places = self.table[offset:end] if packing is None else self.table[packing.positions]
        return embedded + places.to(embedded.dtype)

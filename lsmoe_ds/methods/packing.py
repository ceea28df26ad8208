"""Pack the real tokens of padded sentences into rows.

B sentences, T positions, N real tokens.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Packing:
    """The places of the real tokens of sentences [B, T] among rows [N, 1], sentence after sentence.

    Layers and methods read each row as a sentence of one position. Only attention, positions and means over
    sentences depend on which rows belong together.
    """

    def __init__(self, real: Tensor) -> None:
        """Read where tokens are ``real`` [B, T]. Waits for the device."""
        self.real = real
        self.index = real.reshape(-1).nonzero().squeeze(1)  # [N]: flat places among B T
        self.sentences = self.index // real.shape[1]  # [N]
        self.rows = torch.ones_like(self.index, dtype=torch.bool)[:, None]  # [N, 1]: every row is real

    @property
    def positions(self) -> Tensor:
        """The position of each row in its sentence [N, 1]."""
        return (self.index % self.real.shape[1])[:, None]

    @cached_property
    def starts(self) -> Tensor:
        """The first row of each sentence, and N: [B + 1] int32."""
        lengths = self.real.sum(1).cumsum(0, dtype=torch.int32)
        return torch.cat([lengths.new_zeros(1), lengths])

    @cached_property
    def starts_on_host(self) -> list[int]:
        """The same as a list. The first reading waits for the device."""
        found: list[int] = self.starts.tolist()
        return found

    @property
    def longest(self) -> int:
        """The number of positions T, which no sentence exceeds."""
        return self.real.shape[1]

    def pack(self, x: Tensor) -> Tensor:
        """Return the rows of real tokens, x [B, T, ...] -> [N, 1, ...]."""
        return x.flatten(0, 1).index_select(0, self.index)[:, None]

    def unpack(self, rows: Tensor) -> Tensor:
        """Return rows to their places, [N, 1, ...] -> [B, T, ...]; padding is zero."""
        flat = rows.new_zeros(self.real.numel(), *rows.shape[2:])
        return flat.index_copy(0, self.index, rows[:, 0]).unflatten(0, self.real.shape)

    def sentence_count(self, rows: int) -> int:
        """Return how many sentences the first ``rows`` rows are, which are all of them or the first half.

        The second half of the sentences repeats the first, so half of the rows are half of the sentences.
        """
        return len(self.real) if rows == len(self.index) else len(self.real) // 2

    def mean(self, x: Tensor) -> Tensor:
        """Average x [n, 1, H] over each sentence -> [B, H]; zero for sentences without a row.

        ``x`` may be the first half of the rows. The result is at least float32, because routers read it.
        """
        count = self.sentence_count(len(x))
        x = x[:, 0].to(torch.promote_types(x.dtype, torch.float32))
        total = x.new_zeros(count, x.shape[1]).index_add(0, self.sentences[: len(x)], x)
        return total / self.real[:count].sum(1, keepdim=True).clamp(min=1)

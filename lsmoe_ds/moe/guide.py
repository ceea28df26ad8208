"""What the layers of one side are told beside the hidden states. B sentences, T positions, H hidden."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lsmoe_ds.languages import SentenceIds
from lsmoe_ds.moe.losses import RoutingRecord


@dataclass
class Guide:
    ids: SentenceIds
    summary: Tensor | None = None  # [B, H]: in the decoder the mean of the encoder's output, if sentence routing asks for it
    records: list[RoutingRecord] | None = None  # one is appended by each MoE layer, in training

    def select(self, index: Tensor) -> Guide:
        """For the sentences that ``index`` names, in that order."""
        return Guide(self.ids.select(index), None if self.summary is None else self.summary[index], self.records)


def mean_of_real(x: Tensor, real: Tensor) -> Tensor:
    """Mean of [B, T, H] over the positions where ``real`` [B, T] is true -> [B, H]; zero where none is."""
    return (x * real[:, :, None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)

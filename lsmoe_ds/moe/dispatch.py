"""Dispatch: send tokens to the ranks of their experts and back, without padding and without drops of its own.

With expert parallelism a token travels once to each rank that holds any of its experts, with these experts'
numbers and weights. That rank returns one row: the weighted sum of its experts' outputs. Counts are exchanged
once, rows by uneven all-to-all. Tensor-parallel peers hold the same tokens; each dispatches a share of them.

S tokens, H hidden, K top-k, R expert-parallel ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsmoe_ds.moe.experts import Experts
from lsmoe_ds.moe.routers import DROPPED
from lsmoe_ds.parallel.collectives import Traffic, all_to_all, exchange_counts, join_rows, split_rows
from lsmoe_ds.parallel.topology import Topology


class Dispatcher(nn.Module):
    """Send tokens to their experts, on whichever rank, and combine the outputs."""

    def __init__(self, experts: list[nn.Module], total: int, topology: Topology) -> None:
        super().__init__()
        self.experts = Experts(experts, topology)
        self.local = total // topology.expert
        self.topology = topology
        self.traffic = Traffic()

    def forward(self, tokens: Tensor, experts: Tensor, weights: Tensor, dropped: bool = True) -> Tensor:
        """Return the weighted sum of each token's expert outputs [S, H].

        ``tokens`` [S, H]; ``experts`` [S, K] are expert numbers or DROPPED; ``weights`` [S, K]. If
        ``dropped`` is false, no number may be DROPPED.
        """
        group = self.topology.tensor_group
        if self.topology.tensor == 1 or group is None:
            return self._dispatch(tokens, experts, weights, dropped)
        own = self._dispatch(
            split_rows(tokens, group), split_rows(experts, group), split_rows(weights, group), dropped
        )
        return join_rows(own, tokens.shape[0], group)

    def _dispatch(self, tokens: Tensor, experts: Tensor, weights: Tensor, dropped: bool) -> Tensor:
        if self.topology.expert == 1:
            out: Tensor = self.experts(tokens, experts, weights, dropped)
            return out
        group, ranks, top_k = self.topology.expert_group, self.topology.expert, experts.shape[1]
        assert group is not None
        rank_of = torch.where(experts == DROPPED, ranks, experts // self.local)  # [S, K]
        wanted = torch.zeros(experts.shape[0], ranks + 1, dtype=torch.bool, device=experts.device).scatter_(
            1, rank_of, True
        )
        ranks_of_rows, rows = wanted[:, :ranks].t().nonzero(as_tuple=True)  # by rank, then token
        send_counts = torch.bincount(ranks_of_rows, minlength=ranks)
        receive_counts = exchange_counts(send_counts, group, self.traffic)
        send, receive = torch.stack([send_counts, receive_counts]).tolist()  # waits for the device once
        self.traffic.rows += sum(send) - send[self.topology.expert_rank]

        # Each row travels with the local numbers of its experts on the target rank (DROPPED for experts
        # elsewhere) and their weights.
        here = rank_of[rows] == ranks_of_rows[:, None]
        local = torch.where(here, experts[rows] % self.local, DROPPED)
        told = torch.cat(
            [local.float(), weights.float().index_select(0, rows)], 1
        )  # whole numbers are exact in float32
        told = all_to_all(told, send, receive, group, self.traffic)
        arrived = all_to_all(tokens.index_select(0, rows), send, receive, group, self.traffic)
        outputs = self.experts(arrived, told[:, :top_k].detach().long(), told[:, top_k:])
        returned = all_to_all(outputs, receive, send, group, self.traffic)
        return torch.zeros_like(tokens).index_add(0, rows, returned)

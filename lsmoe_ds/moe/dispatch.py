"""Dispatch: send tokens to the ranks of their experts and back, without padding and without drops of its own.

With expert parallelism a token travels once to each rank that holds any of its experts, with these experts'
numbers and weights, in one message. That rank returns one row: the weighted sum of its experts' outputs.
Counts are exchanged once, rows by uneven all-to-all. Tensor-parallel peers hold the same tokens; each
dispatches a share of them. Choices of experts that have replicas stay on their rank.

S tokens, H hidden, K top-k, R expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lsmoe_ds.moe.experts import Experts
from lsmoe_ds.moe.replicas import Loan, split
from lsmoe_ds.moe.routers import DROPPED, count
from lsmoe_ds.parallel.collectives import Traffic, all_to_all, exchange_counts, join_rows, split_rows
from lsmoe_ds.parallel.topology import Topology


class Dispatcher(nn.Module):
    """Send tokens to their experts, on whichever rank, and combine the outputs."""

    def __init__(self, experts: list[nn.Module], total: int, topology: Topology) -> None:
        super().__init__()
        self.experts = Experts(experts, topology)
        self.total, self.local = total, total // topology.expert
        self.topology = topology
        self.traffic = Traffic()

    def forward(
        self,
        tokens: Tensor,
        experts: Tensor,
        weights: Tensor,
        dropped: bool = True,
        replicated: Sequence[int] = (),
    ) -> Tensor:
        """Return the weighted sum of each token's expert outputs [S, H].

        ``tokens`` [S, H]; ``experts`` [S, K] are expert numbers or DROPPED; ``weights`` [S, K]. If
        ``dropped`` is false, no number may be DROPPED. ``replicated`` are the numbers of the experts that
        have replicas on each rank, ascending and the same on all ranks.
        """
        group, more = self.topology.tensor_group, (dropped, replicated)
        if self.topology.tensor == 1 or group is None:
            return self._dispatch(tokens, experts, weights, *more)
        own = self._dispatch(
            split_rows(tokens, group), split_rows(experts, group), split_rows(weights, group), *more
        )
        return join_rows(own, tokens.shape[0], group)

    def _dispatch(
        self, tokens: Tensor, experts: Tensor, weights: Tensor, dropped: bool, replicated: Sequence[int]
    ) -> Tensor:
        if self.topology.expert == 1:
            out: Tensor = self.experts(tokens, experts, weights, None if dropped else experts.numel())
            return out
        group, ranks = self.topology.expert_group, self.topology.expert
        assert group is not None
        at_home, chosen = None, experts
        if replicated:
            loan = Loan(self.experts.deepspeed_experts, replicated, self.topology, self.traffic)
            at_home, experts = split(chosen, replicated, self.total)
        rank_of = torch.where(experts == DROPPED, ranks, experts // self.local)  # [S, K]
        wanted = torch.zeros(ranks + 1, experts.shape[0], dtype=torch.bool, device=experts.device)
        wanted = wanted.scatter_(0, rank_of.t(), True)[:ranks]  # [R, S]
        choices = count(rank_of.reshape(-1), ranks + 1)[:ranks]
        send_counts = torch.stack(
            [wanted.sum(1), choices], 1
        )  # of each rank: rows, and choices of its experts
        receive_counts = exchange_counts(send_counts, group, self.traffic)
        at_home_count = (
            send_counts.new_zeros(1, 2) if at_home is None else (at_home != DROPPED).sum().expand(1, 2)
        )
        # The one place that waits for the device, unless a learned router says which experts have replicas.
        counts = torch.cat([send_counts, receive_counts, at_home_count]).tolist()
        send, receive = ([rows for rows, _ in each] for each in (counts[:ranks], counts[ranks:-1]))
        arriving = sum(choices for _, choices in counts[ranks:-1])
        self.traffic.rows += sum(send) - send[self.topology.expert_rank]
        ranks_of_rows, rows = _places(wanted, sum(send))

        # Each row travels with the local numbers of its experts on the target rank (DROPPED for experts
        # elsewhere) and their weights.
        here = rank_of[rows] == ranks_of_rows[:, None]
        local = torch.where(here, experts[rows] % self.local, DROPPED).int()
        row = [tokens.index_select(0, rows), local, weights.float().index_select(0, rows)]
        arrived, local, their_weights = all_to_all(row, send, receive, group, self.traffic)
        outputs = self.experts(arrived, local.long(), their_weights, arriving)
        (returned,) = all_to_all([outputs], receive, send, group, self.traffic)
        out = torch.zeros_like(tokens).index_add(0, rows, returned)
        if at_home is not None:
            out = out + self.experts(tokens, at_home, weights, counts[-1][0], loan.replicas())
        return out


def _places(wanted: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the rank and the token of each of the ``total`` places of ``wanted`` [R, S] that are true.

    ``nonzero`` would wait for the device to count them.
    """
    flat = wanted.reshape(-1)
    place = torch.where(flat, flat.cumsum(0) - 1, total)  # what is not wanted falls behind the last
    found = torch.empty(total + 1, dtype=torch.int64, device=flat.device)
    found = found.scatter_(0, place, torch.arange(len(flat), device=flat.device))[:total]
    return found // wanted.shape[1], found % wanted.shape[1]

"""Dispatch: send tokens to the ranks of their experts and back, without padding and without drops of its own.

With expert parallelism a token travels once to each rank that holds any of its experts, with these experts'
numbers and weights, in one message. That rank returns one row: the weighted sum of its experts' outputs.
Counts are exchanged once, rows by uneven all-to-all. Tensor-parallel peers hold the same tokens; each
dispatches a share of them. Choices of experts that have replicas stay on their rank.

In training, the rows may travel in several chunks: the experts compute one while others travel, in the
backward pass, too. "FasterMoE" (He et al., 2022) and "Tutel" (Hwang et al., 2023) do the same.

S tokens, H hidden, K top-k, R expert-parallel ranks, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lsmoe_ds.moe.experts import Experts
from lsmoe_ds.moe.replicas import Loan, split
from lsmoe_ds.moe.routers import DROPPED, count
from lsmoe_ds.parallel.collectives import (
    Traffic,
    begin_all_to_all,
    exchange_counts,
    join_rows,
    split_rows,
)
from lsmoe_ds.parallel.topology import Topology


class Dispatcher(nn.Module):
    """Send tokens to their experts, on whichever rank, and combine the outputs."""

    def __init__(self, experts: list[nn.Module], total: int, topology: Topology, chunks: int = 1) -> None:
        super().__init__()
        self.experts = Experts(experts, topology)
        self.total, self.local = total, total // topology.expert
        self.topology, self.chunks = topology, chunks
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
        # Not in evaluation: a search step has few rows, and more messages would cost more.
        chunks = self.chunks if self.training else 1
        # A chunk takes every C-th token. Neighbors often have the same experts, so a chunk of neighbors would
        # load few ranks.
        messages = chunks * ranks
        chunk_of = torch.arange(experts.shape[0], device=experts.device)[:, None] % chunks
        message_of = torch.where(
            experts == DROPPED, messages, chunk_of * ranks + experts // self.local
        )  # [S, K]
        wanted = torch.zeros(messages + 1, experts.shape[0], dtype=torch.bool, device=experts.device)
        wanted = wanted.scatter_(0, message_of.t(), True)[:messages]  # [C R, S]
        choices = count(message_of.reshape(-1), messages + 1)[:messages]
        # For each rank and chunk: the rows sent to it, and the choices of its experts among them.
        send_counts = torch.stack([wanted.sum(1), choices], 1).view(chunks, ranks, 2).transpose(0, 1)
        receive_counts = exchange_counts(send_counts, group, self.traffic)
        at_home_count = choices.new_zeros(()) if at_home is None else (at_home != DROPPED).sum()
        # The only wait for the device, unless a learned router decides which experts have replicas.
        counts = torch.cat([send_counts, receive_counts, at_home_count.expand(1, chunks, 2)]).tolist()
        # By chunk and rank: the rows sent and received, and the choices received.
        send, receive, arriving = (
            [[of_rank[chunk][kind] for of_rank in of_ranks] for chunk in range(chunks)]
            for of_ranks, kind in ((counts[:ranks], 0), (counts[ranks:-1], 0), (counts[ranks:-1], 1))
        )
        self.traffic.rows += sum(sum(each) - each[self.topology.expert_rank] for each in send)
        message_of_row, rows = _places(wanted, sum(map(sum, send)))

        # Each row travels with the local numbers of its experts on the target rank (DROPPED for experts
        # elsewhere) and their weights.
        here = message_of[rows] == message_of_row[:, None]
        local = torch.where(here, experts[rows] % self.local, DROPPED).int()
        row = [tokens.index_select(0, rows), local, weights.float().index_select(0, rows)]
        returning = self._compute_elsewhere(row, send, receive, [sum(each) for each in arriving])
        own = None
        if at_home is not None:  # computed while the last rows return
            own = self.experts(tokens, at_home, weights, counts[-1][0][0], loan.replicas())
        returned = [arrive()[0] for arrive in returning]
        out = torch.zeros_like(tokens).index_add(0, rows, returned[0] if chunks == 1 else torch.cat(returned))
        return out if own is None else out + own

    def _compute_elsewhere(
        self, row: list[Tensor], send: list[list[int]], receive: list[list[int]], arriving: list[int]
    ) -> list[Callable[[], tuple[Tensor, ...]]]:
        """Send rows to the ranks of their experts, compute those that arrive, begin to return the outputs.

        ``row`` is what a row consists of, the chunks one after another. ``send`` and ``receive`` [C][R] count
        rows, ``arriving`` [C] the choices of local experts. Returns for each chunk a function that waits for
        the outputs of the rows that were sent.
        """
        assert self.topology.expert_group is not None
        more = self.topology.expert_group, self.traffic, len(send) > 1
        chunks = zip(*(part.split([sum(each) for each in send]) for part in row), strict=True)
        # All chunks leave before the first is computed.
        leaving = [begin_all_to_all(*each, *more) for each in zip(chunks, send, receive, strict=True)]
        returning = []
        for arrive, choices, received, sent in zip(leaving, arriving, receive, send, strict=True):
            rows, local, weights = arrive()
            outputs = self.experts(rows, local.long(), weights, choices)
            returning.append(begin_all_to_all([outputs], received, sent, *more))
        return returning


def _places(wanted: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the message and the token of each true element of ``wanted`` [C R, S]; there are ``total``.

    ``nonzero`` would wait for the device to count them.
    """
    flat = wanted.reshape(-1)
    place = torch.where(flat, flat.cumsum(0) - 1, total)  # unwanted elements go to an extra last place
    found = torch.empty(total + 1, dtype=torch.int64, device=flat.device)
    found = found.scatter_(0, place, torch.arange(len(flat), device=flat.device))[:total]
    return found // wanted.shape[1], found % wanted.shape[1]

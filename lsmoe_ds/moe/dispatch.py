"""Dispatch: send tokens to the ranks of their experts and back, without padding and without drops of its own.

With expert parallelism a token travels once to each rank that holds any of its experts, with these experts'
numbers and weights, in one message. That rank returns one row: the weighted sum of its experts' outputs.
Counts are exchanged once, rows by uneven all-to-all. Tensor-parallel peers hold the same tokens; each
dispatches a share of them. Choices of experts that have replicas stay on their rank.

If the ranks are on several machines (``parallel.node``), there are two stages of this: a token crosses the
network once to each machine that holds any of its experts, to the rank there with the sender's number. That
rank forwards it within the machine and returns the sum. "Tutel" (Hwang et al., 2023) also sends by machine.

In training, the rows may travel in several chunks: the experts compute one while others travel, in the
backward pass, too. "FasterMoE" (He et al., 2022) and "Tutel" do the same.

S tokens, H hidden, K top-k, R ranks of a stage, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
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


@dataclass(frozen=True)
class Stage:
    """Ranks among which rows travel. Each of them takes the rows for ``experts`` consecutive experts."""

    group: dist.ProcessGroup
    ranks: int
    rank: int  # of this process
    experts: int


def stages_of(total: int, topology: Topology) -> list[Stage]:
    """Return the stages by which rows reach the ranks of ``total`` experts: one, or two by machine."""
    expert, node, each = topology.expert, topology.node, total // topology.expert
    if topology.expert_group is None or expert == 1:
        return []
    if topology.across_group is None or topology.node_group is None:
        return [Stage(topology.expert_group, expert, topology.expert_rank, each)]
    machine, number = divmod(topology.expert_rank, node)
    return [
        Stage(topology.across_group, expert // node, machine, node * each),
        Stage(topology.node_group, node, number, each),
    ]


# Takes rows [n, H], the numbers [n, K] and weights [n, K] of their experts, and how many numbers are not
# DROPPED; returns the weighted sums of the experts' outputs, [n, H].
Compute = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Dispatcher(nn.Module):
    """Send tokens to their experts, on whichever rank, and combine the outputs."""

    def __init__(self, experts: list[nn.Module], total: int, topology: Topology, chunks: int = 1) -> None:
        super().__init__()
        self.experts = Experts(experts, topology)
        self.total, self.stages = total, stages_of(total, topology)
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
        if not self.stages:
            out: Tensor = self.experts(tokens, experts, weights, None if dropped else experts.numel())
            return out
        at_home, chosen = None, experts
        if replicated:
            loan = Loan(self.experts.deepspeed_experts, replicated, self.topology, self.traffic)
            at_home, experts = split(chosen, replicated, self.total)
        # Not in evaluation: a search step has few rows, and more messages would cost more.
        chunks = self.chunks if self.training else 1
        compute: Compute = self.experts
        for stage in self.stages[:0:-1]:  # the last first; each forwards what the one before brings
            compute = partial(self._forward_rows, stage, compute)
        begun = _Sending(self.stages[0], tokens, experts, weights, chunks, self.traffic, at_home)
        begun.send(compute)
        own = None
        if at_home is not None:  # computed while the last rows return
            own = self.experts(tokens, at_home, weights, begun.at_home, loan.replicas())
        out = begun.collect()
        return out if own is None else out + own

    def _forward_rows(
        self, stage: Stage, compute: Compute, rows: Tensor, numbers: Tensor, weights: Tensor, choices: int
    ) -> Tensor:
        """Send rows that have arrived on this machine to the ranks of their experts, and sum the outputs."""
        sending = _Sending(stage, rows, numbers, weights, 1, self.traffic)
        sending.send(compute)
        return sending.collect()


class _Sending:
    """Rows on their way through one stage, and back, in C chunks.

    ``tokens`` [S, H]; ``experts`` [S, K] are numbers among the experts of the stage's ranks, or DROPPED;
    ``weights`` [S, K]. ``at_home`` [S, K] are choices that do not travel; they are counted as well, because
    another count would wait for the device once more.
    """

    def __init__(
        self,
        stage: Stage,
        tokens: Tensor,
        experts: Tensor,
        weights: Tensor,
        chunks: int,
        traffic: Traffic,
        at_home: Tensor | None = None,
    ) -> None:
        self.stage, self.traffic, self.tokens, ranks = stage, traffic, tokens, stage.ranks
        # A chunk takes every C-th token. Neighbors often have the same experts, so a chunk of neighbors would
        # load few ranks.
        messages = chunks * ranks
        chunk_of = torch.arange(experts.shape[0], device=experts.device)[:, None] % chunks
        message_of = torch.where(
            experts == DROPPED, messages, chunk_of * ranks + experts // stage.experts
        )  # [S, K]
        wanted = torch.zeros(messages + 1, experts.shape[0], dtype=torch.bool, device=experts.device)
        wanted = wanted.scatter_(0, message_of.t(), True)[:messages]  # [C R, S]
        choices = count(message_of.reshape(-1), messages + 1)[:messages]
        # For each rank and chunk: the rows sent to it, and the choices of its experts among them.
        send_counts = torch.stack([wanted.sum(1), choices], 1).view(chunks, ranks, 2).transpose(0, 1)
        receive_counts = exchange_counts(send_counts, stage.group, traffic)
        at_home_count = choices.new_zeros(()) if at_home is None else (at_home != DROPPED).sum()
        # The only wait for the device, unless a learned router decides which experts have replicas.
        counts = torch.cat([send_counts, receive_counts, at_home_count.expand(1, chunks, 2)]).tolist()
        # By chunk and rank: the rows sent and received, and the choices received.
        self.sent, self.received, arriving = (
            [[of_rank[chunk][kind] for of_rank in of_ranks] for chunk in range(chunks)]
            for of_ranks, kind in ((counts[:ranks], 0), (counts[ranks:-1], 0), (counts[ranks:-1], 1))
        )
        self.arriving = [sum(each) for each in arriving]  # [C]
        self.at_home: int = counts[-1][0][0]
        traffic.rows += sum(sum(each) - each[stage.rank] for each in self.sent)
        message_of_row, self.rows = _places(wanted, sum(map(sum, self.sent)))

        # Each row travels with the local numbers of its experts on the target rank (DROPPED for experts
        # elsewhere) and their weights.
        here = message_of[self.rows] == message_of_row[:, None]
        local = torch.where(here, experts[self.rows] % stage.experts, DROPPED).int()
        # What a row consists of, the chunks one after another.
        self.row = [tokens.index_select(0, self.rows), local, weights.float().index_select(0, self.rows)]
        self.returning: list[Callable[[], tuple[Tensor, ...]]] = []

    def send(self, compute: Compute) -> None:
        """Send the rows, compute those that arrive, and begin to return the outputs."""
        more = self.stage.group, self.traffic, len(self.sent) > 1
        chunks = zip(*(part.split([sum(each) for each in self.sent]) for part in self.row), strict=True)
        # All chunks leave before the first is computed.
        ways = zip(chunks, self.sent, self.received, strict=True)
        leaving = [begin_all_to_all(*each, *more) for each in ways]
        arrivals = zip(leaving, self.arriving, self.received, self.sent, strict=True)
        for arrive, choices, received, sent in arrivals:
            rows, local, weights = arrive()
            outputs = compute(rows, local.long(), weights, choices)
            self.returning.append(begin_all_to_all([outputs], received, sent, *more))

    def collect(self) -> Tensor:
        """Wait for the outputs of the rows that were sent, and sum them by token: [S, H]."""
        returned = [arrive()[0] for arrive in self.returning]
        outputs = returned[0] if len(returned) == 1 else torch.cat(returned)
        return torch.zeros_like(self.tokens).index_add(0, self.rows, outputs)


def _places(wanted: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the message and the token of each true element of ``wanted`` [C R, S]; there are ``total``.

    ``nonzero`` would wait for the device to count them.
    """
    flat = wanted.reshape(-1)
    place = torch.where(flat, flat.cumsum(0) - 1, total)  # unwanted elements go to an extra last place
    found = torch.empty(total + 1, dtype=torch.int64, device=flat.device)
    found = found.scatter_(0, place, torch.arange(len(flat), device=flat.device))[:total]
    return found // wanted.shape[1], found % wanted.shape[1]

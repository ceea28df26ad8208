"""Dispatch: tokens to their experts and back. No token is dropped and none is padded.

Tokens are sorted by expert; with expert parallelism the counts are exchanged once, the tokens travel by an uneven
all-to-all, each expert runs over exactly its tokens, and the results travel back to be added with their weights.
Tensor-parallel peers, which hold the same tokens, each dispatch a share of them.

S tokens, H hidden, E experts, K top-k, R expert-parallel ranks, N = S K token copies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsmoe_ds.moe.routers import Routes
from lsmoe_ds.parallel.collectives import all_to_all, exchange_counts, join_rows, split_rows
from lsmoe_ds.parallel.compat import mark_expert_parameter
from lsmoe_ds.parallel.topology import Topology


class Experts(nn.Module):
    """The local experts. Kept as separate parameters: indexing one stacked parameter would make autograd write a
    gradient of full size for every expert. The name ``deepspeed_experts`` is how DeepSpeed files their weights."""

    def __init__(self, experts: list[nn.Module], topology: Topology) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(experts)
        for parameter in self.parameters():
            mark_expert_parameter(parameter, topology.expert)

    def forward(self, tokens: Tensor, counts: list[int]) -> Tensor:
        """Tokens [N, H] sorted by local expert, ``counts[e]`` of them for expert e -> [N, H]."""
        outputs = [
            # In training an expert without tokens still runs, over zero rows: every parameter gets a gradient on every rank.
            expert(part) if self.training or len(part) else part
            for expert, part in zip(self.deepspeed_experts, tokens.split(counts), strict=True)
        ]
        return torch.cat(outputs)


class Dispatcher(nn.Module):
    """Sends tokens to their experts, wherever these live, and combines what comes back."""

    def __init__(self, experts: list[nn.Module], total: int, topology: Topology) -> None:
        super().__init__()
        self.experts = Experts(experts, topology)
        self.total = total
        self.topology = topology

    def forward(self, tokens: Tensor, routes: Routes) -> Tensor:
        """Tokens [S, H] -> the weighted sum of their experts' outputs [S, H]."""
        group = self.topology.tensor_group
        if self.topology.tensor == 1 or group is None:
            return self._dispatch(tokens, routes.experts, routes.weights)
        own = self._dispatch(split_rows(tokens, group), split_rows(routes.experts, group), split_rows(routes.weights, group))
        return join_rows(own, tokens.shape[0], group)

    def _dispatch(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        top_k = experts.shape[1]
        flat = experts.reshape(-1)  # [N]
        order = flat.argsort(stable=True)  # copies in the order of their experts
        counts = torch.bincount(flat, minlength=self.total)  # [E]
        copies = tokens[order // top_k]
        outputs = self._exchange(copies, counts) if self.topology.expert > 1 else self.experts(copies, counts.tolist())
        weighted = outputs * weights.reshape(-1)[order][:, None]
        return torch.zeros_like(tokens).index_add(0, order // top_k, weighted.to(tokens.dtype))

    def _exchange(self, copies: Tensor, counts: Tensor) -> Tensor:
        group, ranks = self.topology.expert_group, self.topology.expert
        assert group is not None
        sent = counts.view(ranks, -1)  # [R, E / R]
        received = exchange_counts(sent, group)  # [R, E / R]: row r counts what rank r sends to each local expert
        send, receive = sent.sum(1).tolist(), received.sum(1).tolist()
        arrived = all_to_all(copies, send, receive, group)
        # Arrived by sender, then expert; the experts want them by expert, then sender.
        local = torch.arange(received.shape[1], device=copies.device).repeat(ranks).repeat_interleave(received.reshape(-1))
        by_expert = local.argsort(stable=True)
        outputs = self.experts(arrived[by_expert], received.sum(0).tolist())
        back = torch.empty_like(by_expert).scatter_(0, by_expert, torch.arange(by_expert.shape[0], device=by_expert.device))
        return all_to_all(outputs[back], receive, send, group)

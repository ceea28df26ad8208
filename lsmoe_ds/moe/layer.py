"""The mixture-of-experts layer, in the shape by which DeepSpeed's engine recognizes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lsmoe_ds.config import MoE
from lsmoe_ds.languages import Languages, SentenceIds
from lsmoe_ds.moe.dispatch import Dispatcher
from lsmoe_ds.moe.losses import balance_loss, expert_shares
from lsmoe_ds.moe.routers import ROUTERS
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology


@dataclass
class RoutingRecord:
    """What one MoE layer did with one micro-batch."""

    balance: Tensor  # scalar, with gradient
    coefficient: float
    shares: Tensor  # [E], share of first choices


class MixtureOfExperts(compat.import_moe_base()):  # type: ignore[misc]
    """E feed-forwards, of which each token uses K.

    A subclass of ``deepspeed.moe.layer.MoE`` so that the engine reduces expert gradients over the right ranks and files
    each expert's weights under its global number; the parent's constructor, gate and dispatch are not used.
    """

    def __init__(self, hidden: int, settings: MoE, expert: Callable[[], nn.Module], languages: Languages, topology: Topology) -> None:
        nn.Module.__init__(self)
        # Names that DeepSpeed reads.
        self.num_experts = settings.experts
        self.ep_size = topology.expert
        self.num_local_experts = settings.experts // topology.expert
        self.expert_group_name = compat.expert_group_name(topology.expert)
        self.deepspeed_moe = Dispatcher([expert() for _ in range(self.num_local_experts)], settings.experts, topology)
        self.settings = settings
        # The router stands beside the dispatcher: DeepSpeed drops or misfiles router weights below a name with "expert".
        self.router = ROUTERS[settings.routing](hidden, settings, languages)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are built already, by Topology."""

    def forward(self, x: Tensor, real: Tensor, ids: SentenceIds, records: list[RoutingRecord] | None = None) -> Tensor:
        """x [B, T, H] -> [B, T, H]. Only positions where ``real`` [B, T] is true are routed; the others give zeros.

        In training a record is appended to ``records``.
        """
        batch, length, hidden = x.shape
        flat = x.reshape(-1, hidden)
        index = real.reshape(-1).nonzero().squeeze(1)
        tokens = flat[index]
        tasks = ids.task(self.settings.task)[:, None].expand(batch, length).reshape(-1)[index]
        routes = self.router(tokens, tasks)
        if records is not None:
            shares = expert_shares(routes, self.num_experts)
            records.append(RoutingRecord(balance_loss(routes), self.settings.balance, shares))
        return torch.zeros_like(flat).index_copy(0, index, self.deepspeed_moe(tokens, routes)).view(batch, length, hidden)

"""The mixture-of-experts layer, in the form that DeepSpeed's engine recognizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lsmoe_ds.config.moe import MoE
from lsmoe_ds.directions import Languages
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.moe.dispatch import Dispatcher
from lsmoe_ds.moe.losses import NAME, record_routing
from lsmoe_ds.moe.routers import ROUTERS, RouterByTask, RouterInputs, Routes, limit
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology


@dataclass(frozen=True)
class Seen:
    """What a layer did with S tokens."""

    tokens: Tensor  # [S, H]: what the layer read
    sentences: Tensor  # [S]: the sentence of each token in the batch
    tasks: Tensor  # [S]
    routes: Routes


class MixtureOfExperts(compat.import_moe_base()):  # type: ignore[misc]
    """E feed-forwards, of which each token uses K, and with ``shared`` one more for the shared route.

    The class derives from ``deepspeed.moe.layer.MoE`` so that the engine reduces expert gradients over the
    right ranks and saves each expert's weights under its global number. The parent's constructor, gate and
    dispatch are not used.
    """

    def __init__(
        self,
        hidden: int,
        settings: MoE,
        expert: Callable[[], nn.Module],
        languages: Languages,
        topology: Topology,
        shared: nn.Module | None = None,
    ) -> None:
        nn.Module.__init__(self)
        # Names that DeepSpeed reads.
        self.num_experts = settings.experts
        self.ep_size = topology.expert
        self.num_local_experts = settings.experts // topology.expert
        self.expert_group_name = compat.expert_group_name(topology.expert)
        self.deepspeed_moe = Dispatcher(
            [expert() for _ in range(self.num_local_experts)], settings.experts, topology, settings.chunks
        )
        self.settings = settings
        # The router is outside the dispatcher: DeepSpeed drops or misfiles router weights below a name with
        # "expert".
        self.router = ROUTERS[settings.routing](hidden, settings, languages)
        self.shared = shared
        self.replicated = settings.replicated(languages) if topology.expert > 1 else []  # tasks
        self.observer: Callable[[Seen], None] | None = None  # set by analyses

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: Topology has built the groups already."""

    def route(
        self, x: Tensor | None, real: Tensor, context: LanguageContext
    ) -> tuple[Tensor, Tensor, Routes]:
        """Return the index of the real positions among B T, their hidden states, and their routes.

        ``x`` [B, T, H] may be None if the router uses only the task. The B sentences are the first B of
        ``real`` [B or more, T] and of ``context``.
        """
        batch, length = len(real if x is None else x), real.shape[1]
        index = context.places(real, batch)
        rows = index // length
        tasks = context.ids.task(self.settings.task)[rows]
        summary = None
        if self.settings.routing == "sentence":
            summary = context.summary
            if summary is not None:
                summary = summary[: context.sentence_count(batch)]
            else:
                assert x is not None
                summary = context.mean(x, real)
        tokens = real.new_empty(0) if x is None else x.reshape(batch * length, -1)
        if x is not None and index.shape[0] < batch * length:
            tokens = tokens.index_select(0, index)
        return index, tokens, self.router(tokens, RouterInputs(context.sentences(rows), tasks, summary))

    def forward(self, x: Tensor, real: Tensor, context: LanguageContext) -> Tensor:
        """Apply the experts, the shared feed-forward, or each to half of the batch, as the route says.

        ``x`` [B, T, H] -> [B, T, H]. Only positions where ``real`` [B, T] is true are routed. At the others
        the specific route returns zeros and the shared route returns meaningless values.
        """
        if self.shared is None or context.route == "specific":
            return self._by_experts(x, real, context)
        if context.route == "shared":
            out: Tensor = self.shared(x)
            return out
        half = x.shape[0] // 2
        return torch.cat([self._by_experts(x[:half], real, context), self.shared(x[half:])])

    def _by_experts(self, x: Tensor, real: Tensor, context: LanguageContext) -> Tensor:
        index, tokens, chosen = self.route(x, real, context)
        kept, capacity = chosen, self.settings.capacity
        if (
            capacity is not None
            and (factor := capacity.training if self.training else capacity.evaluation) is not None
        ):
            kept = limit(chosen, capacity, factor)
        if context.notes is not None:
            context.note(NAME, record_routing(self.settings, chosen, kept))
        if self.observer is not None:
            rows = index // x.shape[1]
            tasks = context.ids.task(self.settings.task)[rows]
            self.observer(Seen(tokens, context.sentences(rows), tasks, kept))
        lent: list[int] = []
        # Not in evaluation: a search step has few tokens, and sending weights would cost more than rows.
        if self.training and self.replicated:
            assert isinstance(self.router, RouterByTask)
            lent = self.router.experts_of(self.replicated)
        out = self.deepspeed_moe(
            tokens, kept.experts, kept.weights, dropped=kept is not chosen, replicated=lent
        )
        if out.shape[0] < (places := x.shape[0] * x.shape[1]):
            out = x.new_zeros(places, x.shape[2]).index_copy(0, index, out)
        return out.view_as(x)

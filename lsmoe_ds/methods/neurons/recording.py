"""Record which hidden units of feed-forwards are active on which directions.

B sentences, T positions, D directions, F units, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.data.batches import Batch, PairBatch
from lsmoe_ds.languages import PAD
from lsmoe_ds.methods.neurons.settings import Per
from lsmoe_ds.methods.sites import UnitsSite
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.model.transformer import Transformer
    from lsmoe_ds.moe.layer import Seen


class Recorder:
    """Count, for each direction, in how many sentences or at how many tokens each unit is active.

    ``counts`` has int64 [D, F] for each feed-forward, by the name of its units; on a tensor-parallel rank F
    counts that rank's units. Padding is not counted; tags and EOS are. A unit is active where its value after
    relu is positive.
    """

    def __init__(self, model: Transformer, directions: int, per: Per, device: torch.device) -> None:
        self.model, self.per, self.directions, self.device = model, per, directions, device
        self.counts: dict[str, Tensor] = {}
        self.sentences = torch.zeros(directions, dtype=torch.int64, device=device)
        self._real: dict[str, Tensor] = {}  # [B, T] of each side
        self._direction = torch.empty(0)  # [B]

    @torch.no_grad()
    def read(self, batch: PairBatch) -> None:
        """Run the model on a batch and count activations. Sentences without labels do not count."""
        counted = (batch.labels != PAD).any(1)
        self._real = {
            "encoder": (batch.source != PAD) & counted[:, None],
            "decoder": (batch.decoder_input != PAD) & counted[:, None],
        }
        self._direction = batch.direction
        self.sentences.index_add_(0, batch.direction, counted.long())
        self.model.states(batch.source, batch.decoder_input, batch.ids)

    def feed_forward(self, at: str, side: str) -> Callable[[Tensor], None]:
        """Return an observer that receives a feed-forward's units after relu, [B, T, F]."""

        def observe(values: Tensor) -> None:
            active = (values > 0) & self._real[side][:, :, None]
            found = active.any(1) if self.per == "sentence" else active.sum(1)
            self._of(at, values.shape[2]).index_add_(0, self._direction, found.long())

        return observe

    def experts(self, at: str, side: str, experts: Sequence[nn.Module]) -> Callable[[Seen], None]:
        """Return an observer of an MoE layer, all of whose experts are on this rank."""

        def observe(seen: Seen) -> None:
            counted = self._real[side].any(1)[seen.sentences]
            for number, expert in enumerate(experts):
                rows = ((seen.routes.experts == number).any(1) & counted).nonzero().squeeze(1)
                active = (F.relu(expert.expand(seen.tokens[rows])) > 0).long()  # type: ignore[operator]
                found = active.new_zeros(len(self._direction), active.shape[1])
                found.index_add_(0, seen.sentences[rows], active)
                if self.per == "sentence":
                    found.clamp_(max=1)
                counts = self._of(f"{at}.experts.{number}.units", active.shape[1])
                counts.index_add_(0, self._direction, found)

        return observe

    def _of(self, at: str, units: int) -> Tensor:
        if at not in self.counts:
            self.counts[at] = torch.zeros(self.directions, units, dtype=torch.int64, device=self.device)
        return self.counts[at]


@contextmanager
def observed(recorder: Recorder, experts: bool = False) -> Iterator[None]:
    """Let the recorder observe all feed-forwards inside the block; with ``experts`` also MoE layers."""
    model = recorder.model
    was_training = model.training
    model.eval()
    modules: list[Any] = []
    for site in model.sites():
        if isinstance(site, UnitsSite):
            modules.append(site.module)
            modules[-1].observer = recorder.feed_forward(site.at, site.side)
    for name, (side, layer) in zip(model.moe_names, model.moe_layers() if experts else (), strict=False):
        modules.append(layer)
        own = list(layer.deepspeed_moe.experts.deepspeed_experts)
        layer.observer = recorder.experts(f"{name}.feed_forward", side, own)
    try:
        yield
    finally:
        for module in modules:
            module.observer = None
        model.train(was_training)


def record(
    model: Transformer, batches: Iterable[Batch], directions: int, per: Per, topology: Topology
) -> tuple[dict[str, Tensor], Tensor]:
    """Run the model on each rank's own batches and count activations over all ranks.

    Returns, on the CPU, the whole counts [D, F] by the name of the units, and the number of sentences of each
    direction [D].
    """
    recorder = Recorder(model, directions, per, topology.device)
    with observed(recorder):
        for batch in batches:
            assert isinstance(batch, PairBatch)
            recorder.read(batch.to(topology.device))
    if topology.data > 1:
        for each in (*recorder.counts.values(), recorder.sentences):
            dist.all_reduce(each, group=topology.data_group)
    counts = {at: _all_units(each, topology).cpu() for at, each in recorder.counts.items()}
    return counts, recorder.sentences.cpu()


def _all_units(counts: Tensor, topology: Topology) -> Tensor:
    """Join the counts [D, F / t] of all t tensor-parallel ranks."""
    if topology.tensor == 1:
        return counts
    parts = [torch.empty_like(counts) for _ in range(topology.tensor)]
    dist.all_gather(parts, counts, group=topology.tensor_group)
    return torch.cat(parts, 1)

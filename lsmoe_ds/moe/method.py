"""Mixtures of experts as a method: each layer's balance loss and z-loss, and the share of dropped choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import Direction, SentenceIds
from lsmoe_ds.methods.base import Draw, Method, StepSize
from lsmoe_ds.methods.context import LanguageContext, Route
from lsmoe_ds.moe.losses import NAME, RoutingRecord, balance_loss, count_first_choices, z_loss
from lsmoe_ds.parallel.topology import Topology


class MixturesOfExperts(Method):
    """Add the auxiliary losses of routing.

    A note is the :class:`RoutingRecord` of one layer. The totals are, for each layer, the number of tokens
    whose first choice is each expert [E].
    """

    name = NAME
    metrics = ("balance", "z_loss", "dropped")

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        super().__init__(None, recipe, topology)
        self.model = recipe.model
        self.sides = [side for side, _, _ in recipe.model.moe_layers()]

    def owns(self, name: str) -> bool:
        """Tell whether a parameter belongs to experts, a router, or a feed-forward distilled from experts."""
        return any(f".feed_forward.{part}." in name for part in ("experts", "router", "shared"))

    def initial(self, name: str) -> Draw | None:
        """Draw router weights from a normal distribution with standard deviation 0.1."""
        return (
            (lambda value, generator: value.normal_(0.0, 0.1, generator=generator))
            if ".router." in name
            else None
        )

    def merge(self, weights: Tensors, direction: Direction | None, route: Route) -> Tensors:
        """Return the weights as they are: :mod:`lsmoe_ds.export.subnetwork` joins experts."""
        return weights

    def count(self, notes: Sequence[RoutingRecord]) -> list[Tensor]:
        return [record.counts for record in notes]

    def count_ahead(self, model: Any, real: Mapping[str, Tensor], ids: SentenceIds) -> list[Tensor] | None:
        """Count first choices from the tasks alone; None if a router reads hidden states."""
        layers = model.moe_layers()
        if any(layer.router.reads_tokens for _, layer in layers):
            return None
        routes = [
            (layer.settings, layer.route(None, real[side], LanguageContext(ids))[2]) for side, layer in layers
        ]
        return [
            self.model.routed(settings) * count_first_choices(each, settings.experts)
            for settings, each in routes
        ]

    def losses(
        self, notes: Sequence[RoutingRecord], totals: list[Tensor], size: StepSize
    ) -> dict[str, Tensor]:
        balance = z = torch.zeros((), device=totals[0].device)
        for side, record, chosen in zip(self.sides, notes, totals, strict=True):
            routed = self.model.routed(record.settings) * size.tokens(side)
            balance = balance + record.settings.balance_loss_weight * balance_loss(record, chosen, routed)
            z = z + record.settings.z_loss_weight * z_loss(record, routed)
        return {"balance": balance, "z_loss": z}

    def sums(self, notes: Sequence[RoutingRecord]) -> dict[str, Tensor | float]:
        return {
            "dropped": torch.stack([record.dropped for record in notes]).sum(),
            "choices": sum(record.choices for record in notes),
        }

    def measure(self, sums: Mapping[str, float], totals: list[Tensor], size: StepSize) -> dict[str, float]:
        share = sums["dropped"] / max(sums["choices"], 1)
        return {"balance": sums["balance"], "z_loss": sums["z_loss"], "dropped": share}

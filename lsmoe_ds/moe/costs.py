"""What experts cost: parameters, traffic between ranks, arithmetic, activations.

H hidden, F feed-forward width, E experts, K top-k, R expert-parallel ranks. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, lcm

from lsmoe_ds.config.method import Held
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import Count, count_feed_forward


def count_router(hidden: int, settings: MoE, tasks: int) -> Count:
    """Count a router: token and sentence routing E H, with a bias E (H + 1), task routing tasks E, static nothing."""
    rows = {"token": hidden, "sentence": hidden, "task": tasks, "static": 0}[settings.routing]
    return Count(whole=(rows + settings.router_bias) * settings.experts)


def count_layer(hidden: int, width: int, settings: MoE, tasks: int, serving: bool = False, held: Held = "all") -> Count:
    """Count a layer of experts of ``width`` F, its router and its shared feed-forward, if it has one.

    ``serving``: what must be loaded to translate one direction ("Beyond Distillation", section 3.2). A layer that is
    routed by token or sentence needs all its experts and the router; of one that is routed by task or statically the
    K experts are known beforehand, and joined into one feed-forward of width K F. A shared feed-forward is left out
    where ``held`` is "specific" or "merged", and stands alone where it is "shared".
    """
    if settings.has_shared and held == "shared":
        return count_feed_forward(hidden, width)
    total = Count()
    if settings.has_shared and held == "all":
        total += count_feed_forward(hidden, width)
    if serving and settings.by_task:
        return total + count_feed_forward(hidden, settings.top_k * width)
    experts = Count(expert=settings.experts * count_feed_forward(hidden, width).total)
    return total + experts + count_router(hidden, settings, tasks)


def flops(hidden: int, width: int, settings: MoE, length: int, shared: bool) -> int:
    """Count the operations of a token, of sentences of ``length`` L: experts K (4 H F + 2 H), a token router 2 H E, a
    sentence router 2 H E / L. By the ``shared`` route that has a feed-forward of its own: 4 H F.
    """
    each = 4 * hidden * width
    if shared and settings.has_shared:
        return each
    router = {"token": 2 * hidden * settings.experts, "sentence": 2 * hidden * settings.experts // length}
    return settings.top_k * (each + 2 * hidden) + router.get(settings.routing, 0)


def values(hidden: int, width: int, settings: MoE) -> float:
    """Count the values that a token leaves for the backward pass, K (2 H + F); the mean of both routes, where the
    shared one has a feed-forward of its own.
    """
    experts = settings.top_k * (2 * hidden + width)
    return (experts + width) / 2 if settings.has_shared else experts


def bytes_per_row(hidden: int, top_k: int, value_bytes: int, training: bool, learned: bool = True) -> int:
    """Bytes that one row costs which leaves its rank for another that holds experts of it.

    Out and back: 2 H values. The numbers and weights of its experts go out as 2 K float32. In training the gradients of all
    this take the same ways: 4 H values + 4 K float32. Static routing has no ``learned`` weights, so no gradient of them.
    """
    ways = 2 if training else 1
    return ways * 2 * hidden * value_bytes + (ways if learned else 1) * 2 * top_k * 4


def rows_at_random(experts: int, top_k: int, ranks: int, groups: int = 1) -> float:
    """Rows that leave their rank per token and layer, expected where K distinct experts are chosen at random.

    A token goes once to each rank that holds at least one of its experts, and a row to its own rank costs nothing::

        (R - 1) (1 - C(E - E/R, K) / C(E, K))

    With ``groups`` the choice is among the E / groups experts of a random group, which stand side by side.
    """
    each, block = experts // groups, experts // ranks
    reached = 0.0
    for group in range(groups):
        for rank in range(ranks):
            held = max(0, min((group + 1) * each, (rank + 1) * block) - max(group * each, rank * block))
            reached += 1 - comb(each - held, top_k) / comb(each, top_k)
    return reached / groups * (ranks - 1) / ranks


def rows_at_home(settings: MoE, affine: MoE | None, ranks: int, tensor: int) -> float | None:
    """The same where every task-affine batch is on a rank that holds its task's experts; None where no such rank exists.

    That is 0, but for tensor-parallel peers: they share a batch's tokens, and only some of them hold the experts.
    """
    follows = affine is not None and (settings.task, settings.expert_groups) == (affine.task, affine.expert_groups)
    if not settings.by_task or not follows or settings.expert_groups % ranks:
        return None
    away, met = 0.0, 0
    for first in range(0, lcm(tensor, ranks), tensor):
        peers = [rank % ranks for rank in range(first, first + tensor)]
        for home in set(peers):
            away, met = away + sum(rank != home for rank in peers) / tensor, met + 1
    return away / met


@dataclass(frozen=True)
class Exchange:
    """What expert parallelism sends between ranks, for one side's layers with experts."""

    side: str
    layers: int
    row_bytes: int  # training
    row_bytes_inference: int
    rows: float  # that leave, per token and layer, experts chosen at random
    rows_home: float | None  # the same with all task-affine batches at home
    routed: int  # times, of each token in training: twice where both routes are trained, unless a shared feed-forward takes one route
    count_bytes: int  # leaving each rank, per layer and micro-batch: one int64 for each other rank

    def token_bytes(self, at_home: bool = False) -> float:
        """Per token of this side that is routed, through all its layers, forward and backward."""
        rows = self.rows_home if at_home and self.rows_home is not None else self.rows
        return self.layers * rows * self.row_bytes


def exchanges(recipe: Recipe, value_bytes: int) -> list[Exchange]:
    """Of each side that has experts; nothing without expert parallelism."""
    model, layout = recipe.model, recipe.parallel
    found = []
    for name, side in (("encoder", model.encoder), ("decoder", model.decoder)):
        layers = sum(side.is_moe(layer) for layer in range(side.layers))
        if side.moe is not None and layers and layout.expert > 1:
            moe, learned = side.moe, side.moe.routing != "static"
            found.append(
                Exchange(
                    side=name,
                    layers=layers,
                    row_bytes=bytes_per_row(model.hidden, moe.top_k, value_bytes, True, learned),
                    row_bytes_inference=bytes_per_row(model.hidden, moe.top_k, value_bytes, False, learned),
                    rows=rows_at_random(moe.experts, moe.top_k, layout.expert, moe.expert_groups),
                    rows_home=rows_at_home(moe, model.affine, layout.expert, layout.tensor),
                    routed=model.routed(moe),
                    count_bytes=8 * (layout.expert - 1),
                )
            )
    return found

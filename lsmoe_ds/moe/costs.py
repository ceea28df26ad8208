"""What experts cost: parameters, traffic between ranks, arithmetic, activations.

H hidden, F feed-forward width, E experts, K top-k, R expert-parallel ranks. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import comb, lcm
from typing import Literal

from lsmoe_ds.config.method import Held
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import Count, MatrixProduct, SublayerShape, count_feed_forward
from lsmoe_ds.moe.load import Load


def count_router(hidden: int, settings: MoE, tasks: int) -> Count:
    """Count a router: token and sentence routing E H, with a bias E (H + 1), task routing tasks E, static
    nothing.
    """
    rows = {"token": hidden, "sentence": hidden, "task": tasks, "static": 0}[settings.routing]
    return Count(whole=(rows + settings.router_bias) * settings.experts)


def count_layer(
    hidden: int, width: int, settings: MoE, tasks: int, serving: bool = False, held: Held = "all"
) -> Count:
    """Count a layer of experts of ``width`` F, its router and its shared feed-forward, if it has one.

    ``serving`` counts what must be loaded to translate one direction ("Beyond Distillation", section 3.2). A
    layer routed by token or sentence needs all its experts and the router. In a layer routed by task or
    statically the K experts are known beforehand and joined into one feed-forward of width K F. The shared
    feed-forward is left out if ``held`` is "specific"; it is all that counts if ``held`` is "shared".
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


def products(
    site: SublayerShape, width: int, settings: MoE, length: int, shared: bool
) -> list[MatrixProduct]:
    """List the matrix products of one token, in sentences of ``length`` L tokens.

    A token router takes 2 H E, a sentence router 2 H E / L, the sum of the experts' outputs, by the weights
    that the router gives, 2 K H, and experts 4 K H F. The ``shared`` route of a layer that has a shared
    feed-forward takes 4 H F.
    """
    at, hidden, reading = site.at, site.hidden, 2 * site.hidden * settings.experts

    def feed_forward(name: str, count: int) -> list[MatrixProduct]:
        each = 2 * count * hidden * width
        return [
            MatrixProduct(each, f"{at}.{name}.expand.weight", (f"{at}.{name}.expand.bias",)),
            MatrixProduct(
                each, f"{at}.{name}.contract.weight", (f"{at}.{name}.contract.bias",), reads="before"
            ),
        ]

    if shared and settings.has_shared:
        return feed_forward("shared", 1)
    router, beside, found = f"{at}.router.weight", (f"{at}.router.bias",), []
    if settings.routing == "token":
        found = [MatrixProduct(reading, router, beside)]
    elif settings.routing == "sentence":
        # In the decoder a mean over positions would include later ones.
        summary: Literal["memory", "input"] = "memory" if site.side == "decoder" else "input"
        found = [MatrixProduct(reading // length, router, beside, summary)]
    elif settings.routing == "task":
        found = [MatrixProduct(0, router, reads="before")]
    # The gradients of the experts' outputs are multiples of their sum's: only the weights' take a product.
    combine = MatrixProduct(2 * settings.top_k * hidden, None, reads="before")
    # The experts of a layer train together, so the first stands for all.
    return [*found, combine, *feed_forward("experts.0", settings.top_k)]


def values(hidden: int, width: int, settings: MoE) -> float:
    """Count the values that a token stores for the backward pass, K (2 H + F).

    In a layer with a shared feed-forward: the mean of both routes.
    """
    experts = settings.top_k * (2 * hidden + width)
    return (experts + width) / 2 if settings.has_shared else experts


def bytes_per_row(hidden: int, top_k: int, value_bytes: int, training: bool, learned: bool = True) -> int:
    """Count the bytes sent for one row that travels to another rank's experts and back.

    The row and its result are 2 H values. Its experts' numbers are K int32 and their weights K float32. In
    training the gradients travel too: 4 H values and 3 K numbers of 4 bytes in all. Without ``learned``
    weights (static routing) the weights have no gradient.
    """
    ways = 2 if training else 1
    return ways * 2 * hidden * value_bytes + (1 + (ways if learned else 1)) * top_k * 4


def rows_at_random(experts: int, top_k: int, ranks: int, groups: int = 1) -> float:
    """Return the expected rows that leave their rank, per token and layer, for K random distinct experts.

    A token goes once to each rank that holds at least one of its experts; to its own rank it costs nothing::

        (R - 1) (1 - C(E - E/R, K) / C(E, K))

    With ``groups`` the choice is among the E / groups consecutive experts of a random group.
    """
    each, block = experts // groups, experts // ranks
    reached = 0.0
    for group in range(groups):
        for rank in range(ranks):
            held = max(0, min((group + 1) * each, (rank + 1) * block) - max(group * each, rank * block))
            reached += 1 - comb(each - held, top_k) / comb(each, top_k)
    return reached / groups * (ranks - 1) / ranks


def rows_at_home(settings: MoE, affine: MoE | None, ranks: int, tensor: int) -> float | None:
    """Return the rows that leave their rank, per token and layer, if each batch is on its experts' rank.

    ``affine`` are the experts that task-affine batches follow. The result is 0, except with tensor-parallel
    peers: they share a batch's tokens, and only some of them hold the experts. None if no rank holds all
    experts of a task, or the batches do not follow this layer's experts.
    """
    follows = affine is not None and (settings.task, settings.expert_groups) == (
        affine.task,
        affine.expert_groups,
    )
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
    rows: float  # rows that leave their rank, per token and layer, with experts chosen at random
    rows_home: float | None  # the same if each task-affine batch is on a rank that holds its experts
    # How often each token is routed in training: twice where both routes are trained, unless a shared
    # feed-forward takes one of them.
    routed: int
    at_home: float  # share of the tokens whose experts have replicas: they do not travel
    lent_bytes: int  # of the weights of replicas, that each rank sends on average, per forward pass
    lent_bytes_back: int  # of their gradients, per backward pass: sums in float32
    count_bytes: int  # that leave each rank, per layer and micro-batch: two int64 counts for each other rank

    def token_bytes(self, at_home: bool = False, ahead: bool = False) -> float:
        """Return the bytes per routed token of this side, over all its layers, forward and backward, and in
        one more forward pass if that goes ``ahead``.
        """
        rows = self.rows_home if at_home and self.rows_home is not None else self.rows
        rows *= 1 - self.at_home
        return self.layers * rows * (self.row_bytes + ahead * self.row_bytes_inference)


def exchanges(recipe: Recipe, value_bytes: int, of_sides: Iterable[Load] = ()) -> list[Exchange]:
    """Return the exchange of each side that has experts; an empty list without expert parallelism.

    With activation checkpointing the rows of a forward pass travel twice. The loads ``of_sides`` tell what
    replicas change: the owner of an expert sends its weights to each of the R - 1 other ranks, and they send
    gradients back, in each micro-batch.
    """
    known = {load.side: load for load in of_sides}
    model, layout, again = recipe.model, recipe.parallel, recipe.training.activation_checkpointing
    found = []
    for name, side in (("encoder", model.encoder), ("decoder", model.decoder)):
        layers = sum(side.is_moe(layer) for layer in range(side.layers))
        if side.moe is not None and layers and layout.expert > 1:
            moe, learned = side.moe, side.moe.routing != "static"
            training, inference = (
                bytes_per_row(model.hidden, moe.top_k, value_bytes, each, learned) for each in (True, False)
            )
            load = known.get(name)
            lent = 0 if load is None else load.lent * (layout.expert - 1) // layout.expert
            found.append(
                Exchange(
                    side=name,
                    layers=layers,
                    row_bytes=training + again * inference,
                    row_bytes_inference=inference,
                    rows=rows_at_random(moe.experts, moe.top_k, layout.expert, moe.expert_groups),
                    rows_home=rows_at_home(moe, model.affine, layout.expert, layout.tensor),
                    routed=model.routed(moe),
                    at_home=0.0 if load is None else load.share,
                    lent_bytes=value_bytes * lent,
                    lent_bytes_back=4 * lent,
                    count_bytes=16 * (layout.expert - 1),
                )
            )
    return found

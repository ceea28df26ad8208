"""The costs of experts: parameters, traffic between ranks, arithmetic, activations.

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
    """Count a router's parameters.

    Token and sentence routing: E H, or with a bias E (H + 1). Task routing: tasks x E. Static routing: none.
    """
    rows = {"token": hidden, "sentence": hidden, "task": tasks, "static": 0}[settings.routing]
    return Count(whole=(rows + settings.router_bias) * settings.experts)


def count_layer(
    hidden: int, width: int, settings: MoE, tasks: int, serving: bool = False, held: Held = "all"
) -> Count:
    """Count a layer of experts of ``width`` F, its router and its shared feed-forward, if it has one.

    ``serving`` counts what must be loaded to translate one direction ("Beyond Distillation", section 3.2). A
    layer routed by token or sentence needs all its experts and the router. In a layer routed by task or
    statically the K experts are known beforehand and joined into one feed-forward of width K F. If ``held``
    is "specific", the shared feed-forward is left out; if it is "shared", nothing else is counted.
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

    A token router needs 2 H E operations, a sentence router 2 H E / L, the weighted sum of the experts'
    outputs 2 K H, and the experts 4 K H F. The ``shared`` route of a layer with a shared feed-forward needs
    4 H F.
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
    # The gradient of each expert's output is the gradient of the sum, scaled: only the gradients of the
    # weights need a product.
    combine = MatrixProduct(2 * settings.top_k * hidden, None, reads="before")
    # The experts of a layer train together, so the first stands for all.
    return [*found, combine, *feed_forward("experts.0", settings.top_k)]


def values(hidden: int, width: int, settings: MoE) -> float:
    """Count the values stored per token for the backward pass, K (2 H + F).

    In a layer with a shared feed-forward this is the mean of both routes.
    """
    experts = settings.top_k * (2 * hidden + width)
    return (experts + width) / 2 if settings.has_shared else experts


def bytes_per_row(hidden: int, top_k: int, value_bytes: int, training: bool, learned: bool = True) -> int:
    """Count the bytes sent for one row that travels to another rank's experts and back.

    The row and its result have 2 H values. Its experts' numbers are K int32 and their weights K float32. In
    training gradients travel too, so the total is 4 H values and 3 K numbers of 4 bytes. Without ``learned``
    weights (static routing) the weights have no gradient.
    """
    ways = 2 if training else 1
    return ways * 2 * hidden * value_bytes + (1 + (ways if learned else 1)) * top_k * 4


def rows_at_random(experts: int, top_k: int, ranks: int, groups: int = 1) -> float:
    """Return the expected rows that leave their rank, per token and layer, for K random distinct experts.

    A token goes once to each rank that holds at least one of its experts; staying on its own rank is free::

        (R - 1) (1 - C(E - E/R, K) / C(E, K))

    With ``groups`` the choice is among the E / groups consecutive experts of a random group. With machines in
    the place of ranks, these are the rows that cross the network if they cross it once to each machine.
    """
    each, block = experts // groups, experts // ranks
    reached = 0.0
    for group in range(groups):
        for rank in range(ranks):
            held = max(0, min((group + 1) * each, (rank + 1) * block) - max(group * each, rank * block))
            reached += 1 - comb(each - held, top_k) / comb(each, top_k)
    return reached / groups * (ranks - 1) / ranks


@dataclass(frozen=True)
class Rows:
    """The rows that leave their rank, per token and layer."""

    sent: float  # by the ranks of the tokens
    forwarded: float = 0.0  # by ranks to others of their machine

    @property
    def all(self) -> float:
        return self.sent + self.forwarded


def random_rows(settings: MoE, ranks: int, node: int) -> Rows:
    """Return the rows that leave their rank for K random distinct experts.

    With ``node`` above 1, rows are forwarded among so many ranks: the rank at which a row arrives forwards it
    to each other rank of its machine that holds any of its experts.
    """

    def leaving(ranks: int) -> float:
        return rows_at_random(settings.experts, settings.top_k, ranks, settings.expert_groups)

    if node == 1:
        return Rows(leaving(ranks))
    reached = leaving(ranks) * ranks / (ranks - 1)
    return Rows(leaving(ranks // node), reached * (node - 1) / node)


def rows_at_home(settings: MoE, affine: MoE | None, ranks: int, tensor: int, node: int = 1) -> Rows | None:
    """Return the rows that leave their rank if each batch is on its experts' rank.

    ``affine`` has the experts by which task-affine batches are assigned to ranks. No rows leave, except with
    tensor-parallel peers, which share a batch's tokens although only some of them hold the experts. None if
    no rank holds all experts of a task, or if batches are not assigned by this layer's experts.
    """
    follows = affine is not None and (settings.task, settings.expert_groups) == (
        affine.task,
        affine.expert_groups,
    )
    if not settings.by_task or not follows or settings.expert_groups % ranks:
        return None
    sent, forwarded, met = 0, 0, 0
    for first in range(0, lcm(tensor, ranks), tensor):
        peers = [rank % ranks for rank in range(first, first + tensor)]
        for home in set(peers):
            met += tensor
            sent += sum(rank // node != home // node for rank in peers)
            forwarded += sum(rank % node != home % node for rank in peers)
    return Rows(sent / met, forwarded / met)


@dataclass(frozen=True)
class Exchange:
    """What expert parallelism sends between ranks, for one side's layers with experts."""

    side: str
    layers: int
    row_bytes: int  # training
    row_bytes_inference: int
    rows: Rows  # with experts chosen at random
    rows_home: Rows | None  # if each task-affine batch is on a rank that holds its experts
    # How often each token is routed in training: twice where both routes are trained, unless a shared
    # feed-forward takes one of them.
    routed: int
    at_home: float  # share of the tokens that do not travel, because their experts have replicas
    lent_bytes: int  # bytes of replicas' weights that each rank sends on average, per forward pass
    lent_bytes_back: int  # bytes of their gradients, per backward pass: summed in float32
    chunks: int  # in training
    values: int  # of a rank's experts, in all layers
    # Bytes of counts per rank, layer and micro-batch: two int64 per chunk and other rank of a stage.
    count_bytes: int

    def pass_bytes(self, at_home: bool = False) -> float:
        """Return the bytes per routed token of this side, over all its layers, in one forward pass."""
        return self._rows(at_home) * self.row_bytes_inference

    def rows_of(self, at_home: bool) -> Rows:
        """Return :attr:`rows`, or :attr:`rows_home` if it is known and asked for."""
        return self.rows_home if at_home and self.rows_home is not None else self.rows

    def _rows(self, at_home: bool) -> float:
        return self.layers * self.rows_of(at_home).all * (1 - self.at_home)

    def token_bytes(self, at_home: bool = False, ahead: bool = False) -> float:
        """Return the bytes per routed token of this side, over all its layers, forward and backward.

        With ``ahead`` they include one more forward pass, which goes ahead of the step.
        """
        return self._rows(at_home) * self.row_bytes + ahead * self.pass_bytes(at_home)


def exchanges(recipe: Recipe, value_bytes: int, of_sides: Iterable[Load] = ()) -> list[Exchange]:
    """Return the exchange of each side that has experts; an empty list without expert parallelism.

    With activation checkpointing the rows of a forward pass travel twice. ``of_sides`` has the sides' loads,
    which include replicas: in each micro-batch the owner of a lent expert sends its weights to each of the
    R - 1 other ranks, and they send gradients back.
    """
    known = {load.side: load for load in of_sides}
    node = recipe.parallel.forwards_among
    model, layout, again = recipe.model, recipe.parallel, recipe.training.activation_checkpointing
    found = []
    for name, side in (("encoder", model.encoder), ("decoder", model.decoder)):
        widths = [side.width(layer) for layer in range(side.layers) if side.is_moe(layer)]
        layers = len(widths)
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
                    rows=random_rows(moe, layout.expert, node),
                    rows_home=rows_at_home(moe, model.affine, layout.expert, layout.tensor, node),
                    routed=model.routed(moe),
                    at_home=0.0 if load is None else load.share,
                    lent_bytes=value_bytes * lent,
                    lent_bytes_back=4 * lent,
                    chunks=moe.chunks,
                    values=moe.experts
                    // layout.expert
                    * sum(count_feed_forward(model.hidden, width).total for width in widths),
                    count_bytes=16 * moe.chunks * (layout.expert // node - 1 + node - 1),
                )
            )
    return found

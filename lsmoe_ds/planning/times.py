"""Estimate the seconds of an optimizer step on a cluster of GPUs, by part.

S tokens, H hidden, R expert-parallel ranks, C chunks; t tensor-parallel, D data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import LinearShape, shapes_of
from lsmoe_ds.data.shares import Shares, planned_shares
from lsmoe_ds.moe.costs import exchanges
from lsmoe_ds.moe.load import loads
from lsmoe_ds.planning.arithmetic import LENGTH, flops
from lsmoe_ds.planning.costs import VALUE_BYTES, counts_ahead
from lsmoe_ds.planning.devices import HOST_RATE, Device
from lsmoe_ds.planning.memory import local_parameters
from lsmoe_ds.planning.trained import count_trained

VALUE = VALUE_BYTES["bfloat16"]


@dataclass(frozen=True)
class Cluster:
    """``gpus`` equal GPUs, ``node`` of them in each machine."""

    gpus: int
    node: int
    device: Device
    network_rate: float  # bytes per second and GPU between machines, in one direction
    efficiency: float  # the share of the peak FLOP/s that matrix products reach


@dataclass(frozen=True)
class Times:
    """The seconds of each part of an optimizer step. Only dispatch in chunks overlaps with computation."""

    compute: float
    dispatch: float  # tokens to and from their experts, without what is hidden behind computation
    tensor: float  # sums over tensor-parallel ranks
    gradients: float  # reduction of gradients and, from ZeRO stage 1, collection of weights
    optimizer: float

    @property
    def step(self) -> float:
        return self.compute + self.dispatch + self.tensor + self.gradients + self.optimizer


def _seconds_per_byte(cluster: Cluster, ranks: int, step: int = 1) -> float:
    """Return the mean time of a byte between every ``step``-th of consecutive ranks."""
    outside = min(1, max(0, ranks - cluster.node) / max(1, ranks - step))  # share of peers on other machines
    return outside / cluster.network_rate + (1 - outside) / cluster.device.link_rate


def hidden(exchange: float, compute: float, chunks: int) -> float:
    """Return the seconds of exchange that a pass through a layer hides behind computation.

    ``exchange`` are the seconds of all rows there and back, ``compute`` those of the experts and of
    forwarding within machines. The first of C chunks on its way there and the last on its way back have
    nothing to overlap with::

        min((1 - 1 / C) exchange, compute)
    """
    return min((1 - 1 / chunks) * exchange, compute)


def estimate(recipe: Recipe, cluster: Cluster, shares: Shares | None = None) -> Times:
    """Estimate the seconds of one optimizer step in bfloat16.

    With v = 2 bytes per value and S tokens per step, half source and half target::

        compute     FLOPs of S tokens / ranks / (peak x efficiency), with those of a pass ahead of the step,
                    and for each further chunk of a micro-batch v e (5 + its forward passes) / memory rate
        dispatch    bytes of :func:`lsmoe_ds.moe.costs.exchanges` / ranks / rate, likewise, less what chunks
                    hide (:func:`hidden`)
        tensor      for each sum over the t ranks, forward and backward, again with activation checkpointing,
                    and in a pass ahead of the step: 2 (t - 1) / t S / 2 H v / D
        gradients   2 (D - 1) / D v d, and 2 (X - 1) / X v e over the X ranks that hold the same experts
        optimizer   6 + 2 s bytes for each value that the rank steps / memory rate; if it is stepped on the
                    host, plus 12 bytes / the host's rate: the gradient, and the weight there and back

    d and e are a rank's trained dense and expert parameters. s is the number of bytes per value that the
    optimizer keeps or needs temporarily, and reads and writes beside the float32 gradient and the weight (12
    for Adam). FLOPs and bytes include recomputed layers. The rate is that between machines for what leaves a
    machine, otherwise that within it. If tasks load the ranks unevenly (:func:`lsmoe_ds.moe.load.busiest`),
    all ranks wait for the busiest one, so its FLOPs of experts and its rows count, by the ``shares`` of
    tasks. The weights of replicas are sent in each micro-batch, and their gradients returned in float32.
    Each chunk reads all weights of a layer's local experts in each pass, writes their gradient, and adds it
    to that of the other chunks.
    Kernel launches, other waiting, and data are left out.
    """
    world, tensor, expert = cluster.gpus, recipe.parallel.tensor, recipe.parallel.expert
    data, replicas = world // tensor, world // expert
    step = recipe.data.batch.tokens * recipe.data.batch.count
    of_sides = loads(recipe, shares or planned_shares(recipe))
    work, found = flops(recipe, LENGTH), exchanges(recipe, VALUE, of_sides)
    ahead, again = counts_ahead(recipe, world), recipe.training.activation_checkpointing
    half = step if recipe.model.alone == "encoder" else step / 2  # an encoder-only model has no target tokens
    operations = half * (work.source_training + work.target_training + ahead * work.forward)
    affine = recipe.data.batch.languages == "task-affine"
    of_experts = {"encoder": work.source_experts, "decoder": work.target_experts}
    for load in of_sides:  # a pass ahead costs a third or a fourth of training
        more = (1 + ahead / (3 + again)) * (load.busiest / load.even - 1)
        operations += half * of_experts[load.side] * more
    crowded = {load.side: load.crowding for load in of_sides}
    byte = _seconds_per_byte(cluster, expert)
    forwards = recipe.parallel.forwards_among
    sent, forwarded = _seconds_per_byte(cluster, expert, forwards), _seconds_per_byte(cluster, forwards)
    flop = 1 / (cluster.device.half * cluster.efficiency)
    passes = 1 + ahead + again
    batches = recipe.data.batch.count * tensor / world  # micro-batches of a rank
    dispatch, further = 0.0, 0
    for each in found:
        rows = step / 2 * each.routed * crowded[each.side] / world
        leaving = each.rows_of(affine)
        # For both stages: the seconds of all rows in a step, and in one pass.
        (whole, once), (within, within_once) = (
            [
                rows * bytes_ * part * seconds / (leaving.all or 1)
                for bytes_ in (each.token_bytes(affine, ahead), each.pass_bytes(affine))
            ]
            for part, seconds in ((leaving.sent, sent), (leaving.forwarded, forwarded))
        )
        # A forward pass takes a third of the operations of training, with recomputed layers a fourth.
        computed = half / world * of_experts[each.side] / (3 + again) * crowded[each.side] * flop
        computed *= 1 - each.at_home
        dispatch += whole + within - passes * hidden(once, computed + within_once, each.chunks)
        back = 2 * computed + within - passes * within_once
        dispatch -= hidden(whole - passes * once, back, each.chunks)
        further += (each.chunks - 1) * each.values
    lent = sum(passes * each.lent_bytes + each.lent_bytes_back for each in found)
    dispatch += batches * lent * byte
    # A row-parallel layer sums its outputs; the layers before it sum the gradients of their input.
    sums = sum(isinstance(site, LinearShape) and site.split == "row" for site in shapes_of(recipe.model))
    summed = (2 + again + ahead) * sums * 2 * (tensor - 1) / tensor * step / 2 / data * recipe.model.hidden
    dense, experts = local_parameters(count_trained(recipe), tensor, expert)
    rates = {
        ranks: cluster.device.link_rate if ranks <= cluster.node else cluster.network_rate
        for ranks in (world, tensor)
    }
    reduced = 2 * VALUE * (dense * (data - 1) / data + experts * (replicas - 1) / replicas)
    stage = int(recipe.deepspeed["zero_optimization"]["stage"])  # type: ignore[index]
    optimizer = recipe.training.optimizer_settings
    kept = optimizer.value_bytes(stage, True) + optimizer.step_bytes(True)
    stepped = dense / data + experts / replicas if stage else dense + experts
    return Times(
        compute=operations / world * flop
        + batches * further * VALUE * (passes + 5) / cluster.device.memory_rate,
        dispatch=dispatch,
        tensor=VALUE * summed / rates[tensor],
        gradients=reduced / rates[world],
        optimizer=stepped * (6 + 2 * kept) / cluster.device.memory_rate
        + (optimizer.host_bytes() > 0) * stepped * 12 / HOST_RATE,
    )

"""``lsmoe plan --fit``: find the layouts of a recipe that fit into given GPUs, and estimate their step times.

S tokens, H hidden, R expert-parallel ranks, C chunks; t tensor-parallel, D data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lsmoe_ds.config.layout import check_layout
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import LinearShape, shapes_of
from lsmoe_ds.data.shares import Shares, planned_shares, with_named_replicas
from lsmoe_ds.errors import UserError
from lsmoe_ds.moe.costs import exchanges
from lsmoe_ds.moe.load import loads
from lsmoe_ds.notices import counted
from lsmoe_ds.planning.arithmetic import LENGTH, flops
from lsmoe_ds.planning.costs import VALUE_BYTES, counts_ahead
from lsmoe_ds.planning.devices import HOST_RATE, Device
from lsmoe_ds.planning.memory import Memory, local_parameters, memory
from lsmoe_ds.planning.plan import UNKNOWN, human, is_known
from lsmoe_ds.planning.trained import count_trained

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 10  # most rows of the table
SENTENCES = 2  # of the greatest length, that a batch has room for
PRECISION, VALUE = "bfloat16", VALUE_BYTES["bfloat16"]
USABLE = 0.95  # the usable share of a GPU's memory
# The share of a step that two chunks must save: more messages and kernels cost time that is not estimated.
CHUNKS_SAVE = 0.05


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


@dataclass(frozen=True)
class Fit:
    """One layout of a recipe, and its costs."""

    recipe: Recipe
    accumulation: int  # micro-batches a rank
    memory: Memory
    times: Times

    @property
    def replicas(self) -> dict[str, list[str]]:
        """Return, for each side that has replicas, the tasks whose experts have them."""
        moe = {side: moe for side, _, moe in self.recipe.model.moe_layers()}
        return {side: list(each.replicas) for side, each in moe.items() if each.replicas}

    @property
    def chunks(self) -> dict[str, int]:
        """Return the number of chunks of each side that has experts."""
        return {side: moe.chunks for side, _, moe in self.recipe.model.moe_layers()}

    @property
    def tokens_per_second(self) -> float:
        batch = self.recipe.data.batch
        return batch.tokens * batch.count / self.times.step

    def to_dict(self) -> dict[str, Any]:
        """Return the fit for JSON: bytes and seconds."""
        parallel, batch = self.recipe.parallel, self.recipe.data.batch
        return {
            "tensor": parallel.tensor,
            "expert": parallel.expert,
            "zero": self.memory.stage,
            "replicas": self.replicas,
            "chunks": self.chunks,
            "activation_checkpointing": self.recipe.training.activation_checkpointing,
            "batch_tokens": batch.tokens,
            "batch_count": batch.count,
            "accumulation": self.accumulation,
            "peak_bytes": self.memory.gpu_peak,
            "seconds": asdict(self.times) | {"step": self.times.step},
            "tokens_per_second": self.tokens_per_second,
        }


def find_fits(recipe: Recipe, cluster: Cluster) -> list[Fit]:
    """Return the layouts that fit into the memory of each GPU, the fastest first.

    Tries, in bfloat16, all powers of two of tensor-parallel ranks within a machine, all numbers of
    expert-parallel ranks that the recipe's experts allow, and the optimizer's ZeRO stages. The tokens of a
    step do not change; micro-batches are as large as the memory allows. Activation checkpointing is on if the
    recipe enables it, if a layout does not fit otherwise, or if it allows larger micro-batches and is faster.
    Experts of busy tasks have replicas if the recipe says so, or if that is faster. Rows travel in two chunks
    if the recipe says so, or if that saves at least CHUNKS_SAVE of the step. Raises UserError if no layout
    fits.
    """
    if not is_known(recipe):
        raise UserError(f"'model.huggingface': {UNKNOWN}")
    found: list[Fit] = []
    peaks: list[int] = []
    settings = sorted({recipe.training.activation_checkpointing, True})
    shares = planned_shares(recipe)
    for layout in _layouts(recipe, cluster):
        variants = _with_and_without_replicas(recipe, layout["expert"], shares)
        for stage in recipe.training.optimizer_settings.stages_in(half=True):
            best: list[Fit] = []
            for variant in variants:
                fits: list[Fit] = []
                for again in settings:
                    if fits and fits[0].accumulation == 1:
                        break
                    for accumulation in _powers_of_two(recipe.data.batch.tokens * recipe.data.batch.count):
                        changed = _with(variant, cluster, layout, stage, again, accumulation)
                        if changed is None:
                            break
                        needed = memory(changed, cluster.gpus, stage, PRECISION)
                        peaks.append(needed.gpu_peak)
                        if needed.gpu_peak <= USABLE * cluster.device.memory:
                            times = estimate(changed, cluster, shares)
                            fits.append(Fit(changed, accumulation, needed, times))
                            break
                best += fits
            found += [_in_chunks(fit, cluster, shares) for fit in sorted(best, key=_speed)[:1]]
    if not found:
        _check_tokens(recipe, cluster)
        least = f"; the smallest needs {min(peaks) / 1e9:.3g} GB on each" if peaks else ""
        raise UserError(
            f"no layout of {counted(cluster.gpus, 'GPU')} of {cluster.device.memory / 1e9:.3g} GB holds the "
            f"recipe{least}: give more of them, or larger ones"
        )
    return sorted(found, key=_speed)


def _with_and_without_replicas(recipe: Recipe, expert: int, shares: Shares) -> list[Recipe]:
    """Return the recipe with ``expert`` expert-parallel ranks, and a variant with replicas.

    In the variant, sides without a setting for replicas have replicas for busy tasks. It is left out if no
    task is busy.
    """
    parallel = recipe.parallel.model_copy(update={"expert": expert})
    given = recipe.model_copy(update={"parallel": parallel})
    sides = {"encoder": recipe.model.encoder, "decoder": recipe.model.decoder}
    open_to_it = {
        name: side.model_copy(update={"moe": side.moe.model_copy(update={"replicas": "auto"})})
        for name, side in sides.items()
        if side.moe is not None and side.moe.by_task and side.moe.replicas is None
    }
    model = given.model.model_copy(update=open_to_it)
    automatic = with_named_replicas(given.model_copy(update={"model": model}), shares)
    found = [with_named_replicas(given, shares)]
    if any(each.replicas for _, _, each in automatic.model.moe_layers()):
        found.append(automatic)
    return found


def _in_chunks(fit: Fit, cluster: Cluster, shares: Shares) -> Fit:
    """Return the fit with two chunks instead of one, if that fits and is worth it; otherwise as it is."""
    model = fit.recipe.model
    sides = {
        name: side.model_copy(update={"moe": side.moe.model_copy(update={"chunks": 2})})
        for name, side in (("encoder", model.encoder), ("decoder", model.decoder))
        if side.moe is not None and side.moe.chunks == 1
    }
    if not sides or fit.recipe.parallel.expert == 1:
        return fit
    recipe = fit.recipe.model_copy(update={"model": model.model_copy(update=sides)})
    needed, times = (
        memory(recipe, cluster.gpus, fit.memory.stage, PRECISION),
        estimate(recipe, cluster, shares),
    )
    fits = needed.gpu_peak <= USABLE * cluster.device.memory
    saves = times.step <= (1 - CHUNKS_SAVE) * fit.times.step
    return replace(fit, recipe=recipe, memory=needed, times=times) if fits and saves else fit


def _speed(fit: Fit) -> tuple[float, int]:
    return fit.times.step, fit.memory.gpu_peak


def table_of(fits: Sequence[Fit], cluster: Cluster) -> Table:
    """Return a table of the fastest fit of each layout, with at most ROWS rows."""
    from rich.table import Table

    parts = ("compute", "dispatch", "tensor", "gradients", "optimizer", "step")
    batch = fits[0].recipe.data.batch
    gpus, node = counted(cluster.gpus, "GPU"), cluster.node
    title = (
        f"{fits[0].recipe.name}: {batch.tokens * batch.count:,} tokens a step, in bfloat16; milliseconds on "
        f"{gpus} of {cluster.device.memory / 1e9:.3g} GB, {node} in a machine, "
        f"{cluster.network_rate / 1e9:.3g} GB/s between machines, at {cluster.efficiency:.0%} of the peak"
    )
    made = Table(title=title, title_justify="left", caption_justify="left")
    layout = ("parallel.tensor", "parallel.expert", "ZeRO", "batches", "tokens each")
    lends = any(each.replicas for each in fits)
    cuts = any(max(each.chunks.values(), default=1) > 1 for each in fits)
    more = ["replicas of"] * lends + ["chunks"] * cuts
    for column in (*layout, "checkpointing", *more, "peak", *parts, "tokens / s"):
        made.add_column(column, justify="right")
    best: dict[tuple[int, int], Fit] = {}
    for each in fits:
        best.setdefault((each.recipe.parallel.tensor, each.recipe.parallel.expert), each)
    if len(best) > ROWS:
        made.caption = f"the fastest {ROWS} of {len(best)} layouts; --json has all"
    for (tensor, expert), each in list(best.items())[:ROWS]:
        size, times = each.recipe.data.batch, asdict(each.times) | {"step": each.times.step}
        made.add_row(
            *(str(number) for number in (tensor, expert, each.memory.stage, size.count)),
            f"{size.tokens:,}",
            "yes" if each.recipe.training.activation_checkpointing else "no",
            *[", ".join(sorted({task for tasks in each.replicas.values() for task in tasks})) or "-"] * lends,
            *[_chunks_of(each)] * cuts,
            f"{each.memory.gpu_peak / 1e9:.1f} GB",
            *(_milliseconds(times[part]) for part in parts),
            human(each.tokens_per_second),
        )
    return made


def _milliseconds(seconds: float) -> str:
    """Format a time in milliseconds with three digits, or as a whole number."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.3g}"


def _chunks_of(fit: Fit) -> str:
    """Return the number of chunks, or those of both sides if they differ; a dash without exchange."""
    if fit.recipe.parallel.expert == 1:
        return "-"
    numbers = [str(number) for number in fit.chunks.values()]
    return " / ".join(numbers if len(set(numbers)) > 1 else numbers[:1])


def _check_tokens(recipe: Recipe, cluster: Cluster) -> None:
    """Raise UserError if a step has too few tokens for the GPUs in every layout."""
    batch, least = recipe.data.batch, SENTENCES * recipe.data.batch.max_length
    ranks = min(cluster.gpus // layout["tensor"] for layout in _layouts(recipe, cluster))
    if batch.tokens * batch.count < ranks * least:
        raise UserError(
            f"a step of {batch.tokens * batch.count:,} tokens is too small for "
            f"{counted(cluster.gpus, 'GPU')}: each batch needs {least:,} (twice "
            "data.batch.max_length). Give fewer GPUs, raise data.batch.count, or lower data.batch.max_length"
        )


def _powers_of_two(limit: int) -> Iterator[int]:
    number = 1
    while number <= limit:
        yield number
        number *= 2


def _layouts(recipe: Recipe, cluster: Cluster) -> Iterator[dict[str, int]]:
    experts = [moe.experts for _, _, moe in recipe.model.moe_layers()]
    for tensor in _powers_of_two(min(cluster.node, cluster.gpus)):
        for expert in range(1, cluster.gpus + 1):
            if cluster.gpus % tensor or cluster.gpus % expert or any(each % expert for each in experts):
                continue
            if expert == 1 or experts:
                yield {"tensor": tensor, "expert": expert}


def _with(
    recipe: Recipe, cluster: Cluster, layout: Mapping[str, int], stage: int, again: bool, accumulation: int
) -> Recipe | None:
    """Return the recipe in a layout, with its step divided for it; None if that is impossible."""
    count = cluster.gpus // layout["tensor"] * accumulation
    tokens = recipe.data.batch.tokens * recipe.data.batch.count // count
    if tokens < SENTENCES * recipe.data.batch.max_length:
        return None
    given = recipe.deepspeed if isinstance(recipe.deepspeed, dict) else {}
    zero = {**given.get("zero_optimization", {}), "stage": stage}
    value = recipe.model_dump(mode="json", exclude_none=True)
    value["parallel"] = dict(layout)
    value["training"]["activation_checkpointing"] = again
    value["data"]["batch"] |= {"tokens": tokens, "count": count}
    value["deepspeed"] = {**given, "bf16": {"enabled": True}, "zero_optimization": zero}
    try:
        changed = Recipe.model_validate(value)
        check_layout(changed, cluster.gpus)
    except (ValidationError, UserError):
        return None
    return changed


def hidden(exchange: float, compute: float, chunks: int) -> float:
    """Return the seconds of exchange that a pass through a layer hides behind computation.

    ``exchange`` are the seconds of all rows there and back, ``compute`` those of the experts. The first of C
    chunks on its way there and the last on its way back have nothing to overlap with::

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
    outside = max(0, expert - cluster.node) / max(1, expert - 1)  # share of expert peers on other machines
    byte = outside / cluster.network_rate + (1 - outside) / cluster.device.link_rate
    flop = 1 / (cluster.device.half * cluster.efficiency)
    passes = 1 + ahead + again
    batches = recipe.data.batch.count * tensor / world  # micro-batches of a rank
    dispatch, further = 0.0, 0
    for each in found:
        rows = step / 2 * each.routed * crowded[each.side] / world
        whole, once = (
            rows * bytes_ * byte for bytes_ in (each.token_bytes(affine, ahead), each.pass_bytes(affine))
        )
        # A forward pass takes a third of the operations of training, with recomputed layers a fourth.
        computed = half / world * of_experts[each.side] / (3 + again) * crowded[each.side] * flop
        computed *= 1 - each.at_home
        dispatch += whole - passes * hidden(once, computed, each.chunks)
        dispatch -= hidden(whole - passes * once, 2 * computed, each.chunks)
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

"""``lsmoe plan --fit``: find the layouts of a recipe that fit into given GPUs, and estimate their step times.

The estimate is in :mod:`lsmoe_ds.planning.times`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lsmoe_ds.config.layout import check_layout
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.shares import Shares, planned_shares, with_named_replicas
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted
from lsmoe_ds.planning.memory import Memory, memory
from lsmoe_ds.planning.plan import UNKNOWN, human, is_known
from lsmoe_ds.planning.times import Cluster, Times, estimate

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 10  # most rows of the table
SENTENCES = 2  # of the greatest length, that a batch has room for
PRECISION = "bfloat16"
USABLE = 0.95  # the usable share of a GPU's memory
# The share of a step that two chunks, or forwarding within machines, must save: more messages and kernels
# cost time that is not estimated.
MUST_SAVE = 0.05


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
            "node": parallel.node,
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
    if the recipe says so, or if that saves at least MUST_SAVE of the step; likewise they are forwarded within
    machines, whatever the recipe says. Raises UserError if no layout fits.
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
            found += [_with_faster_exchange(fit, cluster, shares) for fit in sorted(best, key=_speed)[:1]]
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


def _with_faster_exchange(fit: Fit, cluster: Cluster, shares: Shares) -> Fit:
    """Return the fit with two chunks instead of one, with rows forwarded within machines, or with both.

    Each must fit and be worth it. Otherwise the fit stays as it is.
    """
    model, parallel = fit.recipe.model, fit.recipe.parallel
    if parallel.expert == 1:
        return fit
    cut = {
        name: side.model_copy(update={"moe": side.moe.model_copy(update={"chunks": 2})})
        for name, side in (("encoder", model.encoder), ("decoder", model.decoder))
        if side.moe is not None and side.moe.chunks == 1
    }
    forwards = cluster.node < parallel.expert and parallel.expert % cluster.node == 0
    best = fit
    for node in (1, cluster.node)[: 1 + forwards]:
        for sides in ({}, cut)[: 1 + bool(cut)]:
            changed = {
                "model": model.model_copy(update=sides),
                "parallel": parallel.model_copy(update={"node": node}),
            }
            recipe = fit.recipe.model_copy(update=changed)
            needed = memory(recipe, cluster.gpus, fit.memory.stage, PRECISION)
            times = estimate(recipe, cluster, shares)
            fits = needed.gpu_peak <= USABLE * cluster.device.memory
            if fits and times.step <= (1 - MUST_SAVE) * best.times.step:
                best = replace(fit, recipe=recipe, memory=needed, times=times)
    return best


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
    forwards = any(each.recipe.parallel.node > 1 for each in fits)
    more = ["replicas of"] * lends + ["chunks"] * cuts + ["parallel.node"] * forwards
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
            *[str(each.recipe.parallel.node)] * forwards,
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

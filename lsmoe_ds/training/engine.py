"""The DeepSpeed engine of a recipe, and one optimizer step on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from lsmoe_ds.config.deepspeed import HALF, STAGE_0_BUCKET, complete, precision
from lsmoe_ds.config.layout import accumulation_steps
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Batch, Step
from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.methods.base import StepSize, Totals
from lsmoe_ds.methods.context import Route
from lsmoe_ds.model.base import Losses, Model
from lsmoe_ds.model.build import build, made_in
from lsmoe_ds.model.freezing import freeze
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.parallel import compat, deepspeed_engine
from lsmoe_ds.parallel.collectives import Traffic
from lsmoe_ds.parallel.parameters import partition_dimension
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.optimizers import build_optimizer
from lsmoe_ds.training.schedules import learning_rate

SIDES = ("encoder", "decoder")
AT_ONCE = 2**20  # values of a 16-bit gradient that are copied to float32 on a CPU


class NonFinite(Exception):
    """The loss or the gradient norm is not a finite number."""


@dataclass
class StepResult:
    """What one optimizer step computed, over all ranks."""

    metrics: dict[str, float]  # per-token means of the objective's losses, and what each method measures
    grad_norm: float | None  # before clipping; None if the step was skipped
    learning_rate: float
    exchanged: dict[str, Traffic]  # of each side, to and from its experts, summed over all ranks
    totals: Totals = field(default_factory=dict)
    skipped: bool = False  # gradients overflowed float16, so the weights did not change

    @property
    def loss(self) -> float:
        return self.metrics["loss"]


def check_precision(recipe: Recipe) -> str | None:
    """Return the precision that the recipe enables, "bf16" or "fp16", or None for float32.

    Raises UserError if this machine cannot train in it.
    """
    half = precision(recipe.deepspeed if isinstance(recipe.deepspeed, dict) else {})
    if half is not None and not compat.trains_in(half):
        device, other = (
            "GPU" if torch.cuda.is_available() else "CPU",
            next(kind for kind in HALF if kind != half),
        )
        raise UserError(
            f"the DeepSpeed configuration enables '{half}', in which this machine's {device} cannot train: "
            f"enable '{other}', or neither, which is float32"
        )
    return half


def engine_config(recipe: Recipe, topology: Topology) -> dict[str, Any]:
    """Return the recipe's DeepSpeed configuration, completed with the values that the recipe determines."""
    check_precision(recipe)
    given = recipe.deepspeed if isinstance(recipe.deepspeed, dict) else {}
    return {
        **complete(given, topology.world, recipe.training.optimizer_settings.steps_halves),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps(recipe, topology.data),
        "gradient_clipping": clipping_limit(recipe),
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,  # DeepSpeed does not know our classes
    }


def build_engine(recipe: Recipe, vocabulary: int, topology: Topology) -> Any:
    """Build a DeepSpeed engine over a freshly initialized model with ``vocabulary`` tokens."""
    deepspeed = compat.import_deepspeed()
    config = engine_config(recipe, topology)
    half = check_precision(recipe)
    # Not in 16 bits: models that are loaded with weights, and those with modules kept in float32.
    kept = "keep_in_fp32_modules" in config.get("data_types", {})
    whole = half is None or recipe.model.huggingface is not None or kept
    dtype = torch.float16 if half == "fp16" else torch.bfloat16
    with nullcontext() if whole else made_in(dtype, topology.device):
        model = build(recipe, vocabulary, topology)
    initialize(model, recipe.training.seed, topology)
    freeze(model, recipe, topology)
    spread = {name: partition_dimension(buffer) for name, buffer in model.named_buffers()}
    groups, alone = deepspeed_engine.optimizer_groups(model), recipe.training.optimizer_settings.steps_halves

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        return build_optimizer(recipe, groups, model, topology)

    try:
        layout = compat.ModelParallelUnit()
        with deepspeed_engine.building(groups, alone):
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=layout)
    except ValidationError as error:  # from a section that is a pydantic model
        wrong = error.errors()[0]
        key, found, why = ".".join(map(str, wrong["loc"])), wrong["input"], wrong["msg"].lower()
        raise SharedError(f"the DeepSpeed configuration has {found!r} for '{key}': {why}") from None
    # ZeRO and the wrappers of 16-bit optimizers keep the parameters that they step in their own buffers.
    free = alone and config.get("zero_optimization", {}).get("stage", 0) == 0
    for _, layer in model.moe_layers():
        layer.deepspeed_moe.experts.lay_together(lambda parameter: free or not parameter.requires_grad)
    for name, buffer in model.named_buffers():  # has lost its mark if DeepSpeed moved it
        if (dimension := spread[name]) is not None:
            compat.mark_tensor_parallel(buffer, dimension)
    limit = clipping_limit(recipe)
    deepspeed_engine.complete_engine(engine, lambda: clip_gradients(model, limit, topology), STAGE_0_BUCKET)
    return engine


def clipping_limit(recipe: Recipe) -> float:
    """Return the largest allowed gradient norm; infinite if ``training.max_grad_norm`` is 0.

    With a limit of 0 DeepSpeed would compute no norm, and a NaN gradient would reach the weights.
    """
    return recipe.training.max_grad_norm or math.inf


@torch.no_grad()
def clip_gradients(model: Model, limit: float, topology: Topology) -> float:
    """Scale all gradients so that their global norm is at most ``limit``; return the norm before scaling.

    For ZeRO stage 0, where every rank holds whole gradients: DeepSpeed 0.19.8 treats different ranks' experts
    as replicas of one another. Raises NonFinite if the norm is not finite.
    """
    parts: dict[str, list[Tensor]] = {"replicated": [], "tensor": [], "expert": []}
    for parameter in model.parameters():
        if parameter.grad is not None:
            kind = (
                "expert"
                if compat.is_expert_parameter(parameter)
                else "tensor"
                if partition_dimension(parameter) is not None
                else "replicated"
            )
            parts[kind].append(parameter.grad)
    squares = {kind: _norm(gradients).double().cpu() ** 2 for kind, gradients in parts.items()}
    for kind, size, group in (
        ("tensor", topology.tensor, topology.tensor_group),
        ("expert", topology.expert, topology.expert_group),
    ):
        if size > 1:
            squares[kind] = squares[kind].to(topology.device)
            dist.all_reduce(squares[kind], group=group)
    norm = sum(float(square) for square in squares.values()) ** 0.5
    if not math.isfinite(norm):
        raise NonFinite("the gradient norm is not finite")
    if norm > limit:
        torch._foreach_mul_([g for gradients in parts.values() for g in gradients], limit / norm)
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients; torch's get_total_norm would round it to the gradients' 16 bits."""
    if not gradients:
        return torch.zeros(())
    if gradients[0].is_cuda or gradients[0].dtype == torch.float32:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, torch.float32)))
    # On a CPU torch makes a float32 copy of each gradient. If the norm is allocated in the copy's memory, the
    # next copy no longer fits there, and the heap would grow by all copies.
    pieces = [piece for gradient in gradients for piece in gradient.view(-1).split(AT_ONCE)]
    copy, norms = torch.empty(max(map(torch.numel, pieces))), torch.empty(len(pieces))
    for piece, norm in zip(pieces, norms, strict=True):
        torch.linalg.vector_norm(copy[: piece.numel()].copy_(piece), out=norm)
    return torch.linalg.vector_norm(norms)


def train_step(engine: Any, step: Step, number: int, recipe: Recipe, topology: Topology) -> StepResult:
    """Take one optimizer step, the ``number``-th counted from 1, over this rank's micro-batches of ``step``.

    The loss is a sum over target tokens divided by the *global* number of target tokens, and the auxiliary
    losses are computed over all routed tokens of the step (unless ``training.auxiliary_over`` is
    micro-batch). So no loss depends on how the step is divided into micro-batches and ranks. Raises NonFinite
    before a gradient that is not finite reaches the weights. If a gradient overflows float16, the step is
    skipped instead, and DeepSpeed lowers the loss scale.
    """
    training = recipe.training
    peak, schedule = training.learning_rate, training.schedule
    rate = learning_rate(number, training.steps, peak, training.warmup, schedule)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    model: Model = engine.module
    size = StepSize(step.source_tokens, step.target_tokens + step.given_tokens)
    batches = [batch.to(topology.device) for batch in step.batches]
    for method in model.methods:
        if masks := method.before_step(model, number, recipe.training.steps):
            zero_out(engine, masks)
    apart = len(batches) > 1 and recipe.training.auxiliary_over == "micro-batch"
    totals = _totals_ahead(model, batches, topology) if len(batches) > 1 and not apart else None
    counted: list[Totals] = []
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        result: Losses = engine(*batch.inputs)
        of, over = size, totals
        if apart:
            of, over = _of_micro_batch(batch, model.count(result.notes), topology)
            counted.append(over)
        elif over is None:
            over = totals = _over_data_ranks(model.count(result.notes), topology)
        of_tokens = {"loss": result.loss, "nll": result.nll, **result.further}
        loss = sum(result.further.values(), start=result.loss) / step.target_tokens
        parts: dict[str, Tensor | float] = {
            name: each.detach() / step.target_tokens for name, each in of_tokens.items()
        }
        for method in model.methods:
            notes = result.notes.get(method.name, [])
            auxiliary = method.losses(notes, over[method.name], of)
            if apart:
                auxiliary = {name: each / len(batches) for name, each in auxiliary.items()}
            for each in auxiliary.values():
                loss = loss + each
            parts |= {name: each.detach() for name, each in auxiliary.items()}
            parts |= method.sums(notes)
        # DeepSpeed averages gradients over the data-parallel ranks, but these losses are already parts of a
        # global mean.
        engine.backward(loss * topology.data, scale_wrt_gas=False)
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + torch.as_tensor(
                part, dtype=torch.float64, device=topology.device
            )
        if i + 1 < len(batches):
            engine.step()  # counts the micro-batch
    totals = _sum(counted) if apart else totals
    assert totals is not None
    found = _sum_over_data_ranks(sums, topology)
    measured = {name: found[name] for name in of_tokens}
    for method in model.methods:
        measured |= method.measure(found, totals[method.name], size)
    total = math.fsum(found.values())
    if not math.isfinite(total):
        raise NonFinite(f"the loss is {total}")
    if topology.world == 1 and not engine.zero_optimization():  # ZeRO fills in zeros itself
        _fill_in_gradients(model)
    engine.step()
    skipped = engine.fp16_enabled() and not engine.was_step_applied()
    norm = None if skipped else float(engine.get_global_grad_norm())
    if norm is not None and not (math.isfinite(norm) and norm >= 0):
        raise NonFinite("the gradient norm is not finite")
    return StepResult(measured, norm, rate, _take_traffic(model, topology), totals, skipped)


@torch.no_grad()
def zero_out(engine: Any, masks: Mapping[torch.nn.Parameter, Tensor]) -> None:
    """Set parameters to 0 where their mask is false, also in the optimizer's copies and averages.

    An optimizer does not move a value that has no gradient and whose averages are 0. Averages over several
    values (Adafactor's) need no change, since they move nothing by themselves.
    """
    for parameter, mask in masks.items():
        parameter.masked_fill_(~mask, 0.0)  # a product would leave -0.0
    for piece in deepspeed_engine.optimizer_pieces(engine):
        if piece.parameter in masks:
            own = masks[piece.parameter].reshape(-1)[piece.start : piece.start + piece.length]
            for held in (piece.values, *piece.state.values()):
                if held.shape == piece.values.shape and held is not piece.parameter:
                    held.view(-1)[piece.offset : piece.offset + piece.length].masked_fill_(
                        ~own.to(held.device), 0.0
                    )


def _sum_over_data_ranks(sums: dict[str, Tensor], topology: Topology) -> dict[str, float]:
    """Sum named numbers in one all-reduce."""
    joined = torch.stack(list(sums.values()))
    if topology.data > 1:
        dist.all_reduce(joined, group=topology.data_group)
    return dict(zip(sums, joined.tolist(), strict=True))


def _totals_ahead(model: Model, batches: list[Batch], topology: Topology) -> Totals:
    """Compute the totals of the whole step before its first gradient; restore the random state afterwards.

    With several micro-batches per rank, methods that read hidden states need one more forward pass, which
    stores no activations.
    """
    state = compat.random_state(topology.tensor)
    found = [model.totals_ahead(*batch.inputs) for batch in batches]
    compat.restore_random_state(state, topology.tensor)
    return _over_data_ranks(_sum(found), topology)


def _sum(parts: list[Totals]) -> Totals:
    return {
        name: [torch.stack(each).sum(0) for each in zip(*(totals[name] for totals in parts), strict=True)]
        for name in parts[0]
    }


def _of_micro_batch(batch: Batch, own: Totals, topology: Topology) -> tuple[StepSize, Totals]:
    """Return the size and the totals of the micro-batches that all ranks compute at the same time."""
    read = torch.stack([batch.source_read.sum(), batch.read.sum()])
    totals = _over_data_ranks({**own, "size": [read]}, topology)
    (read,) = totals.pop("size")
    source, target = read.tolist()
    return StepSize(source, target), totals


def _over_data_ranks(totals: Totals, topology: Topology) -> Totals:
    """Sum vectors in one all-reduce, as float64, so that counts stay exact."""
    vectors = [each for several in totals.values() for each in several]
    if topology.data == 1 or not vectors:
        return totals
    joined = torch.cat([each.double() for each in vectors])
    dist.all_reduce(joined, group=topology.data_group)
    sums = iter(joined.split([len(each) for each in vectors]))
    return {name: [next(sums).to(each.dtype) for each in several] for name, several in totals.items()}


def _take_traffic(model: Model, topology: Topology) -> dict[str, Traffic]:
    """Return the all-to-all traffic of each side since the last call, summed over all ranks.

    It is zero if the experts are not spread over ranks.
    """
    parts: dict[str, list[Traffic]] = {side: [] for side in SIDES}
    for side, layer in model.moe_layers():
        parts[side].append(layer.deepspeed_moe.traffic.take())
    taken = {side: Traffic.sum(layers) for side, layers in parts.items()}
    if topology.expert == 1:
        return taken
    sums = torch.tensor(
        [[t.bytes, t.rows, t.seconds] for t in taken.values()], dtype=torch.float64, device=topology.device
    )
    dist.all_reduce(sums)
    return {
        side: Traffic(int(sent), int(rows), seconds)
        for side, (sent, rows, seconds) in zip(taken, sums.tolist(), strict=True)
    }


def _fill_in_gradients(model: Model) -> None:
    """Set the missing gradients of experts that no token of the step used to zero.

    The optimizer then updates their averages, as on several ranks. Gradients of equal shape share the zeros,
    which an optimizer only reads.
    """
    zeros: dict[torch.Size, Tensor] = {}
    for parameter in model.parameters():
        if parameter.grad is None and parameter.requires_grad and compat.is_expert_parameter(parameter):
            if parameter.shape not in zeros:
                zeros[parameter.shape] = torch.zeros_like(parameter)
            parameter.grad = zeros[parameter.shape].detach()  # another tensor that shares the memory


@torch.no_grad()
def validate(engine: Any, batches: Iterable[Batch], topology: Topology, route: Route = "specific") -> float:
    """Compute one route's mean negative log-likelihood per target token over the batches of all ranks."""
    model: Model = engine.module
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        moved = batch.to(topology.device)
        losses = model(*moved.inputs, route)
        sums += torch.tensor([float(losses.nll), float(batch.target_tokens)], dtype=torch.float64)
    model.train()
    for _, layer in model.moe_layers():
        layer.deepspeed_moe.traffic.take()  # reset it, so that it does not count for the next step
    sums = sums.to(topology.device)
    if topology.data > 1:
        dist.all_reduce(sums, group=topology.data_group)
    return float(sums[0] / sums[1].clamp(min=1))

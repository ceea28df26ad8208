"""Adapters to DeepSpeed's engine and optimizers: how they are built, stepped, saved and read.

All other adapters are in :mod:`lsmoe_ds.parallel.compat`. Each states its reason.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lsmoe_ds.errors import UserError
from lsmoe_ds.parallel.compat import Unpack, is_expert_parameter, trusted_checkpoint_loading

LARGEST_GROUP = 178_956_971  # most values of experts in a group of several layers: DeepSpeed's own limit
# The key of the state tensor with the float32 values that an optimizer steps instead of a 16-bit parameter.
VALUES = "values"


def optimizer_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return DeepSpeed's groups of the parameters that train; experts are in groups of their own.

    The name of an expert group is that of its process groups. DeepSpeed flattens each group into one buffer.
    It would split experts into groups of at most :data:`LARGEST_GROUP` values, even within a layer. Here no
    group ends within a layer, so a layer's experts are in one buffer, at equal distances, and a grouped
    product reads them without a copy.
    """
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    layers = {
        parameter: name.partition(".deepspeed_moe.")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    both = {"params": list(layers), "name": "parameters"}
    groups = split_params_into_different_moe_groups_for_optimizer(both, max_group_size=None)
    found = []
    for group in groups:
        parts: list[list[torch.nn.Parameter]] = [[]]
        for _, of_layer in itertools.groupby(group["params"], layers.__getitem__):
            layer = list(of_layer)
            if parts[-1] and group.get("moe") and _values(parts[-1]) + _values(layer) > LARGEST_GROUP:
                parts.append([])
            parts[-1] += layer
        found += [{**group, "params": part} for part in parts if part]
    return found


def _values(parameters: list[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@contextlib.contextmanager
def building(groups: list[dict[str, Any]], steps_halves: bool) -> Iterator[None]:
    """Change three things in how DeepSpeed builds an engine inside the context.

    1. A model without trained experts is treated as dense. Otherwise, once expert groups exist, DeepSpeed
       requires that a model with layers of experts trains some.
    2. An optimizer that ``steps_halves`` (16-bit parameters) is used as it is. At ZeRO stage 0 DeepSpeed
       would wrap it in an optimizer that makes float32 copies of all weights and gradients at once, and whose
       norm leaves out experts.
    3. ZeRO stage 1 in bfloat16 with float32 gradients uses the optimizer of stages 1 and 2, as in float16.
       DeepSpeed would use another one, whose files, norm and clipping would need further adapters.
    """
    from deepspeed.runtime.constants import BFLOAT16
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    configure, choose = DeepSpeedEngine._configure_optimizer, DeepSpeedEngine._do_optimizer_sanity_check
    experts = any(is_expert_parameter(each) for group in groups for each in group["params"])

    def configure_optimizer(engine: Any, *arguments: Any) -> None:
        engine.has_moe_layers = experts
        configure(engine, *arguments)

    def choose_optimizer(engine: Any, *arguments: Any) -> Any:
        if steps_halves:
            return None  # no wrapper
        chosen = choose(engine, *arguments)
        return ZERO_OPTIMIZATION if chosen == BFLOAT16 else chosen

    DeepSpeedEngine._configure_optimizer = configure_optimizer
    DeepSpeedEngine._do_optimizer_sanity_check = choose_optimizer
    try:
        yield
    finally:
        DeepSpeedEngine._configure_optimizer, DeepSpeedEngine._do_optimizer_sanity_check = configure, choose


def complete_engine(engine: Any, clip: Callable[[], float], bucket: int) -> None:
    """Work around nine problems of DeepSpeed 0.19.8's engine.

    1. ZeRO stage 0 clips by its own norm and discards it. Here ``clip`` clips, and its result is kept.
    2. Stage 0 copies gradients into buckets of 5e8 values for the all-reduce, even on one rank. Here a bucket
       has ``bucket`` values, and a single rank reduces nothing.
    3. Of the ranks that hold the same experts only the first saves anything, even if the others are its
       tensor-parallel peers, whose part of the dense weights would be missing. Here all its peers save.
    4. With experts, stage 0 writes the optimizer's state twice and never reads one copy. Here that is left
       out.
    5. The engine copies recovery scripts that cannot handle experts beside checkpoints. Here it copies none.
    6. Stage 2 reduces gradients in the order in which they arrive: see :func:`_reduce_in_one_order`.
    7. Dynamic loss scaling raises a bare Exception if the scale cannot be lowered further. Here the step is
       skipped like any other, and the training loop, which counts skipped steps, ends the run.
    8. In 16 bits, stage 0 leaves clipping to the optimizer wrapper, which is missing if the optimizer steps
       16-bit parameters itself. Here gradients are clipped before each step.
    9. ZeRO checks one gradient after another, which is slow on a GPU with many experts: see
       :func:`_look_at_all_gradients_at_once`.
    """
    from deepspeed.utils import groups

    def clip_and_keep_norm() -> None:
        engine._global_grad_norm = clip()

    engine.clip_fp32_gradients = clip_and_keep_norm
    if engine.zero_optimization_stage() == 0:
        engine.enable_backward_allreduce = dist.get_world_size() > 1
        engine.allreduce_gradients = functools.partial(engine.allreduce_gradients, bucket_size=bucket)
        if engine.has_moe_layers:
            common = engine._common_checkpoint_state
            engine._common_checkpoint_state = lambda *arguments: common(*arguments) | {"optimizer": None}
    else:
        _look_at_all_gradients_at_once(engine.optimizer)
    if engine.zero_optimization_stage() == 2:
        _reduce_in_one_order(engine)
    engine.checkpoint_engine.is_data_parallel_writer = lambda rank: (
        rank == 0 or groups._get_data_parallel_rank() == 0
    )
    engine._copy_recovery_script = lambda folder: None
    if hasattr(engine.optimizer, "loss_scaler"):
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    if engine.bfloat16_enabled() and not engine.zero_optimization():
        engine.optimizer.register_step_pre_hook(lambda *_: clip_and_keep_norm())


def _look_at_all_gradients_at_once(optimizer: Any) -> None:
    """Make ZeRO stages 1 and 2 check all gradients for infinities and NaN, and compute their norm, in a few
    kernels.

    DeepSpeed launches about ten kernels per gradient. With 16 experts in every second layer of
    Transformer-Big, a step on an H200 took a sixth less time without those that check for infinities. The
    results are the same.
    """
    from deepspeed.runtime.utils import is_model_parallel_parameter
    from deepspeed.runtime.zero.utils import get_norm_dtype

    norm_of = optimizer.get_grad_norm_direct

    def overflow() -> torch.Tensor:
        gradients = [each for group in optimizer.averaged_gradients.values() for each in group]
        present = [each for each in gradients if each is not None and each.numel()]
        if not present:
            return torch.zeros(1, dtype=torch.bool, device=optimizer.device)
        largest = torch.stack(torch._foreach_norm(present, math.inf))  # NaN where a gradient has one
        return ~largest.isfinite().all().reshape(1)

    def norm(gradients: list[torch.Tensor], params: list[torch.Tensor], norm_type: float = 2) -> torch.Tensor:
        real = [each for each in gradients if not getattr(each, "_zero_padding", False)]
        counted = [
            (gradient, parameter)
            for gradient, parameter in zip(real, params, strict=False)
            if is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0
        ]
        if norm_type != 2 or not counted:
            found: torch.Tensor = norm_of(gradients, params, norm_type)
            return found
        norms = torch._foreach_norm([gradient for gradient, _ in counted], 2.0, get_norm_dtype())
        # DeepSpeed sums over the ranks what it receives for a parameter that counts on this rank.
        found = norm_of([torch.linalg.vector_norm(torch.stack(norms))], [counted[0][1]])
        return found

    optimizer.has_overflow_partitioned_grads_serial = overflow
    optimizer.get_grad_norm_direct = norm


def _reduce_in_one_order(engine: Any) -> None:
    """Make ZeRO stage 2 reduce gradients in the reverse order of the model's parameters, on every rank.

    DeepSpeed fills its buckets in the order in which gradients arrive, and adds up the values at the same
    place in all ranks' buckets. So a rank whose gradients arrive in another order, or that lacks a gradient,
    would silently corrupt those of all ranks. Here each gradient waits for those before it, and one that has
    not arrived by the end of the backward pass is zero. Gradients arrive in roughly the reverse order, so few
    have to wait.
    """
    optimizer = engine.optimizer
    process, finish = optimizer.process_gradients, optimizer.overlapping_partition_gradients_reduce_epilogue
    group_of = {parameter: i for i, group in enumerate(optimizer.bit16_groups) for parameter in group}
    order = [parameter for parameter in engine.module.parameters() if parameter in group_of]
    arrived: set[torch.nn.Parameter] = set()
    waiting = list(order)  # the last one is reduced next

    def arrive(parameter: torch.nn.Parameter, group: int) -> None:
        arrived.add(parameter)
        while waiting and waiting[-1] in arrived:
            following = waiting.pop()
            process(following, group_of[following])

    def end() -> None:
        while waiting:
            following = waiting.pop()
            if following.grad is None:
                following.grad = torch.zeros_like(following)
            process(following, group_of[following])
        arrived.clear()
        waiting.extend(order)
        finish()

    optimizer.process_gradients, optimizer.overlapping_partition_gradients_reduce_epilogue = arrive, end


def loss_scale(engine: Any) -> float:
    """Return the factor by which DeepSpeed scales the loss in float16."""
    return float(engine.optimizer.loss_scale)


def save_engine(
    engine: Any,
    folder: Path,
    name: str,
    write: Callable[[Any, str], None],
    frozen: Callable[[str], bool],
) -> None:
    """Write the engine's checkpoint into ``folder / name``; call ``write(state_dict, path)`` for each file.

    ``write`` must copy views, since torch would write the whole tensor that a view is part of. Parameters
    that do not train are left out. DeepSpeed does not leave them out of the files of experts: there
    ``frozen`` recognizes them by name.
    """

    def save(state: dict[str, Any], path: str) -> None:
        write({key: value for key, value in state.items() if not frozen(key)}, path)

    engine.checkpoint_engine.preserves_storage_sharing = lambda: (
        False
    )  # otherwise DeepSpeed copies everything before it calls save
    engine.checkpoint_engine.save = lambda state_dict, path: save(state_dict, path)
    engine.save_checkpoint(str(folder), tag=name, save_latest=False, exclude_frozen_parameters=True)


def load_engine(engine: Any, checkpoint: Path, unpack: Unpack) -> None:
    """Load a checkpoint that :func:`save_engine` wrote, through ``unpack``.

    Parameters that do not train keep their values. Raises UserError if the checkpoint belongs to another
    model.
    """

    def load(src: dict[str, Any], dst: torch.nn.Module) -> None:
        found = dst.load_state_dict(src, strict=False)
        frozen = {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
        own = {name for name, _ in (*dst.named_parameters(), *dst.named_buffers())}
        missing = own.intersection(found.missing_keys)  # without the second names of tied parameters
        if wrong := sorted({*found.unexpected_keys, *missing} - frozen):
            what = "has no place for" if wrong[0] in found.unexpected_keys else "finds nothing of"
            raise UserError(f"{checkpoint} does not belong to the model: it {what} {wrong[0]}")

    with trusted_checkpoint_loading(unpack):
        engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, custom_load_fn=load)


class Piece(NamedTuple):
    """A contiguous part of one parameter whose optimizer state this rank holds.

    ``values`` is the tensor that the optimizer steps; the piece begins at ``offset`` in it, flattened.
    ``state`` has the state tensors of all of ``values``; ``number`` is its index in the optimizer's order.
    """

    parameter: torch.nn.Parameter
    start: int  # in the flattened parameter
    length: int
    values: torch.Tensor
    state: dict[str, torch.Tensor]
    number: int
    offset: int


def optimizer_pieces(engine: Any) -> list[Piece]:
    """List the pieces of parameters whose optimizer state this rank holds.

    ZeRO stages 1 and 2 step flat partitions, each a part of a group's parameters. Stage 0 steps the
    parameters or, in 16 bits, the float32 copies in their state.
    """
    optimizer, states = engine.optimizer, optimizer_states(engine)
    partitions = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if partitions is None:
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return [
            Piece(each, 0, each.numel(), states[each].get(VALUES, each), states[each], number, 0)
            for number, each in enumerate(stepped)
        ]
    pieces = []
    for parameter in engine.module.parameters():
        mapping = parameter._hp_mapping if parameter.requires_grad else None
        if mapping is not None:  # otherwise other ranks hold it, or it does not train
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            number = mapping.param_group_index
            values = partitions[number]
            pieces.append(
                Piece(parameter, here.start, here.numel, values, states[values], number, there.start)
            )
    return pieces


def optimizer_states(engine: Any) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the innermost optimizer's state tensors of each tensor that it steps."""
    states: dict[torch.Tensor, dict[str, torch.Tensor]] = innermost_optimizer(engine).state
    return states


def innermost_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer that the recipe names, which DeepSpeed's optimizers wrap."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def state_device(optimizer: torch.optim.Optimizer, key: str, device: torch.device) -> torch.device:
    """Return the device on which an optimizer keeps a state tensor of weights that are on ``device``."""
    return torch.device("cpu") if key in getattr(optimizer, "on_host", ()) else device


def optimizer_file(engine: Any, tag: str, expert_rank: int) -> str:
    """Return the name of the file in a checkpoint that holds this rank's optimizer state."""
    if engine.zero_optimization():
        path = engine._get_zero_ckpt_name("", tag)
    elif engine.has_moe_layers:
        path = engine._get_optimizer_ckpt_name("", tag, expert_rank)
    else:
        path = engine._get_ckpt_name("", tag)
    return os.path.basename(path)


def read_optimizer_file(
    path: Path, unpack: Unpack
) -> tuple[dict[int, dict[str, torch.Tensor]], list[torch.Tensor] | None]:
    """Read the states of :func:`optimizer_states`, by the number of the tensor that is stepped, and those
    tensors' values; None if the parameters themselves are stepped.
    """
    with trusted_checkpoint_loading(unpack):
        values = torch.load(path, map_location="cpu", mmap=True)
    values = values.get("optimizer_state_dict") or values["optimizer"]
    if "base_optimizer_state" in values:
        return values["base_optimizer_state"]["state"], values["single_partition_of_fp32_groups"]
    if "fp32_groups" in values:  # from stage 0 in 16 bits, which earlier versions used
        return values["optimizer_state_dict"]["state"], [
            copy for group in values["fp32_groups"] for copy in group
        ]
    return values["state"], None

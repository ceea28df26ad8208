"""Adapters to DeepSpeed's engine and optimizers: how they are built, step, and are saved and read.

See :mod:`lsmoe_ds.parallel.compat` for all others. Each says why it is there.
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

LARGEST_GROUP = 178_956_971  # values of experts in a group of several layers: DeepSpeed's own limit
# Among an optimizer's state tensors: the float32 values that it steps in the place of a 16-bit parameter.
VALUES = "values"


def optimizer_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return groups of the parameters that train, as DeepSpeed wants them: those of experts apart, under the
    name of their process groups.

    DeepSpeed flattens each group into one buffer, and would cut the experts into groups of at most
    :data:`LARGEST_GROUP` values wherever that ends. Here no group ends within a layer: its experts lie in
    one buffer, at equal distances, and a grouped product reads them without a copy.
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
    """Adapt how DeepSpeed builds an engine inside the context, in three points.

    1. A model with no expert to optimize is treated as dense: once expert groups exist, DeepSpeed otherwise
       insists that a model with layers of experts trains some.
    2. An optimizer that ``steps_halves`` steps 16-bit parameters itself: at ZeRO stage 0 DeepSpeed would wrap
       it in one that makes float32 copies of all weights and gradients at once, and whose norm leaves out
       experts.
    3. ZeRO stage 1 in bfloat16 with gradients in float32 has the optimizer of stages 1 and 2, as it has in
       float16. DeepSpeed takes another one there, whose files, norm and clipping would need adapters of their
       own.
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
            return None  # the name of no wrapper
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

    1. ZeRO stage 0 clips by a norm of its own and forgets it: ``clip`` clips instead, and the norm that it
       returns is kept.
    2. Stage 0 copies gradients to all-reduce them in buckets of 5e8 values, even on one rank: a bucket has
       ``bucket`` values, and one rank alone reduces nothing.
    3. Only the first of the ranks that hold the same experts saves anything, even where the others are its
       tensor-parallel peers, whose part of the dense weights would be missing: all peers of the first save.
    4. With experts, stage 0 writes the optimizer's state twice, and one of the two is never read: it is left
       out.
    5. The engine puts recovery scripts beside the checkpoints, which do not know experts: it puts none.
    6. Stage 2 reduces gradients in the order in which they arrive: see :func:`_reduce_in_one_order`.
    7. Dynamic loss scaling raises a bare Exception where the scale cannot fall any further: the step is
       skipped like any other, and whoever counts the skipped steps ends the run.
    8. Stage 0 leaves clipping in 16 bits to the wrapper that an optimizer which steps them itself has not:
       it clips before each step.
    9. ZeRO looks at one gradient after another, which takes long on a GPU where there are many experts: see
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
    """Make ZeRO stages 1 and 2 look for infinities and NaN in all gradients, and compute their norm, by a few
    kernels.

    DeepSpeed launches about ten for each gradient. With 16 experts in every second layer of Transformer-Big
    a step on an H200 took a sixth less without those that look for infinities. What is found is the same.
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
        # DeepSpeed adds up over the ranks what it is given for a parameter that counts here.
        found = norm_of([torch.linalg.vector_norm(torch.stack(norms))], [counted[0][1]])
        return found

    optimizer.has_overflow_partitioned_grads_serial = overflow
    optimizer.get_grad_norm_direct = norm


def _reduce_in_one_order(engine: Any) -> None:
    """Make ZeRO stage 2 reduce gradients in the reverse order of the model's parameters, on every rank.

    DeepSpeed fills its buckets in the order in which gradients arrive, and adds up whatever lies at the same
    place in the buckets of several ranks. So a rank whose gradients arrive in another order, or that has none
    of a parameter, would spoil those of all ranks, silently. Here a gradient waits for those before it, and
    one that has not come by the end of the backward pass is zero. The reverse order is about that in which
    they arrive, so few wait.
    """
    optimizer = engine.optimizer
    process, finish = optimizer.process_gradients, optimizer.overlapping_partition_gradients_reduce_epilogue
    group_of = {parameter: i for i, group in enumerate(optimizer.bit16_groups) for parameter in group}
    order = [parameter for parameter in engine.module.parameters() if parameter in group_of]
    arrived: set[torch.nn.Parameter] = set()
    waiting = list(order)  # the next one is the last

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
    """Return the number by which DeepSpeed multiplies the loss of float16."""
    return float(engine.optimizer.loss_scale)


def save_engine(
    engine: Any,
    folder: Path,
    name: str,
    write: Callable[[Any, str], None],
    frozen: Callable[[str], bool],
) -> None:
    """Write the engine's checkpoint into ``folder / name``, each of its files by ``write(state_dict, path)``.

    ``write`` must copy views, since torch would write all of the tensor that a view is part of. Parameters
    that do not train are left out; ``frozen`` tells them by name in the files of experts, which DeepSpeed
    writes whole.
    """

    def save(state: dict[str, Any], path: str) -> None:
        write({key: value for key, value in state.items() if not frozen(key)}, path)

    engine.checkpoint_engine.preserves_storage_sharing = lambda: (
        False
    )  # else all is copied before it is handed over
    engine.checkpoint_engine.save = lambda state_dict, path: save(state_dict, path)
    engine.save_checkpoint(str(folder), tag=name, save_latest=False, exclude_frozen_parameters=True)


def load_engine(engine: Any, checkpoint: Path, unpack: Unpack) -> None:
    """Load a checkpoint that :func:`save_engine` wrote, through ``unpack``; parameters that do not train keep
    their values.

    Raises UserError if it is not one of the engine's model.
    """

    def load(src: dict[str, Any], dst: torch.nn.Module) -> None:
        found = dst.load_state_dict(src, strict=False)
        frozen = {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
        own = {name for name, _ in (*dst.named_parameters(), *dst.named_buffers())}
        missing = own.intersection(found.missing_keys)  # not the second names of tied parameters
        if wrong := sorted({*found.unexpected_keys, *missing} - frozen):
            what = "has no place for" if wrong[0] in found.unexpected_keys else "finds nothing of"
            raise UserError(f"{checkpoint} does not belong to the model: it {what} {wrong[0]}")

    with trusted_checkpoint_loading(unpack):
        engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, custom_load_fn=load)


class Piece(NamedTuple):
    """A run of values of one parameter whose optimizer state this rank holds. ``values`` are what the
    optimizer steps; the piece begins at ``offset`` in them, flattened. ``state`` holds the state tensors of
    all of ``values``, and ``number`` is their place in the optimizer's order.
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
    parameters or, in 16 bits, float32 copies of them that are in the state.
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
        if mapping is not None:  # else it lies with other ranks, or does not train
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
    """Return the optimizer that the recipe names, from below DeepSpeed's."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def state_device(optimizer: torch.optim.Optimizer, key: str, device: torch.device) -> torch.device:
    """Return where an optimizer keeps a state tensor of weights that are on ``device``."""
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
    """Return what :func:`optimizer_states` held, by the holder's number, and the holders' values; None where
    these are the parameters.
    """
    with trusted_checkpoint_loading(unpack):
        values = torch.load(path, map_location="cpu", mmap=True)
    values = values.get("optimizer_state_dict") or values["optimizer"]
    if "base_optimizer_state" in values:
        return values["base_optimizer_state"]["state"], values["single_partition_of_fp32_groups"]
    if "fp32_groups" in values:  # of stage 0 in 16 bits, which earlier versions trained in
        return values["optimizer_state_dict"]["state"], [
            copy for group in values["fp32_groups"] for copy in group
        ]
    return values["state"], None

"""Every adapter to DeepSpeed 0.19.8 and Megatron-core 0.16.1: the only file that touches their private names.

Each adapter says why it is there. ``check_versions`` refuses other versions, because the names below are not
promised by either library.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lsmoe_ds.errors import UserError
from lsmoe_ds.parallel.imports import quick_import

LARGEST_GROUP = 178_956_971  # values of experts in a group of several layers: DeepSpeed's own limit
Unpack = Callable[[Any, object], Any]

# Among an optimizer's state tensors: the float32 values that it steps in the place of a 16-bit parameter.
VALUES = "values"
PINNED = {"deepspeed": "0.19.8", "megatron-core": "0.16.1"}


def check_versions() -> None:
    """Raise UserError if an installed library is not the version these adapters were written for."""
    for package, wanted in PINNED.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{package} is not installed: install {package}=={wanted}") from None
        if found != wanted:
            raise UserError(
                f"{package} {found} is installed, but lsmoe_ds adapts {package}=={wanted}: install that "
                "version"
            )


@functools.cache
def import_deepspeed() -> Any:
    """Import DeepSpeed quietly, for the accelerator that is there, without compiling extensions that nothing
    here uses.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quick_import():
        import deepspeed
        import deepspeed.ops
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message=".*(all_gather_into_tensor|reduce_scatter_tensor).*"
    )  # it uses them
    # init_distributed would compile this C++ extension (40 s, and a stale lock when killed); only
    # inference_all_reduce uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("LSMOE_DEEPSPEED_LOG", "ERROR"))
    return deepspeed


def trains_in(kind: str) -> bool:
    """Return whether DeepSpeed trains in ``bf16`` or ``fp16`` on the accelerator that is there."""
    accelerator = import_deepspeed().get_accelerator()
    return bool(getattr(accelerator, f"is_{kind}_supported")())  # None stands for no


@functools.cache
def import_megatron() -> Any:
    """Import Megatron-core's parallel state, without compiling its fused functions.

    Nothing here calls them, but Megatron hands them to ``torch.compile`` while it is imported, which loads
    torch's compiler and takes a third of the time that a rank needs to start.
    """
    compiled = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        with quick_import():
            import megatron.core.parallel_state as state
    finally:
        torch.compile = compiled
    return state


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because a connection to another rank broke. gloo has no error class
    for it, so its message decides.
    """
    return isinstance(error, dist.DistError) or (
        "gloo" in str(error) and any(f"onnection {how} by peer" in str(error) for how in ("closed", "reset"))
    )


def import_moe_base() -> type[torch.nn.Module]:
    """Import ``deepspeed.moe.layer.MoE``, by which class the engine knows layers with experts."""
    import_deepspeed()
    from deepspeed.moe.layer import MoE

    return MoE


def adopt_expert_groups(
    size: int, expert_group: dist.ProcessGroup, expert_data_group: dist.ProcessGroup
) -> str:
    """Hand groups built by Megatron to DeepSpeed, which would otherwise build its own, blind to tensor
    parallelism.

    Returns the name under which DeepSpeed knows them.
    """
    import_deepspeed()
    from deepspeed.utils import groups

    name = expert_group_name(size)
    groups._EXPERT_PARALLEL_GROUP[name] = expert_group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(expert_group)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = expert_data_group
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(expert_data_group)
    return name


def expert_group_name(size: int) -> str:
    return f"ep_size_{size}"


def mark_expert_parameter(parameter: torch.nn.Parameter, size: int) -> None:
    """Make the engine reduce a parameter's gradient over expert-data-parallel ranks only.

    ``model_parallel`` is for the gradient norm: where expert groups span the tensor-parallel group, DeepSpeed
    would otherwise count the experts of the first tensor-parallel rank alone, silently, and clip by a wrong
    norm.
    """
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = expert_group_name(size)  # type: ignore[attr-defined]
    parameter.model_parallel = True  # type: ignore[attr-defined]


def forget_groups() -> None:
    """Destroy all parallel groups but the world, so that the same processes can build another layout.

    Megatron forgets its groups without destroying them, and each has threads of its own under gloo.
    """
    import megatron.core.parallel_state as state
    from deepspeed.utils import groups

    state.destroy_model_parallel()
    groups.mpu = groups._WORLD_GROUP = None
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    for known in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        known.clear()


class ModelParallelUnit:
    """What ``deepspeed.initialize(mpu=...)`` asks, answered by Megatron's parallel state.

    Some names are left out on purpose: when DeepSpeed finds ``get_sequence_*``, ``get_slice_*`` or
    ``get_pipe_*`` it takes another path that Megatron-core's groups do not fit.
    """

    def __init__(self) -> None:
        import megatron.core.parallel_state as state

        self.get_tensor_model_parallel_group = self.get_model_parallel_group = (
            state.get_tensor_model_parallel_group
        )
        self.get_tensor_model_parallel_rank = self.get_model_parallel_rank = (
            state.get_tensor_model_parallel_rank
        )
        self.get_tensor_model_parallel_world_size = self.get_model_parallel_world_size = (
            state.get_tensor_model_parallel_world_size
        )
        self.get_data_parallel_group = state.get_data_parallel_group
        self.get_data_parallel_rank = state.get_data_parallel_rank
        self.get_data_parallel_world_size = state.get_data_parallel_world_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())


def initialize_megatron(tensor: int, expert: int) -> Any:
    """Build all groups once, in Megatron, and return its parallel state.

    Experts are not tensor-parallel (``expert_tensor_parallel_size=1``): expert groups run over consecutive
    ranks and may span tensor-parallel peers.
    """
    state = import_megatron()
    state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, expert_model_parallel_size=expert, expert_tensor_parallel_size=1
    )
    return state


def megatron_config() -> Any:
    """Return the settings of Megatron's linear and embedding layers: CPU allocation, no initialization (we
    initialize by parameter name, so that it is the same in every layout), no fused kernels that need Apex.
    """
    from megatron.core.model_parallel_config import ModelParallelConfig

    return ModelParallelConfig(
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        params_dtype=torch.float32,
    )


def mark_tensor_parallel(parameter: Any, dimension: int) -> None:
    """Mark a weight as split along ``dimension`` over tensor-parallel ranks.

    Megatron does so while it initializes a weight, which we do ourselves; DeepSpeed's gradient norm reads the
    mark.
    """
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    if not getattr(parameter, "tensor_model_parallel", False):
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(parameter, name):
                delattr(parameter, name)
        set_tensor_model_parallel_attributes(parameter, True, dimension, 1)


@contextlib.contextmanager
def trusted_checkpoint_loading(unpack: Unpack | None = None) -> Iterator[None]:
    """Load with ``weights_only=True`` inside the context, so that nothing in a checkpoint can run code:
    DeepSpeed itself passes ``weights_only=False``. ``unpack`` gets what was read, and its path, and returns
    what is loaded.
    """
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    original = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        options["weights_only"] = True
        found = original(*arguments, **options)
        return found if unpack is None else unpack(found, arguments[0])

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        torch.load = load
        try:
            yield
        finally:
            torch.load = original


def seed_tensor_parallel_random(seed: int, tensor_rank: int) -> None:
    """Seed torch, and Megatron's tracker of the random numbers that differ between tensor-parallel ranks.

    Megatron's tracker speaks to CUDA only; without a GPU the same class is given torch's CPU generator.
    """
    from megatron.core.tensor_parallel import random as tracked

    torch.manual_seed(seed)
    if torch.cuda.is_available():
        tracked.model_parallel_cuda_manual_seed(seed)
        return

    class Tracker(tracked.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.states_[name] = torch.get_rng_state()

    tracked._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    tracked._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    tracked._CUDA_RNG_STATE_TRACKER = Tracker()
    tracked._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    tracked._CUDA_RNG_STATE_TRACKER.add("model-parallel-rng", seed + 2718 + tensor_rank)


def tensor_parallel_random() -> contextlib.AbstractContextManager[None]:
    """Return a context inside which random numbers differ between tensor-parallel ranks."""
    from megatron.core.tensor_parallel import random as tracked

    context: contextlib.AbstractContextManager[None] = tracked.get_cuda_rng_tracker().fork()
    return context


def replay_tensor_parallel_random(tensor: int) -> contextlib.AbstractContextManager[None]:
    """Return a context in which :func:`tensor_parallel_random` gives once more the numbers that it gives from
    now on.
    """
    if tensor == 1:
        return contextlib.nullcontext()
    from megatron.core.tensor_parallel import random as tracked

    tracker = tracked.get_cuda_rng_tracker()
    states = tracker.get_states()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        after = tracker.get_states()
        tracker.set_states(states)
        try:
            yield
        finally:
            tracker.set_states(after)

    return again()


def random_state(tensor: int) -> dict[str, torch.Tensor]:
    """Return the state of every random number generator of this rank."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if tensor > 1:
        from megatron.core.tensor_parallel import random as tracked

        state |= {
            f"tracked.{name}": value for name, value in tracked.get_cuda_rng_tracker().get_states().items()
        }
    return state


def restore_random_state(state: dict[str, torch.Tensor], tensor: int) -> None:
    """Restore what :func:`random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if tensor > 1:
        from megatron.core.tensor_parallel import random as tracked

        tracked.get_cuda_rng_tracker().set_states(
            {
                name.removeprefix("tracked."): value
                for name, value in state.items()
                if name.startswith("tracked.")
            }
        )


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


def is_expert_parameter(parameter: torch.nn.Parameter) -> bool:
    """Return whether :func:`mark_expert_parameter` has marked a parameter."""
    return not getattr(parameter, "allreduce", True)


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
    """Work around seven problems of DeepSpeed 0.19.8's engine.

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
    elif engine.zero_optimization_stage() == 2:
        _reduce_in_one_order(engine)
    engine.checkpoint_engine.is_data_parallel_writer = lambda rank: (
        rank == 0 or groups._get_data_parallel_rank() == 0
    )
    engine._copy_recovery_script = lambda folder: None
    if hasattr(engine.optimizer, "loss_scaler"):
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    if engine.bfloat16_enabled() and not engine.zero_optimization():
        engine.optimizer.register_step_pre_hook(lambda *_: clip_and_keep_norm())


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

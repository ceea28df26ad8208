"""Adapters to DeepSpeed 0.19.8 and Megatron-core 0.16.1: versions, imports, groups and random numbers.

Adapters to DeepSpeed's engine are in :mod:`lsmoe_ds.parallel.deepspeed_engine`. Only these two files use
private names of either library, and each adapter states its reason. Private names may change at any time, so
``check_versions`` refuses other versions.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lsmoe_ds.errors import UserError
from lsmoe_ds.parallel.imports import quick_import

Unpack = Callable[[Any, object], Any]
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
    """Import DeepSpeed quietly for the accelerator of this machine; do not compile extensions unused here."""
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
    """Return whether DeepSpeed trains in ``bf16`` or ``fp16`` on the accelerator of this machine."""
    accelerator = import_deepspeed().get_accelerator()
    return bool(getattr(accelerator, f"is_{kind}_supported")())  # None means no


@functools.cache
def import_megatron() -> Any:
    """Import Megatron-core's parallel state, without compiling its fused functions.

    Nothing here calls them, but importing Megatron passes them to ``torch.compile``, which loads torch's
    compiler and takes a third of a rank's start-up time.
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
    """Return whether a collective failed because the connection to another rank broke.

    gloo has no error class for this, so the message decides.
    """
    return isinstance(error, dist.DistError) or (
        "gloo" in str(error) and any(f"onnection {how} by peer" in str(error) for how in ("closed", "reset"))
    )


def import_moe_base() -> type[torch.nn.Module]:
    """Import ``deepspeed.moe.layer.MoE``, the class by which the engine recognizes layers with experts."""
    import_deepspeed()
    from deepspeed.moe.layer import MoE

    return MoE


def adopt_expert_groups(
    size: int, expert_group: dist.ProcessGroup, expert_data_group: dist.ProcessGroup
) -> str:
    """Register groups built by Megatron in DeepSpeed; return their name there.

    DeepSpeed would otherwise build its own groups, which ignore tensor parallelism.
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

    ``model_parallel`` corrects the gradient norm: if expert groups span the tensor-parallel group, DeepSpeed
    would otherwise count only the experts of the first tensor-parallel rank, without a warning, and clip by a
    wrong norm.
    """
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = expert_group_name(size)  # type: ignore[attr-defined]
    parameter.model_parallel = True  # type: ignore[attr-defined]


def is_expert_parameter(parameter: torch.nn.Parameter) -> bool:
    """Return whether :func:`mark_expert_parameter` has marked a parameter."""
    return not getattr(parameter, "allreduce", True)


def forget_groups() -> None:
    """Destroy all parallel groups except the world, so that the same processes can build another layout.

    Megatron drops its groups without destroying them, and under gloo each keeps its own threads.
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
    """The ``mpu`` object for ``deepspeed.initialize``, which answers from Megatron's parallel state.

    Some methods are missing on purpose: if DeepSpeed finds ``get_sequence_*``, ``get_slice_*`` or
    ``get_pipe_*``, it uses another code path, which does not work with Megatron-core's groups.
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

    Experts are not tensor-parallel (``expert_tensor_parallel_size=1``): expert groups consist of consecutive
    ranks and may include tensor-parallel peers.
    """
    state = import_megatron()
    state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, expert_model_parallel_size=expert, expert_tensor_parallel_size=1
    )
    return state


def new_groups(ranks: list[list[int]]) -> dist.ProcessGroup:
    """Build a group of each list of ranks, and return that of this rank. Every rank must call this.

    They wait as long as Megatron's groups do.
    """
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timedelta(minutes=30))
    assert group is not None
    return group


def megatron_config() -> Any:
    """Return the settings of Megatron's linear and embedding layers.

    They allocate on the CPU, do not initialize (we initialize by parameter name, so that every layout gets
    the same weights), and use no fused kernels, which need Apex.
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

    Megatron marks weights while it initializes them, which we do ourselves. DeepSpeed's gradient norm reads
    the mark.
    """
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    if not getattr(parameter, "tensor_model_parallel", False):
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(parameter, name):
                delattr(parameter, name)
        set_tensor_model_parallel_attributes(parameter, True, dimension, 1)


@contextlib.contextmanager
def trusted_checkpoint_loading(unpack: Unpack | None = None) -> Iterator[None]:
    """Make ``torch.load`` use ``weights_only=True`` inside the context, so that checkpoints cannot run code.

    DeepSpeed itself passes ``weights_only=False``. ``unpack`` receives the object that was read and its path,
    and returns the object to load.
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

    Megatron's tracker supports only CUDA; without a GPU the same class gets torch's CPU generator.
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
    """Return a context in which :func:`tensor_parallel_random` repeats the numbers that follow this call."""
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

"""Read the recipe's DeepSpeed configuration and refuse keys that DeepSpeed would silently ignore.

The keys are those of DeepSpeed 0.19.8, without the old name ``bfloat16``. They are listed here because
importing DeepSpeed takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path
from typing import Any

from lsmoe_ds import shipped
from lsmoe_ds.languages import nearest

TOP = """
activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type
compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers torch_autocast
train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
zero_optimization
"""
SECTIONS = {
    "zero_optimization": """
        allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload
        cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
        ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
        log_trace_cache_warnings memory_efficient_linear offload_optimizer offload_param overlap_comm
        override_module_apply parameter_alignment pipeline_loading_checkpoint reduce_bucket_size
        reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage
        stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save
        stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters stage3_max_reuse_distance
        stage3_model_persistence_threshold stage3_module_granularity_threshold
        stage3_param_persistence_threshold stage3_prefetch_bucket_size
        stage3_use_all_reduce_for_fetch_params sub_group_size use_multi_rank_bucket_allreduce zenflow
        zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights
        zero_quantized_weights
    """,
    "bf16": """
        bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled
        immediate_grad_update
    """,
    "fp16": """
        auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis
        initial_scale_power loss_scale loss_scale_window min_loss_scale
    """,
    "torch_autocast": "dtype enabled lower_precision_safe_modules",
    "activation_checkpointing": """
        contiguous_memory_optimization cpu_checkpointing number_checkpoints partition_activations profile
        synchronize_checkpoint_boundary
    """,
    "flops_profiler": """
        detailed enabled module_depth output_file profile_step recompute_fwd_factor top_modules
    """,
    "checkpoint": """
        checkpoint_serialization load_universal parallel_write tag_validation use_node_local_storage
        writer
    """,
    "data_types": "buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype",
    "aio": "block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds",
}
HALF = ("bf16", "fp16")  # the sections that choose 16-bit numbers
FLOAT32 = "fp32"
STAGE_0_BUCKET = 2**24  # values: ours, where DeepSpeed would copy up to 5e8
# Settings of the recipe; set here as well, one of the two values would be silently ignored.
RECIPE_KEYS = {
    "train_batch_size": "data.batch",
    "train_micro_batch_size_per_gpu": "data.batch",
    "gradient_accumulation_steps": "data.batch.count and the number of processes",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optimizer",
    "activation_checkpointing": "training.activation_checkpointing",
    "scheduler": "training.warmup",
}
# Settings that are refused with these values: section, key, value, and why.
REFUSED: tuple[tuple[str, str, bool, str], ...] = (
    (
        "zero_optimization",
        "overlap_comm",
        True,
        "reducing beside the backward pass is not tested with experts",
    ),
    ("zero_optimization", "compute_grad_norm", False, "a gradient of NaN would reach the weights unseen"),
    ("bf16", "check_grad_overflow", False, "a gradient of NaN would reach the weights unseen"),
)
# Settings of ``zero_optimization`` that are refused if they are on, and why.
STALE = (
    "it would step experts that no token has chosen by gradients of earlier steps; set "
    "'training.adam.offload: true' in its place"
)
OFFLOADING = {
    "offload_optimizer": STALE,
    "cpu_offload": STALE,
    "zenflow": "it is not tested with experts",
    "offload_param": "it is for ZeRO stage 3",
    "cpu_offload_param": "it is for ZeRO stage 3",
}
KEYS = {section: frozenset(keys.split()) for section, keys in {"": TOP, **SECTIONS}.items()}


def read_deepspeed_config(given: str | dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that a recipe gives inline, as a file, or by the name of one that comes with
    lsmoe_ds.

    Raises ValueError with one sentence on what is wrong with it.
    """
    config = given if isinstance(given, dict) else _read_file(given)
    source = "" if isinstance(given, dict) else f"{given}: "
    if unknown := _unknown_key(config):
        raise ValueError(f"{source}unknown key {unknown}: the keys are those of DeepSpeed 0.19.8")
    for section in SECTIONS:
        value = config.get(section, {})
        is_mapping = isinstance(value, Mapping)
        if section == "zero_optimization":
            fits, having = is_mapping and type(value.get("stage", 0)) is int, " with a 'stage' of 0, 1 or 2"
        elif "enabled" in KEYS[section]:
            fits = is_mapping and type(value.get("enabled", False)) is bool
            having = " with an 'enabled' of true or false"
        else:
            fits, having = is_mapping, ""
        if not fits:
            raise ValueError(f"{source}'{section}' is {value!r}: it should be a mapping{having}")
    for key, place in RECIPE_KEYS.items():
        if key in config:
            raise ValueError(f"{source}it sets '{key}', which the recipe decides by {place}: remove it there")
    if config.get("wall_clock_breakdown") or config.get("flops_profiler", {}).get("enabled"):
        key = "wall_clock_breakdown" if config.get("wall_clock_breakdown") else "flops_profiler"
        raise ValueError(f"{source}it sets '{key}', whose timers DeepSpeed cannot run here: remove it there")
    for section, key, value, why in REFUSED:
        if config.get(section, {}).get(key) is value:
            raise ValueError(f"{source}'{section}.{key}' is {str(value).lower()}: {why}; remove it there")
    for key, why in OFFLOADING.items():
        value = config.get("zero_optimization", {}).get(key)
        off = (
            isinstance(value, Mapping) and value.get("device", "none") in (None, "none") and key != "zenflow"
        )
        if value and not off:
            raise ValueError(f"{source}'zero_optimization.{key}' is set: remove it there, {why}")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise ValueError(f"{source}it asks for ZeRO stage {stage}: 0, 1 and 2 are supported")
    if all(config.get(kind, {}).get("enabled") for kind in HALF):
        raise ValueError(f"{source}'bf16' and 'fp16' are both enabled: enable one of them")
    summed, own = config.get("data_types", {}).get("grad_accum_dtype"), precision(config)
    for place, found, kinds in (
        ("communication_data_type", config.get("communication_data_type"), [FLOAT32, *HALF]),
        ("data_types.grad_accum_dtype", summed, [FLOAT32] if own is None else [FLOAT32, own]),
    ):
        if found is not None and found not in kinds:
            raise ValueError(f"{source}'{place}' is {found!r}: it should be {' or '.join(kinds)} here")
    return config


def precision(config: Mapping[str, Any]) -> str | None:
    """Return "bf16" or "fp16", whichever is enabled, or None for float32."""
    return next((kind for kind in HALF if config.get(kind, {}).get("enabled")), None)


def complete(config: Mapping[str, Any], world: int, steps_halves: bool = False) -> dict[str, Any]:
    """Add the settings that a configuration's precision needs on ``world`` ranks.

    - A single rank in float32 trains at stage 0: it has nothing to partition, and ZeRO's copies would cost a
      third of its speed.
    - In 16 bits stage 1 replaces stage 0, where DeepSpeed leaves experts out of the gradient norm and sums
      gradients in 16 bits; other results are the same. An optimizer that ``steps_halves`` stays at stage 0,
      because it steps whole parameters itself.
    - In 16 bits gradients are summed in float32 over ranks, and at stages 1 and 2 over micro-batches, unless
      the configuration names another type: bfloat16 has 8 significant bits, so small addends would be lost.
    """
    zero: dict[str, Any] = config.get("zero_optimization", {})
    if precision(config) is None:
        return {**config, "zero_optimization": {"stage": 0}} if world == 1 else dict(config)
    config = {"communication_data_type": FLOAT32, **config}
    if steps_halves:
        return config
    return {
        **config,
        "zero_optimization": {**zero, "stage": max(zero.get("stage", 0), 1)},
        "data_types": {"grad_accum_dtype": FLOAT32, **config.get("data_types", {})},
    }


def _unknown_key(config: Mapping[str, Any]) -> str | None:
    """Return the first key that DeepSpeed lacks, quoted, with the nearest key that it has."""
    for section, known in KEYS.items():
        value = config.get(section) if section else config
        for key in value if isinstance(value, Mapping) else ():
            if key not in known:
                return f"'{section}{'.' * bool(section)}{key}'{nearest(str(key), known)}"
    return None


def _read_file(name: str) -> dict[str, Any]:
    for path in (Path(name), shipped.find("DeepSpeed configuration", name)):
        if path is not None and isfile(path):  # unlike Path.is_file, it accepts any text
            try:
                value = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name} is not valid JSON: {error}") from None
            if not isinstance(value, dict):
                raise ValueError(f"{name} holds no JSON object")
            return value
    raise ValueError(f"there is no file {name}{shipped.hint('DeepSpeed configuration')}")

"""Training steps on one GPU: tokens a second, model FLOPs utilization, waits for the device and peak memory
beside the plan.

    python benchmarks/gpu.py [--case NAME] [--steps 41]

Transformer-Big (feed-forward width 4096, vocabulary 64,000) in bfloat16 on ragged batches of 16,384 tokens of
all directions, by Adam and ZeRO 1: dense, and with experts. "13.3B" is the system of
`recipes/papers/web-big-128.yaml`, 128 experts and feed-forwards of 8192, by Adafactor with activation
checkpointing: 54 GiB, and 103 with float32 copies of the weights. Each case is a process of its own. MFU is
the model's own arithmetic, without recomputation and padding, over the data sheet's peak. Eight batches come
in turn; the first step with each is reported apart, since kernels may be chosen or planned then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, compile_model, in_processes, ragged_batches, run_main, write

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import PairBatch, Step
from lsmoe_ds.languages import PAD
from lsmoe_ds.launch import joining
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.training.engine import build_engine, train_step
from lsmoe_ds.training.throughput import Throughput, Work, peak_of

VOCABULARY, TOKENS, LENGTH, SHAPES = 64000, 16384, 30.0, 8
LANGUAGES = ["de", "fr", "es", "it", "nl", "pt", "ro", "pl", "cs", "ru", "fi", "hu", "el", "tr", "ar", "zh"]
TOKEN = {"every": 2, "top_k": 2, "routing": "token"}
TARGET = {"every": 2, "top_k": 2, "routing": "task", "task": "target"}
ADAFACTOR = {"optimizer": "adafactor", "activation_checkpointing": True}
ROUNDED = {**ADAFACTOR, "adafactor": {"master_weights": False}}


@dataclass(frozen=True)
class Case:
    """Layers of each side, experts in every second one of them, and how they are trained."""

    layers: int = 6
    experts: int | None = None
    width: int = 4096
    training: dict[str, Any] = field(default_factory=dict)
    stage: int = 1
    cudnn: bool = False  # whether torch may attend by cuDNN
    compiled: bool = False  # whether each layer is compiled


CASES = {
    "dense": Case(),
    "dense, packed": Case(training={"packed": True}),
    "dense, attention by cuDNN": Case(cudnn=True),
    "dense, layers compiled": Case(compiled=True),
    "16 experts": Case(experts=16),
    "16 experts, packed": Case(experts=16, training={"packed": True}),
    "128 experts in 2 layers": Case(2, 128),
    "13.3B": Case(6, 128, 8192, ROUNDED, 0),
    "13.3B, float32 copies": Case(6, 128, 8192, ADAFACTOR, 0),
}


def recipe_of(name: str) -> Recipe:
    chosen = CASES[name]
    sides: dict[str, Any] = {}
    for side, routing in (("encoder", TOKEN), ("decoder", TARGET)):
        moe = {**routing, "experts": chosen.experts} if chosen.experts else None
        sides[side] = {"layers": chosen.layers, "feed_forward": chosen.width, "moe": moe}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {
                "corpora": ["none"],
                "languages": LANGUAGES,
                "vocabulary": {"size": VOCABULARY},
                "batch": {"count": 1, "tokens": TOKENS},
            },
            "model": {"preset": "transformer-big", **sides},
            "training": {"steps": 1000, "warmup": 10, "learning_rate": 5e-4, **chosen.training},
            "deepspeed": {"zero_optimization": {"stage": chosen.stage}, "bf16": {"enabled": True}},
        }
    )


def step_of(batch: PairBatch) -> Step:
    real = int((batch.source != PAD).sum())
    return Step([batch], batch.target_tokens, real, 0, [])


def train(name: str, steps: int) -> dict[str, Any]:
    """Train in this process."""
    joining.join()
    topology, recipe = Topology.build(device=joining.device()), recipe_of(name)
    compat.seed_tensor_parallel_random(1, 0)
    begun = time.perf_counter()
    engine = build_engine(recipe, VOCABULARY, topology)
    built = time.perf_counter() - begun
    if CASES[name].cudnn:
        torch.backends.cuda.enable_cudnn_sdp(True)
    if CASES[name].compiled:
        compile_model(engine.module, "layers")
    batches = ragged_batches(recipe.languages, VOCABULARY, TOKENS, SHAPES, LENGTH)
    throughput = Throughput(recipe, 1, peak_of(recipe, topology))
    losses, seconds, works, places = [], [], [], []

    def one(number: int) -> Work:
        batch = batches[number % len(batches)]
        step = step_of(batch)
        losses.append(round(train_step(engine, step, number, recipe, topology).loss, 3))
        return Work(step.source_tokens, step.target_tokens, 0, len(batch.source))

    fresh = []
    for number in range(1, len(batches) + 1):  # every shape once
        begun = time.perf_counter()
        one(number)
        fresh.append(time.perf_counter() - begun)
        print(f"{name}: step {number}, loss {losses[-1]}, {fresh[-1]:.2f} s", flush=True)
    for number in range(len(batches) + 1, len(batches) + 1 + steps):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        works.append(one(number))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        batch = batches[number % SHAPES]
        places.append(batch.source.numel() + batch.labels.numel())
    made = plan(recipe, 1)
    memory = next(
        each for each in made.memory if (each.precision, each.stage) == (made.precision, made.stage)
    )
    middle = statistics.median(seconds)
    flops = [throughput.flops(work) or 0 for work in works]
    result: dict[str, Any] = {
        "parameters": made.parameters.whole.total,
        "losses": [losses[0], losses[-1]],
        "seconds to build": round(built, 1),
        "milliseconds a step": round(middle * 1e3, 1),
        "milliseconds of the first step of a shape": [round(each * 1e3) for each in fresh],
        "tokens a second": round(sum(work.tokens for work in works) / sum(seconds)),
        "TFLOP/s": round(sum(flops) / sum(seconds) / 1e12, 1),
        "padded share": round(1 - sum(work.tokens for work in works) / sum(places), 3),
    }
    if throughput.peak:
        result["MFU"] = round(sum(flops) / sum(seconds) / throughput.peak, 3)
    result["waits for the device in a step"] = count_waits(lambda: one(SHAPES))
    gib = {
        "plan": memory.peak,
        "plan of what lasts": memory.total,
        "allocated at most": torch.cuda.max_memory_allocated(),
        "reserved at most": torch.cuda.max_memory_reserved(),
    }
    result["GiB"] = {name: round(value / 2**30, 2) for name, value in gib.items()}
    if made.parameters.whole.total < 4e9:  # a trace of more operations takes minutes to read
        result["milliseconds of kernels"] = round(kernel_time(lambda: one(SHAPES)), 1)
    return result


def count_waits(run: Callable[[], object]) -> int:
    """Count the operations of a step for which the host waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [each for each in caught if "synchroniz" in str(each.message)]
    places = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in found)
    print("waits at", dict(places), flush=True)
    return len(found)


def kernel_time(run: Callable[[], object]) -> float:
    """Return the milliseconds for which a step keeps the device busy."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as traced:
        run()
        torch.cuda.synchronize()
    events = [each for each in traced.key_averages() if each.device_type.name == "CUDA"]
    # The range around the optimizer's step has the time of its kernels once more.
    return sum(each.self_device_time_total for each in events if "Optimizer.step" not in each.key) / 1e3


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--steps", type=int, default=41, metavar="N", help="steps that are measured (default: 41)"
    )
    parser.add_argument("--case", choices=CASES, action="append", help="one of them (default: all)")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        (name,) = arguments.case
        arguments.part.write_text(json.dumps(train(name, arguments.steps)), encoding="utf-8")
        return
    if not torch.cuda.is_available():
        parser.error("it measures steps on a GPU, and torch sees none")
    result: dict[str, Any] = {}
    for name in arguments.case or CASES:
        result[name] = in_processes(__file__, ["--case", name, "--steps", str(arguments.steps)], 1)
        write({"steps": arguments.steps, "tokens": TOKENS, "cases": result}, arguments.out)


if __name__ == "__main__":
    run_main(main)

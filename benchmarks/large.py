"""The memory of a sparse model of 1.5 billion parameters in bfloat16 by Adafactor: the plan's, and the
largest resident set of the process that trains it.

    python benchmarks/large.py [--experts 27] [--steps 3]

Transformer-Big with experts in every second layer, routed by token, with activation checkpointing, on one
process. It is trained on one batch again and again: with random rounding, and with float32 copies of the
weights in the optimizer. What the plan gives for Adam is there, too, which is not run.

The plan counts gradients of all experts. One that no token of a step has chosen needs none: the share of
experts that are chosen in each step is among the results.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import argument_parser, in_processes, peak_memory, ragged_batches, run_main, write

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Step
from lsmoe_ds.languages import PAD
from lsmoe_ds.launch import joining
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.memory import Memory
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.training.engine import build_engine, train_step

VOCABULARY, TOKENS = 8000, 2048
CASES: dict[str, dict[str, Any]] = {
    "adafactor, random rounding": {"optimizer": "adafactor", "adafactor": {"master_weights": False}},
    "adafactor, float32 copies": {"optimizer": "adafactor"},
    "adam": {"optimizer": "adam"},
}


def recipe_of(case: str, experts: int) -> Recipe:
    moe = {"every": 2, "experts": experts, "top_k": 2, "routing": "token"}
    training = {"steps": 100, "warmup": 1, "learning_rate": 2e-4, "activation_checkpointing": True}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {
                "corpora": ["none"],
                "languages": ["de", "fr"],
                "vocabulary": {"size": VOCABULARY},
                "batch": {"count": 1, "tokens": TOKENS},
            },
            "model": {
                "preset": "transformer-big",
                "encoder": {"moe": moe},
                "decoder": {"moe": moe},
            },
            "training": {**training, **CASES[case]},
            "deepspeed": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
        }
    )


def planned(recipe: Recipe) -> Memory:
    made = plan(recipe, 1)
    return next(each for each in made.memory if (each.precision, each.stage) == (made.precision, made.stage))


def train(case: str, experts: int, steps: int) -> dict[str, Any]:
    """Train in this process; return its largest resident set, with the loss and the seconds of each step."""
    joining.join()
    topology, recipe = Topology.build(device=joining.device()), recipe_of(case, experts)
    compat.seed_tensor_parallel_random(1, 0)
    begun = time.perf_counter()
    engine = build_engine(recipe, VOCABULARY, topology)
    built, started = time.perf_counter() - begun, peak_memory()
    (batch,) = ragged_batches(recipe.languages, VOCABULARY, TOKENS, 1, 20.0)
    step = Step([batch], batch.target_tokens, int((batch.source != PAD).sum()), 0, [])
    chosen: set[tuple[int, int]] = set()
    layers = [layer for _, layer in engine.module.moe_layers()]
    for place, layer in enumerate(layers):
        layer.observer = lambda seen, place=place: chosen.update(
            (place, expert) for expert in seen.routes.experts.unique().tolist()
        )
    losses, seconds, shares = [], [], []
    for number in range(1, steps + 1):
        chosen.clear()
        begun = time.perf_counter()
        losses.append(round(train_step(engine, step, number, recipe, topology).loss, 3))
        seconds.append(round(time.perf_counter() - begun, 1))
        shares.append(round(len(chosen) / (experts * len(layers)), 3))
    return {
        "measured": round(peak_memory(), 2),
        "measured once it was built": round(started, 2),
        "losses": losses,
        "experts chosen": shares,
        "seconds to build": round(built, 1),
        "seconds of each step": seconds,
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--experts", type=int, default=27, metavar="E", help="of each layer (default: 27)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps of each (default: 3)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        found = train(arguments.case, arguments.experts, arguments.steps)
        arguments.part.write_text(json.dumps(found), encoding="utf-8")
        return
    gib: dict[str, Any] = {}
    for case in CASES:
        recipe = recipe_of(case, arguments.experts)
        peak = planned(recipe).peak / 2**30
        gib[case] = {"plan": round(peak, 2)}
        if case != "adam":
            options = ["--case", case, "--experts", str(arguments.experts), "--steps", str(arguments.steps)]
            found = in_processes(__file__, options, 1)
            gib[case] |= {
                "measured": found["measured"],
                "plan / measured": round(peak / found["measured"], 2),
            }
            gib[case] |= found
    parameters = plan(recipe, 1).parameters.whole.total
    write({"parameters": parameters, "tokens": TOKENS, "GiB": gib}, arguments.out)


if __name__ == "__main__":
    run_main(main)

"""Training steps of dense models with and without ``torch.compile``.

    OMP_NUM_THREADS=1 taskset -c 1 lsmoe bench compile [--size demo|base] [--precision float32|bf16]

Models alike take turns in one process: with nothing compiled, with each feed-forward, and with each layer
(norms, attention, feed-forward, dropout, sums), for dynamic shapes. demo is the dense form of
`recipes/demo.yaml`; base is transformer-base, vocabulary 32,000. Sentences are made up; their batches are
those of `lsmoe train`, so almost each step has a new shape. Engine and optimizer are included.

Rates are by the CPU time of this process, whatever else shares its core. Warm-up includes compilation, which
is faster if torch's cache of kernels has them (`TORCHINDUCTOR_CACHE_DIR`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import UNITS, Corpus, alternate, argument_parser, compile_model, run_main, write
from torch._dynamo.utils import counters

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.launch import joining
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import build_engine, train_step

LANGUAGES = ["de", "nl", "sv", "fr", "ru", "uk"]
SIDE = {"feed_forward": 512}


@dataclass(frozen=True)
class Size:
    model: dict[str, Any]
    vocabulary: int
    tokens: int  # of a batch, with padding
    log_length: float  # of a sentence
    dropout: float
    steps: int  # of a turn


SIZES = {
    "demo": Size({"preset": "transformer-tiny", "encoder": SIDE, "decoder": SIDE}, 6000, 384, 2.2, 0.0, 6),
    "base": Size({"preset": "transformer-base"}, 32000, 2048, 3.2, 0.1, 1),
}


def recipe_of(size: Size, precision: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {
                "corpora": ["none"],
                "languages": LANGUAGES,
                "vocabulary": {"size": size.vocabulary},
                "batch": {"tokens": size.tokens, "count": 1},
            },
            "model": size.model,
            "training": {"steps": 1000, "learning_rate": 1e-4, "warmup": 100, "dropout": size.dropout},
            "deepspeed": {"bf16": {"enabled": True}} if precision == "bf16" else {},
        }
    )


def contestant(size: Size, precision: str, unit: str, topology: Topology) -> Callable[[], int]:
    """Return a turn: steps on new batches, the same ones for each unit. It returns their real tokens."""
    recipe = recipe_of(size, precision)
    corpus = Corpus(["en", *LANGUAGES], size.vocabulary, 2000, size.log_length)
    stream = BatchStream(corpus, recipe.languages, corpus, recipe.data.batch, 1.0, recipe.training.seed)
    engine = build_engine(recipe, size.vocabulary, topology)
    compile_model(engine.module, unit)

    def turn() -> int:
        steps = [next(stream) for _ in range(size.steps)]
        for step in steps:
            train_step(engine, step, 100, recipe, topology)
        return sum(step.source_tokens + step.target_tokens for step in steps)

    return turn


def measure(size: Size, precision: str, rounds: int) -> dict[str, dict[str, Any]]:
    joining.join()
    topology = Topology.build(device=joining.device())
    compat.seed_tensor_parallel_random(1, 0)
    result: dict[str, dict[str, Any]] = {}
    turns: dict[str, Callable[[], int]] = {}
    tokens = dict.fromkeys(UNITS, 0)
    for unit in UNITS:
        counters.clear()
        turns[unit] = contestant(size, precision, unit, topology)
        begun = time.process_time()
        for _ in range(2):
            turns[unit]()
        graphs, breaks = counters["stats"]["unique_graphs"], counters["graph_break"].total()
        spent = round(time.process_time() - begun, 1)
        result[unit] = {
            "CPU seconds of two turns of warm-up": spent,
            "graphs": graphs,
            "graph breaks": breaks,
        }
        print(f"{unit}: {result[unit]}", flush=True)

    def counted(unit: str) -> Callable[[], None]:
        def run() -> None:
            tokens[unit] += turns[unit]()

        return run

    counters.clear()
    seconds = alternate({unit: counted(unit) for unit in UNITS}, rounds, time.process_time)
    again = counters["stats"]["unique_graphs"]
    for unit, value in seconds.items():
        rate = round(tokens[unit] / rounds / value, 1)
        result[unit] |= {
            "tokens per CPU second": rate,
            "to nothing": round(seconds["nothing"] / value, 3),
        }
    return result | {"after warm-up": {"graphs": again}}


def main() -> None:
    parser = argument_parser(__doc__, rounds=9)
    parser.add_argument("--size", choices=SIZES, default="demo", help="size of the models (default: demo)")
    parser.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="of training (default: float32)"
    )
    arguments = parser.parse_args()
    setting = {"size": arguments.size, "precision": arguments.precision, "rounds": arguments.rounds}
    compiled = measure(SIZES[arguments.size], arguments.precision, arguments.rounds)
    write({**setting, "threads": torch.get_num_threads(), "compiled": compiled}, arguments.out)


if __name__ == "__main__":
    run_main(main)

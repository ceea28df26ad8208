"""What expert parallelism costs a training step in the decoder, by how it is routed and how batches are
assigned to ranks.

    python benchmarks/exchange.py [--rounds 20]

Two processes through the deepspeed launcher, expert parallelism 2, ZeRO stage 1; models alike but for the
decoder's routing take turns in the same processes. The encoder is dense, so all that is exchanged for experts
is the decoder's. Sentences are made up, of 16 languages to and from English with equally many pairs each;
their batches and the assignment to ranks are those of `lsmoe train`. A step has one batch for each rank, so
no router needs a pass ahead of it.

Half of the target tokens are English. Experts that are assigned to English are on one rank; where a learned
router has put them is chance. With replicas each rank computes them itself.

The share of the time is measured twice, in alternate steps: as `lsmoe train` tells it, with the time a rank
waits for the slower one, and with a barrier before each exchange, so that what is left is the exchange
itself. With 2 chunks it is the time in which a rank waits for an exchange that overlaps with computation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Corpus, argument_parser, in_processes, run_main, write
from torch import Tensor

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.assignment import affinity
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.launch import joining
from lsmoe_ds.parallel import collectives, compat
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import build_engine, train_step

RANKS, VOCABULARY, TOKENS, PAIRS = 2, 8000, 2048, 2000  # tokens of a batch, pairs of a direction
MODEL: dict[str, Any] = {"hidden": 256, "heads": 4, "encoder": {"layers": 4, "feed_forward": 1024}}
EXPERTS: dict[str, Any] = {"experts": 32, "every": 2, "top_k": 2}
LANGUAGES = "de nl sv fr es it pt ro ru uk pl cs hi bn fi tr".split()  # noqa: SIM905
LEARNED: dict[str, Any] = {"routing": "task", "task": "target"}
ASSIGNED = LEARNED | {"routing": "static"}
ENGLISH = {"replicas": ["en"]}
CHUNKS = {"chunks": 2}
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {  # the kind of batches, and settings of the experts
    "token": ("mixed", {"routing": "token"}),
    "token, 2 chunks": ("mixed", {"routing": "token"} | CHUNKS),
    "target language": ("mixed", LEARNED),
    "target language, 2 chunks": ("mixed", LEARNED | CHUNKS),
    "target language, replicas of English": ("mixed", LEARNED | ENGLISH),
    "target language, replicas of English, 2 chunks": ("mixed", LEARNED | ENGLISH | CHUNKS),
    "assigned target language": ("mixed", ASSIGNED),
    "assigned target language, replicas of English": ("mixed", ASSIGNED | ENGLISH),
    "target language, 2 groups": (
        "task-affine",
        LEARNED | {"expert_groups": RANKS},
    ),
    "pair, 2 groups": ("task-affine", {"routing": "task", "task": "pair", "expert_groups": RANKS}),
}


def recipe_of(languages: str, moe: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {
                "corpora": ["none"],
                "languages": LANGUAGES,
                "vocabulary": {"size": VOCABULARY},
                "batch": {"tokens": TOKENS, "count": RANKS, "languages": languages},
            },
            "model": {**MODEL, "decoder": {**MODEL["encoder"], "moe": {**EXPERTS, **moe}}},
            "training": {"steps": 1000, "learning_rate": 1e-4, "warmup": 100},
            "parallel": {"expert": RANKS},
        }
    )


def contestant(recipe: Recipe, topology: Topology) -> Callable[[], dict[str, float]]:
    """Two steps, and what they measure over all ranks; making their batches is not part of it."""
    groups, at_home = affinity(recipe, recipe.languages, topology.tensor, topology.expert, topology.data)
    layout: dict[str, Any] = {
        "rank": topology.data_rank,
        "world": topology.data,
        "groups": groups,
        "at_home": at_home,
    }
    corpus, data = Corpus(["en", *LANGUAGES], VOCABULARY, PAIRS, 3.0), recipe.data
    stream = BatchStream(
        corpus, recipe.languages, corpus, data.batch, data.temperature, recipe.training.seed, **layout
    )
    engine = build_engine(recipe, VOCABULARY, topology)
    computed = [0]  # choices that this rank's experts have computed

    def count(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        computed[0] += int((arguments[1] >= 0).sum())

    for _, layer in engine.module.moe_layers():
        layer.deepspeed_moe.experts.register_forward_pre_hook(count)

    begin = collectives._begin

    def after_barrier(
        tensor: Tensor, send: list[int], receive: list[int], group: Any, *more: Any
    ) -> collectives._Message:
        torch.distributed.barrier(group)
        return begin(tensor, send, receive, group, *more)

    def turn() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, function in (("with waiting", begin), ("alone", after_barrier)):
            collectives._begin = function  # type: ignore[assignment]
            step = next(stream)
            computed[0] = 0
            torch.distributed.barrier()
            begun = time.perf_counter()
            exchanged = train_step(engine, step, 100, recipe, topology).exchanged["decoder"]
            seconds = time.perf_counter() - begun
            collectives._begin = begin
            found[f"share of time, {name}"] = exchanged.seconds / (seconds * topology.world)
            if name == "with waiting":
                found["tokens per second"] = (step.source_tokens + step.target_tokens) / seconds
                found |= {"bytes a step": exchanged.bytes, "batches away of 2": step.away}
                of_ranks: list[int] = [0] * topology.world
                torch.distributed.all_gather_object(of_ranks, computed[0])
                found["experts' rows of the busiest rank"] = max(of_ranks) / sum(of_ranks)
        return found

    return turn


def measure(rounds: int) -> dict[str, Any]:
    joining.join()
    topology = Topology.build(expert=RANKS, device=joining.device())
    compat.seed_tensor_parallel_random(1, 0)
    turns = {name: contestant(recipe_of(*settings), topology) for name, settings in CONTESTANTS.items()}
    for turn in turns.values():
        turn()
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():  # a busy moment of the machine hits all alike
            measured[name].append(turn())
    result: dict[str, dict[str, float]] = {}
    for name, figures in measured.items():
        columns = {key: [each[key] for each in figures] for key in figures[0]}
        medians = {
            key: statistics.median(columns[key])
            for key in columns
            if "bytes" not in key and "away" not in key
        }
        means = {key: statistics.fmean(columns[key]) for key in columns if key not in medians}
        result[name] = {
            key: round(value, 4 if value < 10 else None) for key, value in {**medians, **means}.items()
        }
    model = {
        **MODEL,
        "decoder layers": MODEL["encoder"],
        **EXPERTS,
        "vocabulary": VOCABULARY,
        "languages": len(LANGUAGES) + 1,
    }
    setting = {"processes": RANKS, "threads": torch.get_num_threads(), "rounds": rounds}
    return {"model": model, "tokens of a batch": TOKENS, **setting, "decoder": result}


def main() -> None:
    parser = argument_parser(__doc__, rounds=20)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        part = measure(arguments.rounds)
        if os.environ["RANK"] == "0":
            arguments.part.write_text(json.dumps(part), encoding="utf-8")
        return
    result = in_processes(__file__, ["--rounds", str(arguments.rounds)], RANKS)
    for name, figures in result["decoder"].items():
        print(f"{name}: {figures}")
    write(result, arguments.out)


if __name__ == "__main__":
    run_main(main)

"""Tokens per second of training, and what it needs of memory.

    python benchmarks/train.py [--size demo|base|experts] [--rounds 9]

demo, base: on one process plain torch (torch.nn.Transformer, fused AdamW, no engine), ours dense and ours
sparse, and at size base transformers' Marian and JoeyNMT, take turns in the same process on the same batches.
Then ours on two processes through the deepspeed launcher, each with batches of its own, and expert
parallelism 2 for the sparse model; beside them gloo alone, which sums as many numbers as the dense model has
gradients.

experts: 128 experts in every second layer, top-1, ours and transformers' Switch Transformer, which take turns
as whole processes, for their memory.

Glibc is told to keep large blocks, for all alike.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import peers
import torch
from common import alternate, argument_parser, in_processes, peak_memory, ragged_batches, run_main, write
from torch import nn

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import PairBatch, Step
from lsmoe_ds.languages import PAD
from lsmoe_ds.launch import joining
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import build_engine, train_step

SIZES: dict[str, dict[str, Any]] = {
    "demo": {
        "preset": "transformer-tiny",
        "vocabulary": 8000,
        "tokens": 512,
        "length": 9.0,
        "experts": 8,
        "every": 2,
    },
    "base": {
        "preset": "transformer-base",
        "vocabulary": 32000,
        "tokens": 3440,
        "length": 25.0,
        "experts": 16,
        "every": 2,
    },
    "experts": {
        "preset": "transformer-base",
        "vocabulary": 32000,
        "tokens": 3440,
        "length": 25.0,
        "experts": 128,
        "every": 2,
    },
}
TURNS = 2  # of each process at size experts
ALONE = "share of a dense step that gloo takes alone to sum its gradients"
LANGUAGES = ["de", "nl", "fr", "es", "it", "ru", "uk"]


def recipe_of(size: str, sparse: bool, expert: int = 1, count: int = 1) -> Recipe:
    settings = SIZES[size]
    moe: dict[str, Any] = {
        "every": settings["every"],
        "experts": settings["experts"],
        "routing": "task",
        "top_k": 2,
    }
    side: dict[str, Any] = {"moe": moe} if sparse else {}
    if size == "experts":
        side = {"feed_forward": 1024, "moe": moe | {"routing": "token", "top_k": 1}}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {
                "corpora": ["none"],
                "languages": LANGUAGES,
                "vocabulary": {"size": settings["vocabulary"]},
                "batch": {"tokens": settings["tokens"], "count": count},
            },
            "model": {"preset": settings["preset"], "encoder": side, "decoder": side},
            "training": {"steps": 1000, "learning_rate": 1e-4, "warmup": 100, "dropout": 0.1},
            "parallel": {"expert": expert},
        }
    )


def packed(recipe: Recipe) -> Recipe:
    """Return the recipe with ``training.packed``."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"packed": True})})


def batches_of(size: str, seed: int) -> list[PairBatch]:
    settings = SIZES[size]
    count = 24 if size == "demo" else 3
    return ragged_batches(
        recipe_of(size, False).languages,
        settings["vocabulary"],
        settings["tokens"],
        count,
        settings["length"],
        seed,
    )


def tokens_of(batches: list[PairBatch]) -> int:
    return sum(int((b.source != PAD).sum()) + b.target_tokens for b in batches)


def ours(
    recipe: Recipe, vocabulary: int, batches: list[PairBatch], topology: Topology
) -> tuple[Callable[[], None], int]:
    """And the parameters of a rank."""
    engine = build_engine(recipe, vocabulary, topology)
    steps = [
        Step([b], b.target_tokens * topology.data, int((b.source != PAD).sum()) * topology.data, 0, [])
        for b in batches
    ]

    def run() -> None:
        for step in steps:
            train_step(engine, step, 100, recipe, topology)

    return run, sum(p.numel() for p in engine.module.parameters())


def taking_turns(size: str, rounds: int) -> dict[str, Any]:
    """All models in this process (or, with several, ours, and of all processes together)."""
    vocabulary = SIZES[size]["vocabulary"]
    topology = start()
    world = topology.world
    dense, sparse = (recipe_of(size, moe, world if moe else 1, world) for moe in (False, True))
    batches = batches_of(size, topology.rank + 1)
    others: dict[str, nn.Module] = (
        {"plain torch, dense": peers.PlainTransformer(dense, vocabulary)} if world == 1 else {}
    )
    if world == 1 and size == "base":
        others |= (
            {"transformers Marian": peers.marian(dense, vocabulary)}
            if peers.installed("transformers")
            else {}
        )
        others |= {"JoeyNMT": peers.JoeyNMT(dense, vocabulary)} if peers.installed("joeynmt") else {}
    contestants = {name: peers.training(model, dense, batches) for name, model in others.items()}
    contestants["ours, dense"], gradients = ours(dense, vocabulary, batches, topology)
    contestants["ours, sparse"], parameters = ours(sparse, vocabulary, batches, topology)
    for name, recipe in (("dense", dense), ("sparse", sparse)):
        contestants[f"ours, {name}, packed"], _ = ours(packed(recipe), vocabulary, batches, topology)
    if world > 1:
        contestants[ALONE] = summing(gradients, len(batches))
    for run in contestants.values():
        run()
    seconds = alternate(contestants, rounds)
    exchange = {ALONE: seconds.pop(ALONE) / seconds["ours, dense"]} if world > 1 else {}
    tokens = torch.tensor(float(tokens_of(batches)))
    torch.distributed.all_reduce(tokens)
    return {
        "processes": world,
        "threads": torch.get_num_threads(),
        "real tokens": int(tokens),
        "tokens per second": {name: round(float(tokens) / value, 1) for name, value in seconds.items()},
        "parameters of the sparse model on a rank": parameters,
        **{name: round(share, 3) for name, share in exchange.items()},
    }


def summing(numbers: int, steps: int) -> Callable[[], None]:
    """Sum so many zeros over all ranks, once for each step."""
    flat = torch.zeros(numbers)

    def run() -> None:
        for _ in range(steps):
            torch.distributed.all_reduce(flat)

    return run


def alone(model: str, rounds: int) -> dict[str, Any]:
    """One model of size experts in a process of its own."""
    vocabulary = SIZES["experts"]["vocabulary"]
    topology, recipe, batches = start(), recipe_of("experts", True), batches_of("experts", 1)
    if model == "ours":
        run, parameters = ours(recipe, vocabulary, batches, topology)
    else:
        peer = peers.switch(recipe, vocabulary)
        run, parameters = peers.training(peer, recipe, batches), sum(p.numel() for p in peer.parameters())
    run()
    seconds = alternate({model: run}, rounds)[model]
    return {
        "tokens per second": round(tokens_of(batches) / seconds, 1),
        "GiB": round(peak_memory(), 2),
        "parameters": parameters,
    }


def start() -> Topology:
    joining.join()
    topology = Topology.build(expert=torch.distributed.get_world_size(), device=joining.device())
    compat.seed_tensor_parallel_random(1, 0)
    torch.manual_seed(1)
    return topology


def compare_experts(rounds: int) -> dict[str, Any]:
    """Ours and Switch, one process after the other, ``TURNS`` times; medians."""
    models = ["ours", *(["transformers Switch"] if peers.installed("transformers") else [])]
    turns: dict[str, list[dict[str, Any]]] = {model: [] for model in models}
    for _ in range(TURNS):
        for model in models:
            turns[model].append(
                in_processes(__file__, ["--size", "experts", "--rounds", str(rounds), "--model", model], 1)
            )
            print(f"{model}: {turns[model][-1]}", flush=True)
    return {
        model: {key: median(each[key] for each in found) for key in found[0]}
        for model, found in turns.items()
    }


def main() -> None:
    parser = argument_parser(__doc__, rounds=9)
    parser.add_argument(
        "--size", choices=list(SIZES), default="demo", help="size of the models (default: demo)"
    )
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size, rounds = arguments.size, arguments.rounds
    if arguments.part is not None:
        part = alone(arguments.model, rounds) if arguments.model else taking_turns(size, rounds)
        if os.environ["RANK"] == "0":
            arguments.part.write_text(json.dumps(part))
        return
    if size == "experts":
        write(
            {"size": SIZES[size], "rounds": rounds, "turns": TURNS, "models": compare_experts(rounds)},
            arguments.out,
        )
        return
    parts = [in_processes(__file__, ["--size", size, "--rounds", str(rounds)], world) for world in (1, 2)]
    rates = parts[0]["tokens per second"]
    ratio = {name: round(value / rates["plain torch, dense"], 3) for name, value in rates.items()}
    print(ratio)
    write({"size": size, "rounds": rounds, "ratio to plain torch": ratio, "runs": parts}, arguments.out)


if __name__ == "__main__":
    run_main(main)

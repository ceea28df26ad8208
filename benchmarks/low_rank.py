"""A training step with language-specific low-rank matrices (LMS, rank 32 in every feed-forward) against one
without.

    python benchmarks/low_rank.py [--rounds 7]

transformer-small with a vocabulary of 32,000, batches of about 3,440 real tokens, languages mixed in each
batch; one process, engine and optimizer included, all take turns on the same batches. "formed" multiplies out
W + V F for every pair of the batch and has it pass through a linear layer by itself, as homogeneous batches
would need it.

8 languages to and from English, one batch a step; 102 languages to and from English (204 directions), four
batches a step, as the paper accumulates for its 188.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, argument_parser, in_processes, peak_memory, ragged_batches, run_main, write
from torch import Tensor, nn

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import PairBatch, Step
from lsmoe_ds.languages import PAD
from lsmoe_ds.launch import joining
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.low_rank.bank import LowRankBank
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.shipped import ROOT as PROJECT
from lsmoe_ds.training.engine import build_engine, train_step

VOCABULARY, TOKENS, LENGTH = 32000, 3440, 25.0
EIGHT = "ar de es fa he it nl pl".split()  # noqa: SIM905
FORMS: dict[str, dict[str, Any] | None] = {
    "naive": None,
    "LMS, pair": {"rank": 32},
    "LMS, language": {"rank": 32, "index": "language"},
    "formed": {"rank": 32},
    "LMS + FD": {"rank": 32, "fuse_distillation": True},
}
SETTINGS: dict[str, tuple[int, list[str]]] = {
    "8 languages": (1, list(FORMS)),
    "204 directions": (4, ["naive", "LMS, pair"]),
}


def recipe_of(languages: list[str], low_rank: dict[str, Any] | None) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {"corpora": ["none"], "languages": languages, "vocabulary": {"size": VOCABULARY}},
            "model": {"preset": "transformer-small", "low_rank": low_rank},
            "training": {"steps": 1000, "learning_rate": 1e-4, "warmup": 100},
        }
    )


def formed(self: LowRankBank, base: nn.Linear, x: Tensor, context: LanguageContext) -> Tensor:
    """Of each pair of neighbors the product, added to the weight."""
    rows, kinds = x.reshape(-1, x.shape[-1]), (self.choice.vertical, self.choice.flat)
    vertical, flat = (self.get_parameter(name) for name in ("vertical", "flat"))
    ends = sorted({segment.stop for kind in kinds for segment in context.segments(kind)})
    each, parts, start = rows.shape[0] // ends[-1], [], 0
    for end in ends:
        i, j = (next(each.language for each in context.segments(kind) if each.stop > start) for kind in kinds)
        weight = base.weight + vertical[self.rows[i]].t() @ flat[self.rows[j]]
        parts.append(F.linear(rows[start * each : end * each], weight, base.bias))
        start = end
    return torch.cat(parts).view(*x.shape[:-1], -1)


def contestant(
    recipe: Recipe, batches: list[PairBatch], topology: Topology, forward: Any = None
) -> tuple[Callable[[], None], int]:
    """Return a function that trains one step on all batches, and the number of parameters."""
    recipe.data.batch.count = len(batches)
    engine = build_engine(recipe, VOCABULARY, topology)
    for module in engine.module.modules():
        if forward is not None and isinstance(module, LowRankBank):
            module.forward = forward.__get__(module)  # type: ignore[method-assign]
    step = Step(
        batches,
        sum(b.target_tokens for b in batches),
        sum(int((b.source != PAD).sum()) for b in batches),
        0,
        [],
    )
    return lambda: (train_step(engine, step, 100, recipe, topology), None)[1], sum(
        p.numel() for p in engine.module.parameters()
    )


def measure(setting: str, rounds: int) -> dict[str, Any]:
    joining.join()
    topology = Topology.build(device=joining.device())
    compat.seed_tensor_parallel_random(1, 0)
    count, forms = SETTINGS[setting]
    languages = EIGHT if count == 1 else load_recipe(PROJECT / "recipes/mediawiki-204.yaml").data.languages
    naive = recipe_of(languages, None)
    # Sorted by language, as the batches of a training are.
    batches = ragged_batches(naive.languages, VOCABULARY, TOKENS, count, LENGTH)
    contestants, parameters = {}, {}
    for name in forms:
        forward = formed if name == "formed" else None
        contestants[name], parameters[name] = contestant(
            recipe_of(languages, FORMS[name]), batches, topology, forward
        )
    for run in contestants.values():
        run()
    seconds = alternate(contestants, rounds)
    tokens = sum(int((b.source != PAD).sum()) + b.target_tokens for b in batches)
    return {
        "batches a step": count,
        "directions": len(naive.languages.directions),
        "steps": {
            name: {
                "tokens per second": round(tokens / value, 1),
                "time to naive": round(value / seconds["naive"], 3),
                "parameters": parameters[name],
            }
            for name, value in seconds.items()
        },
        "GiB of all together": round(peak_memory(), 1),
    }


def main() -> None:
    parser = argument_parser(__doc__, rounds=7)
    parser.add_argument("--setting", choices=list(SETTINGS), help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        part = measure(arguments.setting, arguments.rounds)
        if os.environ["RANK"] == "0":
            arguments.part.write_text(json.dumps(part), encoding="utf-8")
        return
    options = ["--rounds", str(arguments.rounds), "--setting"]
    result = {name: in_processes(__file__, [*options, name], 1) for name in SETTINGS}
    for name, found in result.items():
        for form, figures in found["steps"].items():
            print(f"{name}, {form}: {figures}")
    write({"rounds": arguments.rounds, "settings": result}, arguments.out)


if __name__ == "__main__":
    run_main(main)

"""Training rank-8 language-specific matrices beside a frozen transformer-base against training all of it.

    python benchmarks/frozen.py [--rounds 9] [--size 600m]

transformer-base with a vocabulary of 32,000 and low-rank matrices in every feed-forward, 8 languages to and
from English, batches of about 3,440 real tokens; one thread, engine and optimizer included. Both take turns
on the same batch for the time of a step. Memory and checkpoints are measured in a process for each: the
largest resident set after the steps, before anything is saved, and the bytes of all files of a checkpoint and
of the frozen base.

With ``--size 600m`` the base has the shapes of NLLB-200-distilled-600M with random weights, the matrices
alone train, on batches of about 200 real tokens, and only memory and bytes are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import alternate, argument_parser, in_processes, peak_memory, ragged_batches, run_main, write

from lsmoe_ds.checkpoint.saving import Saver
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Step
from lsmoe_ds.languages import PAD
from lsmoe_ds.launch import joining
from lsmoe_ds.parallel import compat, deepspeed_engine
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import build_engine, train_step

LENGTH = 25.0
LANGUAGES = "ar de es fa he it nl pl".split()  # noqa: SIM905
FORMS = {"all": "everything trains", "methods": "the matrices train"}
STEPS = 2  # before memory is read: in the second, gradients and the optimizer's state are there together


@dataclass(frozen=True)
class Size:
    """A base, the real tokens of its batches, the measured forms, and whether their steps are timed."""

    model: dict[str, Any]
    vocabulary: int
    tokens: int
    forms: tuple[str, ...]
    timed: bool


NLLB_SIDE = {"layers": 12, "feed_forward": 4096}
NLLB = {"hidden": 1024, "heads": 16, "encoder": NLLB_SIDE, "decoder": NLLB_SIDE}
SIZES = {
    "base": Size({"preset": "transformer-base"}, 32000, 3440, tuple(FORMS), timed=True),
    "600m": Size(NLLB, 256_206, 200, ("methods",), timed=False),
}


def recipe_of(size: Size, trainable: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {"corpora": ["none"], "languages": LANGUAGES, "vocabulary": {"size": size.vocabulary}},
            "model": {**size.model, "low_rank": {"rank": 8}},
            "training": {"steps": 1000, "learning_rate": 1e-4, "warmup": 100, "trainable": trainable},
        }
    )


def contestant(size: Size, trainable: str, topology: Topology) -> tuple[Any, Callable[[], None]]:
    """Return an engine, and a step of it on one batch."""
    recipe = recipe_of(size, trainable)
    engine = build_engine(recipe, size.vocabulary, topology)
    (batch,) = ragged_batches(recipe.languages, size.vocabulary, size.tokens, 1, LENGTH)
    step = Step([batch], batch.target_tokens, int((batch.source != PAD).sum()), 0, [])
    return engine, lambda: (train_step(engine, step, 100, recipe, topology), None)[1]


def bytes_below(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def alone(size: Size, trainable: str, topology: Topology) -> dict[str, Any]:
    """Return parameters, memory and bytes of one form."""
    engine, step = contestant(size, trainable, topology)
    for _ in range(STEPS):
        step()
    peak = peak_memory()
    parameters = list(engine.module.parameters())
    states = deepspeed_engine.optimizer_states(engine).values()
    moments = [value for state in states for value in state.values()]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        with Saver(run, topology, keep=1) as saver:
            saver.save(engine, 1, {})
        saved, base = bytes_below(run / "checkpoints" / "step-1"), bytes_below(run / "frozen")
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "of these train": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "optimizer bytes": sum(value.nbytes for value in moments),
        "gradient bytes": sum(parameter.nbytes for parameter in parameters if parameter.requires_grad),
        "checkpoint bytes": saved,
        "frozen base bytes, once for a run": base,
        "peak GiB of the process": round(peak, 2),
    }


def together(size: Size, rounds: int, topology: Topology) -> dict[str, Any]:
    """Return the median seconds of a step of each form, as a clock tells them and as its threads computed."""
    computed: dict[str, list[float]] = {name: [] for name in FORMS}

    def timed(name: str) -> Callable[[], None]:
        _, step = contestant(size, name, topology)
        step()  # the first makes the optimizer's state

        def run() -> None:
            begun = time.process_time()
            step()
            computed[name].append(time.process_time() - begun)

        return run

    seconds = alternate({name: timed(name) for name in FORMS}, rounds)
    medians = {name: median(each) for name, each in computed.items()}
    figures = {"seconds of a step": seconds, "CPU seconds of a step": medians}
    return {name: {key: round(values[name], 3) for key, values in figures.items()} for name in FORMS}


def main() -> None:
    parser = argument_parser(__doc__, rounds=9)
    about_size = "the base: transformer-base, or NLLB-600M's shapes (default: %(default)s)"
    parser.add_argument("--size", choices=list(SIZES), default="base", help=about_size)
    parser.add_argument("--form", choices=list(FORMS), help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.part is not None:
        torch.set_num_threads(1)  # several that wait for one another measure what else the machine does
        joining.join()
        topology = Topology.build(device=joining.device())
        compat.seed_tensor_parallel_random(1, 0)
        rounds, form = arguments.rounds, arguments.form
        part = alone(size, form, topology) if form else together(size, rounds, topology)
        arguments.part.write_text(json.dumps(part), encoding="utf-8")
        return
    before = os.getloadavg()[0]
    options = ["--size", arguments.size]
    seconds = in_processes(__file__, [*options, "--rounds", str(arguments.rounds)], 1) if size.timed else {}
    forms = {name: in_processes(__file__, [*options, "--form", name], 1) for name in size.forms}
    for name, found in forms.items():
        if size.timed:
            of_all = seconds["all"]
            ratios = {f"{key}, to all": round(value / of_all[key], 3) for key, value in seconds[name].items()}
            found |= seconds[name] | ratios
        print(f"{FORMS[name]}: {found}")
    loads = {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}
    rounds = {"rounds": arguments.rounds} if size.timed else {"steps": STEPS, "tokens": size.tokens}
    result = {"size": arguments.size, **rounds, "threads": 1, "load of the machine": loads}
    result["trainable"] = forms
    write(result, arguments.out)


if __name__ == "__main__":
    run_main(main)

"""A training step of language-specific LoRA beside a frozen base against the base's own products.

    python benchmarks/language_lora.py [--rounds 7]

transformer-base with a vocabulary of 32,000, frozen; one batch of about 3,440 real tokens in all 132
directions of 12 languages; matrices beside query, key, value and both feed-forward layers, of rank 2 for
eight languages and 8 for four, by the source in the first four layers of the encoder and by the target above;
two threads, one process, engine and optimizer included. "base" is the frozen model's forward pass and the
backward pass to its inputs, without matrices. All take turns on the same batch. "blocks" multiplies the
languages by one padded, batched product, as on GPUs without a grouped product.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from common import alternate, argument_parser, in_processes, peak_memory, ragged_batches, run_main, write

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import PairBatch, Step
from lsmoe_ds.languages import PAD
from lsmoe_ds.launch import joining
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel import compat, grouped
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import build_engine, train_step

VOCABULARY, TOKENS, LENGTH = 32000, 3440, 25.0
CODES = "ar de en es fa fr he it ja ko nl pl".split()  # noqa: SIM905
RANKS = {code: 8 if number >= 8 else 2 for number, code in enumerate(CODES)}
CHOSEN = {"source": ["encoder.0-3"], "target": ["encoder.4-5", "decoder"]}
FORMS: dict[str, tuple[Any, bool]] = {  # the index, and whether products are grouped where they can be
    "2;2;8": (CHOSEN, True),
    "2;2;8, blocks": (CHOSEN, False),
    "2;2;8, learned indexes": ("learned", True),
}


def recipe_of(index: Any) -> Recipe:
    at = ["attention.query", "attention.key", "attention.value", "feed_forward"]
    low_rank = {"rank": RANKS, "index": index, "at": at, "zero": "vertical"}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {
                "corpora": ["none"],
                "languages": CODES,
                "directions": "all",
                "tags": "source-target",
                "vocabulary": {"size": VOCABULARY},
            },
            "model": {"preset": "transformer-base", "low_rank": low_rank if index else None},
            "training": {
                "steps": 1000,
                "learning_rate": 1e-4,
                "warmup": 100,
                "trainable": "methods" if index else "all",
            },
        }
    )


def step_of(recipe: Recipe, batch: PairBatch, topology: Topology) -> Callable[[], None]:
    """Return an optimizer step on the batch."""
    engine = build_engine(recipe, VOCABULARY, topology)
    step = Step([batch], batch.target_tokens, int((batch.source != PAD).sum()), 0, [])
    return lambda: (train_step(engine, step, 100, recipe, topology), None)[1]


def base_of(recipe: Recipe, batch: PairBatch, topology: Topology) -> Callable[[], None]:
    """Return a forward pass of the frozen model and its backward pass to the embedded inputs."""
    model = Transformer(recipe, VOCABULARY, topology)
    initialize(model, 1, topology)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.embedding.register_forward_hook(lambda module, given, out: out.requires_grad_())

    def run() -> None:
        losses = model(batch.source, batch.decoder_input, batch.labels, batch.ids)
        (losses.loss / batch.target_tokens).backward()

    return run


def by_form(is_grouped: bool, step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with nullcontext() if is_grouped else mock.patch.object(grouped, "is_grouped", return_value=False):
            step()

    return run


def measure(rounds: int) -> dict[str, Any]:
    joining.join()
    topology = Topology.build(device=joining.device())
    compat.seed_tensor_parallel_random(1, 0)
    plain = recipe_of(None)
    (batch,) = ragged_batches(plain.languages, VOCABULARY, TOKENS, 1, LENGTH)
    steps = {str(index): step_of(recipe_of(index), batch, topology) for index in (CHOSEN, "learned")}
    contestants = {"base": base_of(plain, batch, topology), "all is trained": step_of(plain, batch, topology)}
    contestants |= {name: by_form(form, steps[str(index)]) for name, (index, form) in FORMS.items()}
    for run in contestants.values():
        run()
    seconds = alternate(contestants, rounds)
    return {
        "sentences": len(batch.source),
        "steps": {
            name: {"seconds": round(value, 3), "time to base": round(value / seconds["base"], 3)}
            for name, value in seconds.items()
        },
        "GiB of all together": round(peak_memory(), 1),
    }


def main() -> None:
    parser = argument_parser(__doc__, rounds=7)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        arguments.part.write_text(json.dumps(measure(arguments.rounds)), encoding="utf-8")
        return
    before = os.getloadavg()[0]
    result = in_processes(__file__, ["--rounds", str(arguments.rounds)], 1)
    for name, figures in result["steps"].items():
        print(f"{name}: {figures}")
    loads = {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}
    write({"rounds": arguments.rounds, "load of the machine": loads, **result}, arguments.out)


if __name__ == "__main__":
    run_main(main)

"""What masks of neurons cost in training, how long recording them takes, and how fast their sub-networks
decode.

    python benchmarks/neurons.py [--rounds 9]

transformer-base with a vocabulary of 32,000, 14 directions of 8 languages, two threads, one process.

steps: an optimizer step on one batch of about 3,440 real tokens of all directions: the plain model; with
masks of 60 % of the units, of both kinds; with adapters of each pair; with LaSS' masks of 30 % of all
weights. All take turns on the same batch.

recording: a pass over ten such batches that counts activations, beside the same pass that only computes the
hidden states.

decoding: dense models of one direction with fewer and fewer of the 2,048 units, and one whose adapters have
become layers, in torch and in CTranslate2 (float32), batches of 16 sentences, 32 tokens each, greedy.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import alternate, argument_parser, in_processes, peak_memory, ragged_batches, run_main, write
from decode import TOKENS as DECODED
from decode import decode, forced_tokens, sentences

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import PairBatch, Step
from lsmoe_ds.export.ctranslate2 import specify
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.languages import EOS, PAD
from lsmoe_ds.launch import joining
from lsmoe_ds.methods.lass.method import MaskedWeight
from lsmoe_ds.methods.neurons.recording import Recorder, observed
from lsmoe_ds.methods.neurons.selection import at_random
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import build_engine, train_step

VOCABULARY, TOKENS, LENGTH, SENTENCES = 32000, 3440, 25.0, 16
CODES = "de fr it ja nl ru zh_Hans".split()  # noqa: SIM905
KEPT = (1.0, 0.8, 0.6, 0.4)
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks of units": {"neurons": {"random": 0.6}},
    "masks of rows": {"neurons": {"random": 0.6, "remove": "rows"}},
    "adapters by pair, width 128": {"adapters": {"width": 128}},
    "LaSS": {"lass": {"tuned": "none", "ratio": 0.7}},
}


def recipe_of(model: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {"corpora": ["none"], "languages": CODES, "vocabulary": {"size": VOCABULARY}},
            "model": {"preset": "transformer-base", **model},
            "training": {"steps": 1000, "learning_rate": 1e-4, "warmup": 100, "start_from": "none"},
        }
    )


def step_of(recipe: Recipe, batch: PairBatch, topology: Topology) -> Callable[[], None]:
    """Return an optimizer step on the batch."""
    engine = build_engine(recipe, VOCABULARY, topology)
    for module in engine.module.modules():
        if isinstance(module, MaskedWeight):
            module.mask.copy_(torch.rand(module.mask.shape) < 0.3)
    step = Step([batch], batch.target_tokens, int((batch.source != PAD).sum()), 0, [])
    return lambda: (train_step(engine, step, 100, recipe, topology), None)[1]


def measure_steps(rounds: int, topology: Topology) -> dict[str, Any]:
    recipes = {name: recipe_of(model) for name, model in METHODS.items()}
    (batch,) = ragged_batches(recipes["plain"].languages, VOCABULARY, TOKENS, 1, LENGTH)
    contestants = {name: step_of(recipe, batch, topology) for name, recipe in recipes.items()}
    for run in contestants.values():
        run()
    seconds = alternate(contestants, rounds)
    return {
        name: {"seconds": round(value, 3), "time to plain": round(value / seconds["plain"], 3)}
        for name, value in seconds.items()
    }


def measure_recording(rounds: int, topology: Topology) -> dict[str, Any]:
    recipe = recipe_of({})
    model = Transformer(recipe, VOCABULARY, topology)
    initialize(model, 1, topology)
    model.eval()
    batches = ragged_batches(recipe.languages, VOCABULARY, TOKENS, 10, LENGTH)
    directions = len(recipe.languages.directions)

    @torch.no_grad()
    def plain() -> None:
        for batch in batches:
            model.states(batch.source, batch.decoder_input, batch.ids)

    def recorded(per: Any) -> Callable[[], None]:
        def run() -> None:
            recorder = Recorder(model, directions, per, topology.device)
            with observed(recorder):
                for batch in batches:
                    recorder.read(batch)

        return run

    contestants = {
        "hidden states": plain,
        "by sentence": recorded("sentence"),
        "by token": recorded("token"),
    }
    seconds = alternate(contestants, rounds)
    passes = {
        name: {"seconds": round(value, 2), "time to plain": round(value / seconds["hidden states"], 3)}
        for name, value in seconds.items()
    }
    tokens = sum(int((b.source != PAD).sum()) + b.target_tokens for b in batches)
    return {"sentences": sum(len(batch.source) for batch in batches), "tokens": tokens, **passes}


def sub_network(model: dict[str, Any], part: float | None) -> tuple[Transformer, Recipe, dict[str, Any]]:
    """Return the dense model of the first direction, of a random model with ``part`` of the units."""
    recipe = recipe_of(model)
    whole = Transformer(recipe, VOCABULARY)
    initialize(whole, 1, Topology.single())
    for name, value in whole.named_buffers():
        if part is not None and name.endswith("_neurons.mask"):
            directions, units = value.shape
            value.copy_(at_random(directions, units, part, torch.Generator().manual_seed(1)))
    names = global_names(whole, Topology.single())
    weights = {names[name]: value for name, value in whole.state_dict().items()}
    tensors, dense = extract(weights, recipe, recipe.languages.directions[0])
    made = Transformer(dense, VOCABULARY)
    made.load_state_dict(dict(tensors))
    made.eval().requires_grad_(False)
    made.pack()  # as a model that is loaded to translate
    return made, dense, dict(tensors)


def measure_decoding(rounds: int, topology: Topology) -> dict[str, Any]:
    import ctranslate2

    contestants: dict[str, Callable[[], object]] = {}
    sizes = {}
    models: dict[str, tuple[dict[str, Any], float | None]]
    models = {f"{part:.0%} of the units": ({"neurons": {"random": 1.0}}, part) for part in KEPT}
    models["with adapters as layers, width 128"] = ({"adapters": {"width": 128}}, None)
    for name, (method, part) in models.items():
        model, recipe, tensors = sub_network(method, part)
        batch, forced = sentences(recipe, SENTENCES, 1), forced_tokens(SENTENCES, 1)
        contestants[f"{name}, torch"] = functools.partial(decode, model, batch, forced)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        folder = Path(os.environ["TMPDIR"]) / name.replace(" ", "-").replace("%", "")
        folder.mkdir()
        pieces = [f"t{i}" for i in range(VOCABULARY)]
        pieces[:4] = ["<s>", "<blank>", "</s>", "<unk>"]
        specify(tensors, recipe, pieces, "float32").save(str(folder))
        translator = ctranslate2.Translator(str(folder), intra_threads=2, compute_type="float32")
        sources = [[pieces[i] for i in row[row != PAD].tolist()[:-1]] for row in batch.source]
        options = {"beam_size": 1, "min_decoding_length": DECODED, "max_decoding_length": DECODED}
        search = functools.partial(translator.translate_batch, sources, **options)
        contestants[f"{name}, CTranslate2"] = search
    for run in contestants.values():
        run()
    seconds = alternate(contestants, rounds)
    assert EOS == 2
    return {
        name: {
            "parameters": sizes[name],
            **{
                f"tokens/s, {engine}": round(SENTENCES * DECODED / seconds[f"{name}, {engine}"])
                for engine in ("torch", "CTranslate2")
            },
            **{
                f"speed to all units, {engine}": round(
                    seconds[f"{next(iter(models))}, {engine}"] / seconds[f"{name}, {engine}"], 2
                )
                for engine in ("torch", "CTranslate2")
            },
        }
        for name in models
    }


def measure(rounds: int) -> dict[str, Any]:
    joining.join()
    topology = Topology.build(device=joining.device())
    compat.seed_tensor_parallel_random(1, 0)
    torch.manual_seed(1)
    return {
        "steps": measure_steps(rounds, topology),
        "recording": measure_recording(max(3, rounds // 3), topology),
        "decoding": measure_decoding(max(3, rounds // 2), topology),
        "GiB of all together": round(peak_memory(), 1),
    }


def main() -> None:
    parser = argument_parser(__doc__, rounds=9)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        os.environ["TMPDIR"] = str(arguments.part.parent)
        arguments.part.write_text(json.dumps(measure(arguments.rounds)), encoding="utf-8")
        return
    before = os.getloadavg()[0]
    result = in_processes(__file__, ["--rounds", str(arguments.rounds)], 1)
    loads = {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}
    write({"rounds": arguments.rounds, "load of the machine": loads, **result}, arguments.out)


if __name__ == "__main__":
    run_main(main)

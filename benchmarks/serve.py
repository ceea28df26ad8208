"""What it costs to serve one direction: load time, memory and tokens a second, by what is served.

    python benchmarks/serve.py [--experts 32 128] [--rounds 3]

The models of "Beyond Distillation" (section 4.3) at a base's size, 6 + 6 layers, H 512, F 2048, a vocabulary
of 32,000, experts in every second layer, and what becomes of them for one direction: the model routed by
token, whole and with a quarter of its experts (`lsmoe convert --as hybrid --keep`); the sub-network of the
model routed by target language (`--as dense`, two experts joined); and a dense model of the base's size, as
a baseline or a distilled student is. In torch and in transformers; what is dense also in CTranslate2, in
float32 and int8. transformers has what is routed by token as NLLB-MoE, whose fault in version 5 is mended
(docs/convert.md).

Each lies in a folder as `lsmoe convert` writes it, and is loaded from there by a process of its own, which
then decodes batches of 1, 16, 64 and 128 sentences as `decode.py` does: 32 tokens for each sentence,
encoding included, greedily. The best batch size counts. Three figures of memory are taken: with the libraries
alone, once the model is loaded, and at most. Weights are random, routers are balanced as in `decode.py`, and
files are in the system's cache. The processes take turns; medians count.

    python benchmarks/serve.py --run RUN [RUN ...] --direction en-de

measures your own runs in the same way: whole, and what serves the direction. That is its dense model in each
form, or in torch what is left of a model that is routed by token.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decode
import torch
from common import argument_parser, in_processes, peak_memory, run_main, write
from peers import installed
from support.small_huggingface import use_chosen_experts

from lsmoe_ds.checkpoint.stored import find_model, write_folder
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import PairBatch
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.vocabulary import train_vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.export import ctranslate2, huggingface
from lsmoe_ds.export.kept_experts import Keep, keep_used
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.inference.engine import Engine
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.languages import PAD
from lsmoe_ds.parallel.parameters import global_names, named_state
from lsmoe_ds.parallel.topology import Topology

EN_DE = Direction("en", "de")
Model = tuple[Tensors, Recipe]
ENGINES = ("torch", "transformers", "CTranslate2", "CTranslate2 int8")


def recipe_of(routing: str | None, experts: int) -> Recipe:
    value = decode.recipe_of(routing, experts).model_dump(mode="json")
    if routing == "target":
        moe = {"experts": experts, "every": 2, "top_k": decode.TOP_K, "routing": "task", "task": "target"}
        value["model"]["encoder"]["moe"] = value["model"]["decoder"]["moe"] = moe
    return Recipe.model_validate(value)


def weights_of(recipe: Recipe) -> Tensors:
    """Random weights, with routers that use their experts alike."""
    model = decode.Transformer(recipe, decode.VOCABULARY, Topology.single())
    decode.initialize(model, 1, Topology.single())
    model.eval().requires_grad_(False)
    if any(not moe.by_task for _, _, moe in recipe.model.moe_layers()):
        decode.balance_ours(model, recipe, 1)
    names = global_names(model, Topology.single())
    return Tensors.of({names[name]: value.detach() for name, value in named_state(model)})


def make_vocabulary(folder: Path, recipe: Recipe) -> Path:
    letters = random.Random(1)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(40000)]
    texts = (" ".join(letters.choices(words, k=12)) for _ in range(20000))
    train_vocabulary(texts, recipe.data.vocabulary, recipe.languages.codes).save(folder / "vocabulary.model")
    return folder / "vocabulary.model"


def make_folders(folder: Path, experts: int) -> dict[str, list[str]]:
    """Write all models; return the engines of each, by its name."""
    vocabulary = make_vocabulary(folder, recipe_of(None, 0))
    made: dict[str, list[str]] = {}

    def save(name: str, kind: str, model: Model, write_files: Any = None, **more: Any) -> None:
        weights, recipe = model
        provenance = {
            **{"kind": kind, "run": name, "step": 1, "direction": str(EN_DE), "route": "specific"},
            **dict.fromkeys(("sparse_parameters", "dense_parameters"), weights.numbers),
        }
        how = {} if write_files is None else {"write": write_files}
        write_folder(folder / name, weights, recipe, vocabulary, provenance, **how, **more)

    def save_hybrid(name: str, model: Model, kind: str = "hybrid") -> None:
        save(f"{name}-torch", kind, model)
        if installed("transformers"):
            save(f"{name}-transformers", "huggingface", model, huggingface.write_files)
        made[name] = [engine for engine in ENGINES if (folder / f"{name}-{engine}").is_dir()]

    def save_dense(name: str, model: Model) -> None:
        save_hybrid(name, model, "dense")
        if installed("ctranslate2"):
            of, write_files = "ctranslate2", ctranslate2.write_files
            save(f"{name}-CTranslate2", of, model, write_files, quantization="float32")
            save(f"{name}-CTranslate2 int8", of, model, write_files, quantization="int8")
        made[name] = [engine for engine in ENGINES if (folder / f"{name}-{engine}").is_dir()]

    save_dense("dense", (weights_of(recipe_of(None, 0)), recipe_of(None, 0)))
    recipe = recipe_of("target", experts)
    save_dense("sub-network", extract(weights_of(recipe), recipe, EN_DE))
    recipe = recipe_of("token", experts)
    whole, recipe = extract(weights_of(recipe), recipe, EN_DE, hybrid=True)
    save_hybrid("token", (whole, recipe))
    uses = {(side, layer): torch.rand(experts).double() for side, layer, _ in recipe.model.moe_layers()}
    kept, fewer, _ = keep_used(whole, recipe, uses, Keep(number=experts // 4))
    save_hybrid("token, a quarter kept", (kept, fewer))
    return made


def resident() -> float:
    """GiB that this process holds."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 2**20


def runner(engine: Any, direction: Direction, count: int) -> Callable[[], object]:
    """Return a function that decodes ``count`` sentences of random tokens."""
    size, length = engine.vocabulary.size, decode.TOKENS
    sources, forced = decode.random_sources(size, count, 1), decode.forced_tokens(count, 1, size)
    if isinstance(engine, Loaded):
        batch = engine.collate(sources, None, direction)
        return lambda: decode.decode(engine.model, batch, forced)  # type: ignore[arg-type]
    form = form_of(engine.recipe.data, engine.languages, engine.vocabulary)
    read = form.collate(sources, None, [engine.languages.direction_id(direction)] * count)
    assert isinstance(read, PairBatch)
    source = read.source
    if isinstance(engine, huggingface.Exported):
        return lambda: engine.model.generate(
            input_ids=source,
            attention_mask=source != PAD,
            max_new_tokens=length,
            min_new_tokens=length,
            num_beams=1,
            do_sample=False,
        )
    texts = [[engine.pieces[i] for i in row if i != PAD] for row in source.tolist()]
    return lambda: engine.translator.translate_batch(
        texts, beam_size=1, min_decoding_length=length, max_decoding_length=length
    )


def measure(folder: Path, direction: Direction) -> dict[str, Any]:
    """Load a model and decode with it, in this process."""
    before = resident()
    begun = time.perf_counter()
    engine: Engine
    if folder.name.endswith("-transformers"):
        use_chosen_experts()
        engine = huggingface.Exported.open(find_model(folder))
    elif "CTranslate2" in folder.name:
        from lsmoe_ds.export.engine import load_engine

        engine = load_engine(folder)
    else:
        engine = load(folder, "cpu")
    loaded, held = time.perf_counter() - begun, resident()
    rates = {}
    with torch.inference_mode():
        for count in decode.BATCHES:
            run = runner(engine, direction, count)
            run()
            begun = time.perf_counter()
            run()
            rates[str(count)] = round(count * decode.TOKENS / (time.perf_counter() - begun), 1)
    files = find_model(folder).weights_in.rglob("*")  # of a run one checkpoint, with the optimizer's state
    size = sum(path.stat().st_size for path in files if path.is_file())
    return {
        "GiB on disk": round(size / 2**30, 3),
        "seconds to load": round(loaded, 2),
        "GiB once loaded": round(held, 3),
        "GiB at most": round(peak_memory(), 3),
        "GiB of the libraries": round(before, 3),
        "tokens per second": rates,
        "peak tokens per second": max(rates.values()),
    }


def medians(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of several measurements, number by number."""
    return {
        key: medians([each[key] for each in found])
        if isinstance(value, dict)
        else round(statistics.median(each[key] for each in found), 3)
        for key, value in found[0].items()
    }


def measure_all(folders: dict[str, Path], direction: Direction, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure the models in turn, each in a process of its own, and return medians."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    order = random.Random(1)
    for _ in range(rounds):
        for name, folder in order.sample(list(folders.items()), len(folders)):
            options = ["--model", str(folder), "--direction", str(direction)]
            seen[name].append(in_processes(__file__, options, 1))
    return {name: medians(found) for name, found in seen.items()}


def forms_of(run: Path, direction: Direction, folder: Path) -> dict[str, Path]:
    """Convert a run into all forms that serve a direction."""
    from lsmoe_ds.convert.command import convert

    if any(not moe.by_task for _, _, moe in find_model(run).recipe.model.moe_layers()):
        convert(run, "hybrid", direction, folder / "hybrid-torch", check=0)
        return {"whole, torch": run, "hybrid, torch": folder / "hybrid-torch"}
    convert(run, "dense", direction, folder / "dense-torch", check=0)
    if installed("transformers"):
        convert(run, "huggingface", direction, folder / "dense-transformers", check=0)
    if installed("ctranslate2"):
        for name, numbers in (("CTranslate2", "float32"), ("CTranslate2 int8", "int8")):
            convert(run, "ctranslate2", direction, folder / f"dense-{name}", check=0, quantization=numbers)
    made = {name: folder / f"dense-{name}" for name in ENGINES}
    return {"whole, torch": run} | {f"dense, {name}": at for name, at in made.items() if at.is_dir()}


def main() -> None:
    parser = argument_parser(__doc__, rounds=3)
    about = "of each sparse layer (default: 32 128)"
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 128], metavar="E", help=about)
    about = "measure these runs instead, whole and as what serves --direction"
    parser.add_argument("--run", type=Path, nargs="+", help=about)
    parser.add_argument(
        "--direction", type=Direction.parse, default=EN_DE, metavar="A-B", help="en-de by default"
    )
    about = "where there is room for all folders; by default the system's temporary folder"
    parser.add_argument("--folder", type=Path, help=about)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    direction, rounds = arguments.direction, arguments.rounds
    if arguments.part is not None:
        made = make_folders(arguments.model, arguments.make) if arguments.make else None
        found = measure(arguments.model, direction) if made is None else made
        arguments.part.write_text(json.dumps(found), encoding="utf-8")
        return
    result: dict[str, Any] = {"rounds": rounds, "output tokens": decode.TOKENS}
    if arguments.run is not None:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            forms = {
                f"{run.name}: {form}": at
                for run in arguments.run
                for form, at in forms_of(run, direction, Path(temporary, run.name)).items()
            }
            result |= {"direction": str(direction), "models": measure_all(forms, direction, rounds)}
        return write(result, arguments.out)
    result["experts"] = {}
    for experts in arguments.experts:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            made = in_processes(__file__, ["--model", temporary, "--make", str(experts)], 1)
            folders = {
                f"{name}, {engine}": Path(temporary, f"{name}-{engine}")
                for name, engines in made.items()
                for engine in engines
            }
            rows = measure_all(folders, EN_DE, rounds)
        whole, small = rows["token, torch"], rows["sub-network, torch"]
        keys = ("peak tokens per second", "GiB on disk", "GiB once loaded", "seconds to load")
        ratios = {key: round(small[key] / whole[key], 3) for key in keys}
        result["experts"][str(experts)] = {"sub-network to token, torch": ratios, "models": rows}
        print(json.dumps(ratios), file=sys.stderr, flush=True)
    write(result, arguments.out)


if __name__ == "__main__":
    run_main(main)

"""Memory and time of converting a large checkpoint, beside copying its bytes.

    python benchmarks/convert.py [--experts 128] [--folder DIR]

A run with random weights in DeepSpeed's files, 128 experts of 8.4M parameters in two layers of the decoder:
2.4 billion parameters, 9.6 GB in float32; then the same routed by token, which becomes an NLLB-MoE. Each
`lsmoe convert` is a process of its own, whose largest resident memory the system tells; mapped pages count.
In the same run: reading and summing the checkpoint (sha256), and copying it with a sync, which is the floor.
Needs 2.5 times the checkpoint's size on the disk of ``--folder``.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, run_main, write

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.vocabulary import train_vocabulary
from lsmoe_ds.folders import describe_files, sha256, sync, write_json
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology

VOCABULARY = 12000
PAIR = ["--direction", "en-de"]


def recipe_of(experts: int, routing: str) -> Recipe:
    moe = {"every": 3, "experts": experts, "routing": routing, "top_k": 2}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {"corpora": ["none"], "languages": ["de", "fr"], "vocabulary": {"size": VOCABULARY}},
            "model": {"preset": "transformer-big", "decoder": {"moe": moe}},
            "training": {"steps": 1},
        }
    )


def make_run(run: Path, recipe: Recipe) -> int:
    """Write a run with random weights and return the number of its parameters."""
    checkpoint = run / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    letters = random.Random(1)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(9000)]
    texts = (" ".join(letters.choices(words, k=12)) for _ in range(6000))
    train_vocabulary(texts, recipe.data.vocabulary, recipe.languages.codes).save(run / "vocabulary.model")
    with torch.device("meta"):
        model = Transformer(recipe, VOCABULARY, Topology.single())
    parts: dict[str, dict[str, Any]] = {}
    experts = [f"decoder.{layer}." for _, layer, _ in recipe.model.moe_layers()]
    names = global_names(model, Topology.single())
    for local, parameter in model.named_parameters():
        found = re.match(r"(.*\d+\.)feed_forward\.experts\.(\d+)\.", names[local])
        file = (
            f"layer_{experts.index(found[1])}_expert_{found[2]}_mp_rank_00_model_states.pt"
            if found
            else "mp_rank_00_model_states.pt"
        )
        parts.setdefault(file, {})[local] = parameter.shape
    count = 0
    for file, shapes in parts.items():
        values = {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}
        count += sum(value.numel() for value in values.values())
        torch.save({"module": values} if file.startswith("mp_rank") else values, checkpoint / file)
    write_json(
        checkpoint / "state.json",
        {"step": 1, "world": 1, "tensor": 1, "expert": 1, "stage": 0, "partition": {}, "position": {}},
    )
    write_json(
        checkpoint / "manifest.json",
        {"files": describe_files(checkpoint, (path.name for path in checkpoint.iterdir()))},
    )
    return count


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call returns in a process of its own: a process inherits the largest memory of the one
    that starts it.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def lsmoe(*arguments: str) -> dict[str, float]:
    """Seconds and largest resident memory of a command."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "lsmoe_ds", *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"lsmoe {' '.join(arguments)} failed")
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "GiB of memory at most": round(used.ru_maxrss / 2**20, 2),
    }


def seconds_of(call: Any) -> dict[str, float]:
    begun = time.perf_counter()
    call()
    return {"seconds": round(time.perf_counter() - begun, 1)}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--experts", type=int, default=128, help="in each of two layers (default: 128)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="where there is room; by default the system's temporary folder",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        run, whole, copied = folder / "run", folder / "whole", folder / "copied"
        parameters = apart(make_run, run, recipe_of(arguments.experts, "task"))
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        print(f"{parameters:,} parameters, {size / 2**30:.1f} GiB", file=sys.stderr)
        result: dict[str, Any] = {"a command that only starts": lsmoe("--version")}

        def copy() -> None:
            shutil.copytree(run, copied)
            sync(copied)

        result["sums of the checkpoint"] = seconds_of(lambda: [sha256(path) for path in run.rglob("*.pt")])
        result["copy and sync"] = seconds_of(copy)
        shutil.rmtree(copied)
        result["to consolidated"] = lsmoe(
            "convert", str(run), "--as", "consolidated", "--out", str(whole), "--check", "0"
        )
        for kind in ("dense", "huggingface", "ctranslate2"):
            out = ["--as", kind, *PAIR, "--check", "0", "--out", str(folder / kind)]
            result[f"to {kind}"] = lsmoe("convert", str(run), *out)
        out = ["--as", "dense", *PAIR, "--check", "0", "--out", str(folder / "dense")]
        result["consolidated to dense"] = lsmoe("convert", str(whole), *out)
        dense = sum(path.stat().st_size for path in (folder / "dense").glob("*.safetensors"))
        shutil.rmtree(run)
        shutil.rmtree(whole)
        apart(make_run, run, recipe_of(arguments.experts, "token"))
        out = ["--as", "huggingface", "--check", "0", "--out", str(folder / "nllb-moe")]
        result["routed by token, to huggingface (NLLB-MoE)"] = lsmoe("convert", str(run), *out)
        setting = {
            "parameters": parameters,
            "GiB": round(size / 2**30, 2),
            "GiB of the dense model": round(dense / 2**30, 2),
        }
    write({"setting": setting, "results": result}, arguments.out)


if __name__ == "__main__":
    run_main(main)

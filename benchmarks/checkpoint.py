"""How long training stands still for a checkpoint, and how long until it is whole, beside what the disk
allows.

    python benchmarks/checkpoint.py [--rounds 5] [--folder DIR]

transformer-base with 12 experts in every second layer, one process, float32 with AdamW's moments. In each
round take turns, all on the disk of ``--folder``: our save (it pauses training until the state is written
out; sums, syncing and renaming go on beside it), torch.save of weights and optimizer in one file without
syncing, and the floor: as many bytes written and synced.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import argument_parser, ragged_batches, run_main, write

from lsmoe_ds.checkpoint.saving import Saver
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Step
from lsmoe_ds.languages import PAD
from lsmoe_ds.launch import joining
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import build_engine, train_step

VOCABULARY = 32000
MOE = {"every": 2, "experts": 12, "routing": "task", "top_k": 2}
RECIPE = {
    "name": "benchmark",
    "data": {
        "corpora": ["none"],
        "languages": ["de", "fr"],
        "vocabulary": {"size": VOCABULARY},
        "batch": {"count": 1},
    },
    "model": {"preset": "transformer-base", "encoder": {"moe": MOE}, "decoder": {"moe": MOE}},
    "training": {"steps": 1000, "learning_rate": 1e-4, "warmup": 100},
}
BLOCK = 1 << 24


def timed(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def write_and_sync(path: Path, size: int) -> None:
    block = random.Random(1).randbytes(BLOCK)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    joining.join()
    topology, recipe = Topology.build(device=joining.device()), Recipe.model_validate(RECIPE)
    compat.seed_tensor_parallel_random(1, 0)
    engine = build_engine(recipe, VOCABULARY, topology)
    batches = ragged_batches(recipe.languages, VOCABULARY, 256, 1, 10.0)
    step = Step(batches, batches[0].target_tokens, int((batches[0].source != PAD).sum()), 0, [])
    train_step(engine, step, 1, recipe, topology)  # from here on the optimizer has moments
    seconds: dict[str, list[float]] = {
        name: [] for name in ("pause", "until whole", "torch.save", "write and fsync")
    }
    one = folder / "one"

    def save() -> None:
        with Saver(folder, topology, keep=1) as saver:
            begun = time.perf_counter()
            saver.save(engine, 1, {})
            seconds["pause"].append(time.perf_counter() - begun)
            saver.finish()
            seconds["until whole"].append(time.perf_counter() - begun)

    def torch_save() -> None:
        state = {"module": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}
        seconds["torch.save"].append(timed(lambda: torch.save(state, one)))

    def floor() -> None:
        seconds["write and fsync"].append(timed(lambda: write_and_sync(one, size)))

    save()
    size = sum(path.stat().st_size for path in (folder / "checkpoints" / "step-1").iterdir())
    for times in seconds.values():
        times.clear()
    order = random.Random(1)
    for _ in range(rounds):
        for contestant in order.sample([save, torch_save, floor], 3):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            one.unlink(missing_ok=True)
            os.sync()  # nobody pays for what another has left in memory
            contestant()
    return {
        "rounds": rounds,
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
        "bytes": size,
        "seconds": {name: round(median(times), 2) for name, times in seconds.items()},
        "of each round": {name: [round(each, 2) for each in times] for name, times in seconds.items()},
    }


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to measure")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(arguments.rounds, Path(folder))
    print(result)
    write(result, arguments.out)


if __name__ == "__main__":
    run_main(main)

"""Tokens per second of training: plain torch, our loop on a dense model of the same size, and on a sparse one.

    python benchmarks/train.py [--size demo|base] [--rounds 9]

One process: plain torch (torch.nn.Transformer, fused AdamW, no engine) and ours take turns in the same process on the
same batches. Then ours on two processes through the deepspeed launcher, each with batches of its own, ZeRO stage 1, and
expert parallelism 2 for the sparse model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, ragged_batches, write
from torch import nn

from lsmoe_ds.config import Recipe
from lsmoe_ds.data.batching import Batch, Step
from lsmoe_ds.languages import PAD
from lsmoe_ds.model.embedding import FIRST_POSITION, sinusoids
from lsmoe_ds.parallel import compat, launch
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import BETAS, EPSILON, build_engine, train_step

SIZES: dict[str, dict[str, Any]] = {
    "demo": {"preset": "transformer-tiny", "vocabulary": 8000, "tokens": 512, "length": 9.0, "experts": 8, "every": 2},
    "base": {"preset": "transformer-base", "vocabulary": 32000, "tokens": 3440, "length": 25.0, "experts": 16, "every": 2},
}
LANGUAGES = ["de", "nl", "fr", "es", "it", "ru", "uk"]


def recipe_of(size: str, sparse: bool, expert: int = 1, count: int = 1) -> Recipe:
    settings = SIZES[size]
    moe = {"moe": {"every": settings["every"], "experts": settings["experts"], "routing": "task", "top_k": 2}} if sparse else {}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {
                "corpora": ["none"],
                "languages": LANGUAGES,
                "vocabulary": {"size": settings["vocabulary"]},
                "batch": {"tokens": settings["tokens"], "count": count},
            },
            "model": {"preset": settings["preset"], "encoder": moe, "decoder": moe},
            "training": {"steps": 1000, "learning_rate": 1e-4, "warmup": 100, "dropout": 0.1},
            "parallel": {"expert": expert},
        }
    )


class PlainTransformer(nn.Module):
    """The same model from torch's own parts: pre-norm, final norms, tied scaled embeddings, sinusoidal positions."""

    def __init__(self, recipe: Recipe, vocabulary: int) -> None:
        super().__init__()
        model = recipe.model
        self.embedding = nn.Embedding(vocabulary, model.hidden)
        nn.init.normal_(self.embedding.weight, std=model.hidden**-0.5)
        self.register_buffer("positions", sinusoids(FIRST_POSITION, 256, model.hidden), persistent=False)
        self.transformer = nn.Transformer(
            model.hidden,
            model.heads,
            model.encoder.layers,
            model.decoder.layers,
            model.encoder.width(0),
            recipe.training.dropout,
            norm_first=True,
            batch_first=True,
        )
        # Ours has dropout on sublayer outputs only, as in M2M-100's defaults.
        for module in self.transformer.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout = nn.Identity()
        self.dropout = recipe.training.dropout

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) * self.embedding.embedding_dim**0.5 + self.positions[: ids.shape[1]]
        return F.dropout(x, self.dropout, self.training)

    def forward(self, batch: Batch) -> torch.Tensor:
        length = batch.decoder_input.shape[1]
        padding = batch.source == PAD
        hidden = self.transformer(
            self.embed(batch.source),
            self.embed(batch.decoder_input),
            tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(1),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        real = batch.labels != PAD
        return F.cross_entropy(F.linear(hidden[real], self.embedding.weight), batch.labels[real], label_smoothing=0.1)


def plain_contestant(recipe: Recipe, vocabulary: int, batches: list[Batch]) -> Callable[[], None]:
    model = PlainTransformer(recipe, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True)

    def run() -> None:
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            model(batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.training.clip)
            optimizer.step()

    return run


def our_contestant(recipe: Recipe, vocabulary: int, batches: list[Batch], topology: Topology) -> tuple[Callable[[], None], int]:
    engine = build_engine(recipe, vocabulary, topology)
    steps = [Step([b], b.target_tokens * topology.data, int((b.source != PAD).sum()) * topology.data, 0, []) for b in batches]

    def run() -> None:
        for step in steps:
            train_step(engine, step, 100, recipe, topology)

    return run, sum(p.numel() for p in engine.module.parameters())


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Figures of this process (or, with several, of all together)."""
    settings = SIZES[size]
    launch.join()
    world = torch.distributed.get_world_size()
    topology = Topology.build(expert=world, device=launch.device())
    compat.seed_tensor_parallel_random(1, 0)
    count = 24 if size == "demo" else 3
    dense, sparse = (recipe_of(size, moe, world if moe else 1, world) for moe in (False, True))
    batches = ragged_batches(dense.languages, settings["vocabulary"], settings["tokens"], count, settings["length"], topology.rank + 1)
    contestants: dict[str, Callable[[], None]] = {}
    if world == 1:
        contestants["plain torch, dense"] = plain_contestant(dense, settings["vocabulary"], batches)
    contestants["ours, dense"], _ = our_contestant(dense, settings["vocabulary"], batches, topology)
    contestants["ours, sparse"], parameters = our_contestant(sparse, settings["vocabulary"], batches, topology)
    for run in contestants.values():
        run()
    seconds = alternate(contestants, rounds)
    tokens = torch.tensor(float(sum(int((b.source != PAD).sum()) + b.target_tokens for b in batches)))
    torch.distributed.all_reduce(tokens)
    return {
        "processes": world,
        "threads": torch.get_num_threads(),
        "real tokens": int(tokens),
        "tokens per second": {name: round(float(tokens) / value, 1) for name, value in seconds.items()},
        "parameters of the sparse model on a rank": parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--size", choices=list(SIZES), default="demo")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        result = measure(arguments.size, arguments.rounds)
        if os.environ["RANK"] == "0":
            arguments.part.write_text(json.dumps(result))
        return
    parts = []
    cores = len(os.sched_getaffinity(0))
    for world in (1, 2):
        part = Path(tempfile.gettempdir(), f"lsmoe-benchmark-{os.getpid()}-{world}.json")
        command = [sys.executable, __file__, "--size", arguments.size, "--rounds", str(arguments.rounds), "--part", str(part)]
        environment = {**os.environ, **launch.KEEP_LARGE_BLOCKS, "OMP_NUM_THREADS": str(max(1, cores // world))}
        if world > 1:
            command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(world), "--no_local_rank"]
            command += ["--log_level", "error", "--master_port", str(launch.free_port())]
            command += [__file__, "--size", arguments.size, "--rounds", str(arguments.rounds), "--part", str(part)]
            environment |= {"DS_ACCELERATOR": "cpu"} if not torch.cuda.is_available() else {}
        begun = time.perf_counter()
        subprocess.run(command, env=environment, check=True)
        parts.append(json.loads(part.read_text()))
        part.unlink()
        print(f"{world} processes: {time.perf_counter() - begun:.0f} s: {parts[-1]['tokens per second']}")
    rates = parts[0]["tokens per second"]
    ratio = {name: round(value / rates["plain torch, dense"], 3) for name, value in rates.items()}
    write(f"train_{arguments.size}", {"size": arguments.size, "ratio to plain torch": ratio, "runs": parts})


if __name__ == "__main__":
    main()

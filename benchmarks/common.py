"""What every benchmark shares: ragged random batches, alternating medians, and results with machine and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lsmoe_ds.data.batching import Batch, DirectionIds, collate
from lsmoe_ds.languages import Languages

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "megatron-core")},
    }


def write(name: str, result: dict[str, Any]) -> None:
    """Stores ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def alternate(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant; they take turns, so that a busy moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


class _Tags:
    def tag_id(self, code: str) -> int:
        return 4


def ragged_batches(languages: Languages, vocabulary: int, tokens: int, count: int, mean_length: float, seed: int = 1) -> list[Batch]:
    """``count`` batches of about ``tokens`` real tokens, of like lengths as length buckets give, of all directions."""
    generator = torch.Generator().manual_seed(seed)
    ids = DirectionIds.of(languages, _Tags())
    batches = []
    for _ in range(count):
        length = max(2.0, mean_length * float(torch.rand(1, generator=generator) + 0.5))
        sentences = max(1, int(tokens / (2 * length + 3)))
        sizes = (length * (0.9 + 0.2 * torch.rand(2, sentences, generator=generator))).round().int().clamp(min=1)
        texts = [[torch.randint(8, vocabulary, (int(n),), generator=generator).tolist() for n in row] for row in sizes]
        directions = torch.randint(0, len(languages.directions), (sentences,), generator=generator).tolist()
        batches.append(collate(texts[0], texts[1], directions, ids))
    return batches

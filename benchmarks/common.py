"""What every benchmark shares: ragged random batches, alternating medians, and results with machine and
versions.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lsmoe_ds import interrupt
from lsmoe_ds.console import run_command
from lsmoe_ds.data.batches import DirectionIds, PairBatch
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.folders import write_whole
from lsmoe_ds.launch import joining
from lsmoe_ds.launch.memory import keep_large_blocks


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")),
            platform.processor(),
        )
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "megatron-core")},
    }


def argument_parser(about: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark, and with ``--rounds`` where a default is given;
    ``about`` is the script's docstring. The process, ours or a peer's, keeps large blocks of memory from now
    on, as trainings do.
    """
    keep_large_blocks()
    parser = argparse.ArgumentParser(description=(about or "").split("\n\n")[0])
    about_out = "write the result, with machine and versions, as JSON; by default it is printed"
    parser.add_argument("--out", type=_writable, metavar="FILE", help=about_out)
    if rounds is not None:
        about_rounds = "how often each is measured, of which the median counts (default: %(default)s)"
        parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help=about_rounds)
    return parser


def _writable(text: str) -> Path:
    """Return the path of a file that can be written: found out now, not after an hour of measuring."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark as ``lsmoe`` runs a verb: a user's error is one sentence and status 2.

    A signal that asks to stop raises Interrupted, so that temporary folders are removed; `lsmoe bench` says
    that it was stopped. A process of the benchmark that fails has said why.
    """

    def run() -> None:
        try:
            main()
        except subprocess.CalledProcessError as error:
            sys.exit(max(error.returncode, 1))
        except interrupt.Interrupted as asked:
            sys.exit(interrupt.status_of(asked.number))

    run_command(run)


def write(result: dict[str, Any], out: Path | None) -> None:
    """Write a result with the machine and versions to ``out``, or print it."""
    text = json.dumps({"machine": machine(), **result}, indent=1) + "\n"
    if out is None:
        print(text, end="")
        return
    write_whole(out, text)
    print(f"written to {out}")


def in_processes(script: str, options: list[str], world: int) -> dict[str, Any]:
    """Run a benchmark's part on ``world`` processes that share the cores and return its result.

    More than one process is started through the deepspeed launcher. ``--part FILE`` tells the script where
    its main rank writes its result, as JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part.json")
        command = [sys.executable]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // world)),
        }
        if world > 1:
            command = [
                str(Path(sys.executable).with_name("deepspeed")),
                "--num_accelerators",
                str(world),
                "--no_local_rank",
            ]
            command += ["--log_level", "error", "--master_port", str(joining.free_port())]
            environment |= {"DS_ACCELERATOR": "cpu"} if not torch.cuda.is_available() else {}
        begun = time.perf_counter()
        subprocess.run([*command, script, *options, "--part", str(part)], env=environment, check=True)
        result: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    print(
        f"{' '.join(options)}, {world} process{'es' if world > 1 else ''}: "
        f"{time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    return result


def peak_memory() -> float:
    """GiB that this process has held at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 2**20


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each contestant by ``clock``; they take turns, so that a busy moment of the machine
    hits all alike, and in another order each round, so that none always follows the same other one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = random.Random(1)  # the same on every rank
    for _ in range(rounds):
        for name, run in order.sample(list(contestants.items()), len(contestants)):
            begun = clock()
            run()
            seconds[name].append(clock() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Tags:
    def tag_id(self, code: str) -> int:
        return 4


def ragged_batches(
    languages: Languages, vocabulary: int, tokens: int, count: int, mean_length: float, seed: int = 1
) -> list[PairBatch]:
    """``count`` batches of about ``tokens`` real tokens, of like lengths as length buckets give, of all
    directions, by language.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = DirectionIds.of(languages, Tags())
    batches = []
    for _ in range(count):
        length = max(2.0, mean_length * float(torch.rand(1, generator=generator) + 0.5))
        sentences = max(1, int(tokens / (2 * length + 3)))
        sizes = (
            (length * (0.9 + 0.2 * torch.rand(2, sentences, generator=generator))).round().int().clamp(min=1)
        )
        texts = [
            [torch.randint(8, vocabulary, (int(n),), generator=generator).tolist() for n in row]
            for row in sizes
        ]
        directions = torch.randint(0, len(languages.directions), (sentences,), generator=generator).tolist()
        directions.sort(
            key=lambda number: (languages.directions[number].source, languages.directions[number].target)
        )
        batches.append(ids.collate(texts[0], texts[1], directions))
    return batches


class Sentences:
    """Random tokens; lengths as ragged as those of text."""

    def __init__(self, lengths: NDArray[Any], vocabulary: int, seed: int) -> None:
        self.lengths = lengths
        self.text = np.random.default_rng(seed).integers(
            100, vocabulary, int(lengths.max()) + 1000, dtype=np.uint16
        )

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.text[index % 1000 :][: self.lengths[index]]


class Pairs:
    def __init__(self, count: int, log_length: float, vocabulary: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        source = random.lognormal(log_length, 0.6, count).clip(2, 200)
        target = (source * random.lognormal(0.0, 0.2, count)).clip(2, 200)
        self.source, self.target = (
            Sentences(lengths.astype(np.int32), vocabulary, each)
            for each, lengths in ((seed, source), (seed + 1, target))
        )


class Corpus:
    """Stand for prepared data and its vocabulary: ``pairs`` made-up pairs of each direction, whose lengths
    have the median exp(``log_length``).
    """

    def __init__(self, codes: list[str], vocabulary: int, pairs: int, log_length: float) -> None:
        self.codes, self.vocabulary, self.pairs, self.log_length = codes, vocabulary, pairs, log_length

    def tokens(self, direction: Direction, split: str) -> Pairs:
        return Pairs(self.pairs, self.log_length, self.vocabulary, sum(map(ord, str(direction))))

    def tag_id(self, code: str) -> int:
        return 4 + self.codes.index(code)


UNITS = ("nothing", "feed-forwards", "layers")


def compile_model(model: Any, unit: str, backend: str = "inductor") -> None:
    """Compile these units of a dense model for dynamic shapes; the names of its parameters stay."""
    for layer in (*model.encoder, *model.decoder):
        chosen = {"nothing": (), "feed-forwards": (layer.feed_forward,), "layers": (layer,)}[unit]
        for module in chosen:
            module.forward = torch.compile(module.forward, dynamic=True, backend=backend)

"""Preparing generated pairs of any number: rate by number of workers, peak memory, and bytes on disk.

    python benchmarks/prepare.py --at FOLDER [--pairs 1000000 10000000 100000000] [--workers 2] [--out FILE]

Made-up pairs of short sentences are written in tables of a million pairs each, and prepared by
`lsmoe data prepare` in processes of its own, while their memory, processor time and disk are looked at. Both
the text and what is prepared stay in FOLDER: if the script is stopped, the same command resumes, and the time
of earlier tries counts. With ``--out`` the runs are added to those that the file has, which are not
measured again. Runs on the same pairs must give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from common import argument_parser, run_main, write

PART, COPIES = 1_000_000, 20_000  # pairs of a table, and how many of them are those of the first one
WORDS, SHORTEST, LONGEST = 20_000, 3, 8
POLL, ROUND = 0.5, 20  # seconds between two looks, and looks between two notes


def words_of(seed: int) -> list[str]:
    """Return the made-up words of a language: word n of one translates as word n of the other."""
    chance = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzéä"))
    return ["".join(chance.choice(letters, size)) for size in chance.integers(2, 9, WORDS)]


def sentences(number: int) -> Iterator[list[int]]:
    """Yield the sentences of table ``number``, each as the numbers of its words."""
    chance = np.random.default_rng([7, number])
    lengths = chance.integers(SHORTEST, LONGEST + 1, PART)
    drawn, start = (chance.random(int(lengths.sum())) ** 2 * WORDS).astype(int).tolist(), 0
    for end in np.cumsum(lengths).tolist():
        yield drawn[start:end]
        start = end


def write_part(path: Path, number: int) -> None:
    """Write table ``number`` of the text, the same whenever it is written; it begins with copies of the
    first table.
    """
    english, german, new = words_of(1), words_of(2), path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        file.write("en\tde\n")
        for own in chain(islice(sentences(0), COPIES), islice(sentences(number), COPIES, None)):
            file.write(f"{' '.join([english[n] for n in own])}\t{' '.join([german[n] for n in own])}\n")
    new.rename(path)


def write_recipe(folder: Path, pairs: int, name: str) -> Path:
    """Write the text and a recipe for it."""
    parts = [folder / "text" / f"{number:05d}.tsv" for number in range(-(-pairs // PART))]
    parts[0].parent.mkdir(exist_ok=True)
    for number, path in enumerate(parts):
        if not path.exists():
            write_part(path, number)
    recipe = {
        "name": name,
        "data": {
            "corpora": [{"path": str(path), "format": "tsv"} for path in parts],
            "directory": str(folder),
            "languages": ["de"],
            "vocabulary": {"size": 8000, "sentences": 200_000},
        },
        "model": {"preset": "transformer-tiny"},
        "training": {"steps": 1},
        "deepspeed": {},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


class Watch:
    """What a command and its processes have taken, kept in a file over several tries."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.taken: dict[str, Any] = {"seconds": 0.0, "processor seconds": 0.0, "tries": 0}
        if state.exists():
            self.taken = json.loads(state.read_text(encoding="utf-8"))
        self.taken["tries"] += 1
        self.before = dict(self.taken)

    def most(self, what: str, value: int) -> None:
        self.taken[what] = max(value, self.taken.get(what, 0))

    def follow(self, process: subprocess.Popen[str], folders: list[Path]) -> None:
        """Look at the processes until they end, and at what the folders hold."""
        begun, used, looks = time.perf_counter(), dict[int, float](), 0
        leader = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [leader, *leader.children(recursive=True)]:
                    times = each.cpu_times()
                    used[each.pid] = times.user + times.system
                    status = Path(f"/proc/{each.pid}/status").read_text(encoding="utf-8")
                    which = "leader" if each.pid == process.pid else "worker"
                    for line in status.splitlines():
                        if line.startswith("VmHWM"):  # which a process that has ended lacks
                            self.most(f"peak MiB of the {which}", int(line.split()[1]) // 1024)
            if looks % ROUND == 0:
                self.most("bytes while preparing", sum(map(size_of, folders)))
                self.note(time.perf_counter() - begun, sum(used.values()))
            looks += 1
            time.sleep(POLL)
        self.note(time.perf_counter() - begun, sum(used.values()))

    def note(self, seconds: float, used: float) -> None:
        self.taken["seconds"] = round(self.before["seconds"] + seconds, 1)
        self.taken["processor seconds"] = round(self.before["processor seconds"] + used, 1)
        self.state.write_text(json.dumps(self.taken), encoding="utf-8")


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, some of which may be going."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def measure(folder: Path, pairs: int, workers: int) -> dict[str, Any]:
    """Prepare so many pairs with so many workers."""
    name = f"{pairs}-{workers}"
    recipe, prepared = write_recipe(folder, pairs, name), folder / "prepared"
    watch = Watch(folder / f"{name}.json")
    command = [sys.executable, "-m", "lsmoe_ds", "data", "prepare", str(recipe), "--workers", str(workers)]
    with subprocess.Popen(command, text=True) as process:
        watch.follow(process, [prepared / f".{name}.work", prepared / f".{name}.partial"])
    if process.returncode:
        sys.exit(process.returncode)
    manifest = json.loads((prepared / name / "manifest.json").read_text(encoding="utf-8"))
    taken, read = watch.taken, sum(counts["read"] for counts in manifest["cleaning"].values())
    text = sum((folder / "text" / f"{number:05d}.tsv").stat().st_size for number in range(-(-pairs // PART)))
    while_preparing = taken.pop("bytes while preparing")
    return {
        "pairs": read,
        "workers": workers,
        **taken,
        "pairs per second": round(read / taken["seconds"]),
        "pairs per processor second": round(read / taken["processor seconds"]),
        "training pairs": manifest["bitexts"]["de-en"]["train"]["pairs"],
        "cleaning": manifest["cleaning"]["de-en"],
        "bytes per pair": {
            "text": round(text / read, 1),
            "while preparing": round(while_preparing / read, 1),
            "prepared": round(size_of(prepared / name) / read, 1),
        },
        "sha256": {path: stamp["sha256"] for path, stamp in manifest["files"].items() if "train" in path},
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--at", type=Path, required=True, metavar="FOLDER", help="where text and data lie")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000], help="multiples of a million")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="numbers of worker processes")
    arguments = parser.parse_args()
    arguments.at.mkdir(exist_ok=True)
    known: list[dict[str, Any]] = []
    if arguments.out is not None and arguments.out.exists():
        known = json.loads(arguments.out.read_text(encoding="utf-8"))["runs"]
    for pairs in arguments.pairs:
        for workers in arguments.workers:
            if any((each["pairs"], each["workers"]) == (pairs, workers) for each in known):
                continue
            run = measure(arguments.at.resolve(), pairs, workers)
            print({name: value for name, value in run.items() if name != "sha256"}, flush=True)
            others = [each for each in known if each["pairs"] == run["pairs"]]
            if any(each["sha256"] != run["sha256"] for each in others):
                sys.exit(f"{pairs} pairs are prepared otherwise by {workers} workers than before")
            known = sorted([*known, run], key=lambda each: (each["pairs"], each["workers"]))
            if arguments.out is not None:
                write({"runs": known}, arguments.out)


if __name__ == "__main__":
    run_main(main)

"""Preparing 204 directions: what it costs to keep both sides of every held-out sentence out of all training
text.

    python benchmarks/held_out.py [--pairs 1500000] [--before DIR]

102 English-centric bitexts of made-up text share a pool of English sentences, some of them generic ones
("Yes.") whose translations are the same for many. The text is prepared as `lsmoe data prepare` does it, in a
process of its own: seconds by the clock and of processor time, the part of cleaning and of holding out, and
the peak memory of the main process. Counted afterwards: the training pairs of which a side is, to the letter,
a dev or test sentence of any bitext. ``--before`` measures another checkout too.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

LANGUAGES, POOL, GENERIC, WORDS = 102, 60_000, 300, 20_000
HERE = Path(__file__).resolve()


def words_of(code: str) -> list[str]:
    """Return the made-up words of a language: word n of any language translates as word n of any other."""
    chance = random.Random(code)
    letters = chance.sample("abcdefghijklmnopqrstuvwxyz", 14)
    return ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(WORDS)]


def write_corpus(folder: Path, pairs: int) -> list[str]:
    """Write one table for each bitext and return the codes of the languages."""
    from lsmoe_ds.languages import table

    codes = [code for code in sorted(table()) if code != "en" and "_" not in code][:LANGUAGES]
    chance = random.Random(1)
    ranks = [1 / (rank + 10) for rank in range(WORDS)]
    lengths = [max(3, min(60, round(chance.lognormvariate(2.4, 0.6)))) for _ in range(POOL)]
    pool = [chance.choices(range(WORDS), ranks, k=length) for length in lengths]
    english = words_of("en")
    for code in codes:
        own, draw = words_of(code), random.Random(f"text {code}")
        with (folder / f"{code}.tsv").open("w", encoding="utf-8") as file:
            file.write(f"en\t{code}\n")
            for _ in range(pairs // LANGUAGES):
                number = draw.randrange(POOL)
                sentence = pool[number]
                # A generic sentence has one of few translations, whatever it says.
                translated = pool[number % 40] if number < GENERIC else sentence
                file.write(
                    f"{' '.join(english[w] for w in sentence)}\t{' '.join(own[w] for w in translated)}\n"
                )
    return codes


def count_leaks(data: Any) -> int:
    """Training pairs of which a side is, to the letter, a held-out sentence of any bitext."""
    from lsmoe_ds.directions import Direction

    held: set[bytes] = set()
    for number, split in enumerate(("dev", "test", "train")):
        leaks = 0
        for name in data.manifest["bitexts"]:
            tokens = data.tokens(Direction(*name.split("-")), split)
            for pair in zip(*(_sentences(store) for store in (tokens.source, tokens.target)), strict=True):
                if number < 2:
                    held.update(pair)
                leaks += pair[0] in held or pair[1] in held
    return leaks


def _sentences(store: Any) -> list[bytes]:
    ids, offsets = store.ids[:], store.offsets[:].tolist()
    return [ids[start:end].tobytes() for start, end in pairwise(offsets)]


def measure(folder: Path) -> dict[str, Any]:
    """Prepare the text in the folder, in this process, and return what was measured."""
    from lsmoe_ds.config.recipe import Recipe
    from lsmoe_ds.data import prepare as module

    codes = json.loads((folder / "codes.json").read_text(encoding="utf-8"))
    recipe = Recipe.model_validate(
        {
            "name": "held-out",
            "data": {
                "corpora": [{"path": folder / f"{code}.tsv", "format": "tsv"} for code in codes],
                "directory": folder / "data",
                "languages": codes,
                "vocabulary": {"size": 8000, "sentences": 100_000},
                "cleaning": {"script_share": 0.0},  # all text is in Latin letters
            },
            "model": {"preset": "transformer-tiny"},
            "training": {"steps": 1},
            "deepspeed": {},
        }
    )
    preparation = getattr(module, "Preparation", None) or getattr(module, "_Preparation")  # noqa: B009, as it was called before
    parts = {"cleaning": "_clean", "holding out": "_hold_out"}
    seconds = dict.fromkeys(parts, 0.0)

    def timed(part: str, original: Any) -> Any:
        def call(self: Any) -> None:
            begun = time.perf_counter()
            original(self)
            seconds[part] = time.perf_counter() - begun

        return call

    for part, method in parts.items():
        setattr(preparation, method, timed(part, getattr(preparation, method)))
    begun = time.perf_counter()
    data = module.prepare(recipe, force=True)
    wall = time.perf_counter() - begun
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    trained = sum(splits["train"]["pairs"] for splits in data.manifest["bitexts"].values())
    return {
        "seconds": round(wall, 1),
        "processor seconds": round(sum(each.ru_utime + each.ru_stime for each in used), 1),
        **{f"seconds of {part}": round(value, 1) for part, value in seconds.items()},
        "peak MiB": round(used[0].ru_maxrss / 1024),
        "training pairs": trained,
        "dropped as held out": sum(
            counts.get("held out", 0) for counts in data.manifest["cleaning"].values()
        ),
        "held-out sentences in training text": count_leaks(data),
    }


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
        return
    from common import argument_parser, write  # not in a part, which may be of another checkout

    parser = argument_parser(__doc__)
    parser.add_argument(
        "--pairs", type=int, default=1_500_000, help="of all bitexts together (default: 1500000)"
    )
    parser.add_argument("--before", type=Path, metavar="DIR", help="measure another checkout, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "codes.json").write_text(
            json.dumps(write_corpus(folder, arguments.pairs)), encoding="utf-8"
        )
        result: dict[str, Any] = {"bitexts": LANGUAGES, "pairs": arguments.pairs // LANGUAGES * LANGUAGES}
        checkouts = {"before": arguments.before, "now": HERE.parent.parent}
        for which, checkout in checkouts.items():
            if checkout is not None:
                environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
                command = [sys.executable, str(HERE), "--part", name]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                result[which] = json.loads(done.stdout.splitlines()[-1])
                print(which, result[which])
    write(result, arguments.out)


if __name__ == "__main__":
    main()

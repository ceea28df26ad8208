"""What a vocabulary map gains in decoding speed and loses in translation quality.

    python benchmarks/vocabulary_map.py MODEL [--direction en-de] [--candidates 10 30 100] [--rounds 5]

MODEL is a run or a converted folder beside which its prepared data are, as training leaves them. One
direction is converted to CTranslate2 in float32: without a map, and with maps of different sizes. All
translate the first 100 held-out sentences with beam 5, one by one and in batches of 16, and take turns.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import alternate, argument_parser, run_main, write
from sacrebleu.metrics import CHRF

from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepared import open_data
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import Engine

SENTENCES, BATCHES = 100, (1, 16)


def translate(engine: Engine, sources: list[list[int]], direction: Direction, batch: int) -> list[list[int]]:
    """Translate batches of so many sentences of like length."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), batch):
        which = order[start : start + batch]
        results = engine.search([sources[i] for i in which], direction, Search())
        found |= {i: best.tokens for i, (best,) in zip(which, results, strict=True)}
    return [found[i] for i in range(len(sources))]


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run or a converted folder")
    parser.add_argument("--direction", default="en-de", metavar="FROM-TO", help="(default: %(default)s)")
    about = "of each source piece, for a map each (default: 10 30 100)"
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 30, 100], metavar="N", help=about)
    arguments = parser.parse_args()
    stored, direction = find_model(arguments.model), Direction.parse(arguments.direction)
    lines, references = (side[:SENTENCES] for side in open_data(stored).text(direction, "test"))
    rows: dict[str, dict[str, Any]] = {}
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (None, *arguments.candidates):
            name = "without a map" if count is None else f"{count} candidates of a piece"
            out = Path(folder, str(count))
            record = convert(arguments.model, "ctranslate2", direction, out, 0, vocabulary_map=count)
            rows[name], engines[name] = dict(record.get("vocabulary_map", {})), load_engine(out)
    (vocabulary,) = {engine.vocabulary.size for engine in engines.values()}
    first = next(iter(engines.values()))
    sources = [first.vocabulary.encode(line) for line in lines]
    wanted: list[str] = []
    for name, engine in engines.items():
        found = [engine.vocabulary.decode(each) for each in translate(engine, sources, direction, 1)]
        wanted = wanted or found
        rows[name].pop("mapped", None)
        rows[name]["chrF++"] = round(CHRF(word_order=2).corpus_score(found, [references]).score, 2)
        rows[name]["same translations"] = sum(a == b for a, b in zip(found, wanted, strict=True))
    for batch in BATCHES:
        each = {
            name: partial(translate, engine, sources, direction, batch) for name, engine in engines.items()
        }
        seconds = alternate(each, arguments.rounds)
        for name, taken in seconds.items():
            rows[name][f"sentences a second, batch {batch}"] = round(len(sources) / taken, 1)
            rows[name][f"times as fast, batch {batch}"] = round(seconds["without a map"] / taken, 2)
    of = {"model": stored.recipe.name, "direction": str(direction), "pieces": vocabulary}
    write({**of, "sentences": len(sources), "rows": rows}, arguments.out)


if __name__ == "__main__":
    run_main(main)

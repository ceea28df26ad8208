"""Whether a trained model and all that `lsmoe convert` makes of it compute the same, for every method and
routing.

    python benchmarks/exports.py [--steps 2500] [--run NAME=RUN ...] [--only NAME ...] [--work build/exports]

Trains a small model of each kind on recipes/prose-8.yaml, in --work (about 40 minutes on two cores; --run
takes a run that is there already instead). By each one 100 held-out sentences en-de and 100 de-en are
translated with beam 5: by the model itself and by its dense, Hugging Face and CTranslate2 form. Counted are
equal translations, beside those that the model itself, computed in float64, leaves equal: what float32's
rounding alone changes. In a direction where not all of Hugging Face's are equal, it and the model are
compared in float64 too.

Each finished row goes into the file of --out at once. Rows that it has are kept; those that --only names are
measured again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from common import argument_parser, run_main, write
from sacrebleu.metrics import CHRF

from lsmoe_ds.checkpoint.run_folder import newest_whole, step_of
from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.export.subnetwork import check_convertible
from lsmoe_ds.folders import write_whole
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import Engine
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import translate_all
from lsmoe_ds.model.attention import Attention
from lsmoe_ds.report.progress import read_progress
from lsmoe_ds.shipped import ROOT as PROJECT

BASE = PROJECT / "recipes" / "prose-8.yaml"
DIRECTIONS = [Direction("en", "de"), Direction("de", "en")]
SENTENCES = 100  # of each direction


def moe(
    routing: str,
    top_k: int,
    sides: tuple[str, ...] = ("encoder", "decoder"),
    task: str = "target",
    **more: Any,
) -> dict[str, Any]:
    settings = {
        "experts": 8,
        "every": 2,
        "top_k": top_k,
        "routing": routing,
        **({"task": task} if routing in ("task", "static") else {}),
    }
    return {side: {"moe": {**settings, **more}} for side in sides}


def of_languages(task: str) -> dict[str, Any]:
    """Return ``moe`` settings: in every layer a feed-forward for each language and one that all share."""
    return {
        "experts": 9,
        "every": 1,
        "top_k": 1,
        "routing": "static",
        "task": task,
        "fuse_distillation": True,
    }


DECODER = ("decoder",)
MODELS: dict[
    str, tuple[str, dict[str, Any], tuple[str, ...]]
] = {  # name: title, what differs from a dense model, routes
    "dense": ("dense", {}, ("specific",)),
    "target-2": ("task by target, top-2, both sides", moe("task", 2), ("specific",)),
    "target-1-decoder": ("task by target, top-1, decoder", moe("task", 1, DECODER), ("specific",)),
    "source-1": ("task by source, top-1, both sides", moe("task", 1, task="source"), ("specific",)),
    "source-2-decoder": (
        "task by source, top-2, decoder",
        moe("task", 2, DECODER, "source"),
        ("specific",),
    ),
    "pair-2": ("task by pair, top-2, both sides", moe("task", 2, task="pair"), ("specific",)),
    "pair-1-decoder": ("task by pair, top-1, decoder", moe("task", 1, DECODER, "pair"), ("specific",)),
    "static-1": ("static, top-1, both sides", moe("static", 1), ("specific",)),
    "static-2-decoder": (
        "static by pair, top-2, decoder",
        moe("static", 2, DECODER, "pair"),
        ("specific",),
    ),
    "lms-pair": ("LMS, pair-wise", {"low_rank": {"rank": 32, "index": "pair"}}, ("specific",)),
    "lms-lang": ("LMS, language-wise", {"low_rank": {"rank": 32, "index": "language"}}, ("specific",)),
    "lms-fd": (
        "LMS+FD",
        {"low_rank": {"rank": 32, "index": "pair", "fuse_distillation": True}},
        ("specific", "shared"),
    ),
    "fd": (
        "FD, a feed-forward a language",
        {"encoder": {"moe": of_languages("source")}, "decoder": {"moe": of_languages("target")}},
        ("specific", "shared"),
    ),
    "lms-task": (
        "LMS in all attention + task by target, top-2",
        moe("task", 2) | {"low_rank": {"rank": 16, "at": "both"}},
        ("specific",),
    ),
    "neurons": ("neurons of each direction, 95 %", {"neurons": {"share": 95}}, ("specific",)),
    "neurons-rows": (
        "neurons of each direction, 95 %, rows",
        {"neurons": {"share": 95, "remove": "rows"}},
        ("specific",),
    ),
    "lass": ("LaSS, 30 % of the weights", {"lass": {"tuned": "runs/tuned", "ratio": 0.7}}, ("specific",)),
    "adapters": ("adapters of each pair", {"adapters": {"width": 64}}, ("specific",)),
}
STARTED = ("neurons", "neurons-rows", "lass", "adapters")  # from the dense model
REFUSED = {
    "token": ("token", moe("token", 1)),
    "sentence": ("sentence", moe("sentence", 1)),
    "clsr": ("CLSR", {"clsr": {"budget": 0.3}}),
}


def recipe_of(changes: dict[str, Any], steps: int, start: Path | None = None) -> Recipe:
    training: dict[str, Any] = {"steps": steps, "checkpoint_every": steps, "validate_every": min(steps, 500)}
    data: dict[str, Any] = {}
    if start is not None:
        training["start_from"] = str(start)
        data["vocabulary"] = {"file": str(start / "vocabulary.model")}
    return load_recipe(BASE, changes={"model": changes, "training": training, "data": data})


def lsmoe(*arguments: str) -> None:
    print(f"$ lsmoe {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "lsmoe_ds", *arguments], check=True, stdout=subprocess.DEVNULL)


def train(name: str, steps: int, work: Path) -> Path:
    """Train the named model for ``steps`` steps and return the folder of its run.

    A run that was begun is continued.
    """
    work.mkdir(parents=True, exist_ok=True)
    start = begin(steps, work) if name in STARTED else None
    recipe, run = recipe_of(MODELS[name][1], steps, start), work / "runs" / name
    if name == "lass":
        tune(recipe, start, steps // 10, work)
    with contextlib.chdir(work):
        for corpus in map(str, recipe.data.corpora):
            if not Path("data/corpora", corpus, "PROVENANCE.json").exists():
                lsmoe("data", "fetch", corpus)
        if not (recipe.prepared / "manifest.json").exists():
            lsmoe("data", "prepare", str(BASE))
        last, _ = newest_whole(run)
        if last is None or step_of(last) < steps:
            write_whole(Path(f"{name}.yaml"), recipe.to_yaml())
            lsmoe("train", f"{name}.yaml", "--out", str(run), "--nproc", "1")
    return run


def begin(steps: int, work: Path) -> Path:
    """Train the dense model and return it as a folder to start from."""
    run, start = train("dense", steps, work), work / "start"
    if not start.exists():
        lsmoe("convert", str(run), "--as", "consolidated", "--out", str(start), "--check", "0")
    return start


def tune(recipe: Recipe, start: Path | None, steps: int, work: Path) -> None:
    """Fine-tunes the dense model on each direction."""
    plain = recipe_of({}, steps, start)
    with contextlib.chdir(work):
        for direction in recipe.data.directions:
            run = Path("runs/tuned", direction)
            if newest_whole(run)[0] is None:
                training = plain.training.model_copy(update={"directions": [direction], "validate_every": 0})
                write_whole(Path("tuned.yaml"), plain.model_copy(update={"training": training}).to_yaml())
                lsmoe("train", "tuned.yaml", "--out", str(run), "--nproc", "1")


def converted(run: Path, direction: Direction, route: str, folder: Path) -> dict[str, Engine]:
    """Convert the run to each form and return the engines by column name.

    Each form is loaded as its users load it.
    """
    engines: dict[str, Engine] = {}
    for name in ("dense", "huggingface", "ctranslate2 float32", "ctranslate2 int8"):
        kind, *quantization = name.split()
        options: dict[str, Any] = {"quantization": quantization[0]} if quantization else {}
        out = folder / name.replace(" ", "-")
        convert(
            run,
            kind,
            direction,
            out,
            check=0,
            route=route,
            **options,
        )
        engines[name] = Exported.load(find_model(out)) if kind == "huggingface" else load_engine(out)
    return engines


def in_float64(loaded: Loaded) -> Loaded:
    loaded.model.double()
    for module in loaded.model.modules():
        if isinstance(module, Attention):
            module.packed = tuple(each.double() for each in module.packed)
    return loaded


def measure(run: Path, route: str) -> dict[str, Any]:
    recipe = load_recipe(run / "recipe.yaml")
    progress = read_progress(run / "metrics.jsonl")
    texts: dict[str, list[str]] = {}
    references: list[str] = []
    same: Counter[str] = Counter()
    difference: dict[str, float] = {}
    sizes: dict[str, int] = {}
    data = PreparedData.of(recipe, run)
    for direction in DIRECTIONS:
        model, exact = load(run, "cpu", route), in_float64(load(run, "cpu", route))
        lines, right = (side[:SENTENCES] for side in data.text(direction, "test"))
        references += right
        with tempfile.TemporaryDirectory() as folder:
            engines = converted(run, direction, route, Path(folder))
            sizes = {"sparse": model.parameters, "dense": engines["dense"].parameters}  # type: ignore[attr-defined]
        for name, engine in ({"model": model} | engines).items():
            if name not in ("dense", "huggingface"):
                texts.setdefault(name, []).extend(translate_all(engine, direction, lines, Search()))
        for name, engine in (engines | {"model in float64": exact}).items():
            found = compare(model, engine, direction, lines)
            same[name] += found.same
            if found.largest_logit_difference is not None:
                difference[name] = max(difference.get(name, 0.0), found.largest_logit_difference)
            if isinstance(engine, Exported):
                if found.same < found.sentences:
                    engine.model.double()
                    found = compare(exact, engine, direction, lines)
                same["huggingface, in float64"] += found.same
    chrf, dev = (
        CHRF(word_order=2),
        progress.curves.get("dev_loss_shared" if route == "shared" else "dev_loss"),
    )
    scores = {name: round(chrf.corpus_score(each, [references]).score, 2) for name, each in texts.items()}
    return {
        "data": recipe.name,
        "steps": progress.steps,
        "dev loss": round(dev[-1][1], 3) if dev else None,
        "parameters": sizes,
        "sentences": len(references),
        "directions": [str(direction) for direction in DIRECTIONS],
        "largest logit difference": {name: float(f"{value:.1e}") for name, value in difference.items()},
        "identical translations": same,
        "chrF++": scores,
        "signature": str(chrf.get_signature()),
        "sample": {name: each[0] for name, each in [*texts.items(), ("reference", references)]},
    }


def table(rows: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        (
            "| model | steps, dev loss | parameters | dense: logits, same | Hugging Face: logits, same | "
            "CTranslate2: same | chrF++ | int8's |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        if "refused" in row:
            reason = row["refused"].split("; ")[0].split(": serve")[0]
            lines.append(f"| {row['model']} | refused: {reason} | | | | | | |")
            continue
        same, off, score, size = (
            row[key] for key in ("identical translations", "largest logit difference", "chrF++", "parameters")
        )
        cells = [
            row["model"],
            f"{row['steps']:,}" + ("" if row["dev loss"] is None else f", {row['dev loss']:.2f}"),
            f"{size['sparse'] / 1e6:.2f}M → {size['dense'] / 1e6:.2f}M",
            f"{off['dense']:.0e}, {same['dense']}",
            f"{off['huggingface']:.0e}, {same['huggingface']}",
            str(same["ctranslate2 float32"]),
            f"{score['ctranslate2 float32']:.1f}",
            f"{score['ctranslate2 int8'] - score['ctranslate2 float32']:+.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def refusal(changes: dict[str, Any]) -> str:
    try:
        check_convertible(recipe_of(changes, 1), DIRECTIONS[0])
    except UserError as error:
        return str(error)
    raise AssertionError("this has a dense equal by now")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=2500, help="of each training (default: 2500)")
    about = "where data and runs are kept (default: build/exports)"
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "exports", metavar="DIR", help=about)
    about = "take this run for a model; may be repeated"
    parser.add_argument("--run", action="append", default=[], metavar="NAME=RUN", help=about)
    about = f"measure these anew: {', '.join(MODELS)}"
    parser.add_argument("--only", nargs="+", choices=list(MODELS), metavar="NAME", help=about)
    arguments = parser.parse_args()
    given = {
        name: Path(folder).resolve() for name, _, folder in (each.partition("=") for each in arguments.run)
    }
    if unknown := given.keys() - MODELS.keys():
        parser.error(f"--run {unknown.pop()}: choose {', '.join(MODELS)}")
    path = arguments.out
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path is not None and path.exists() else {}
    rows: dict[str, Any] = {}
    for name, (title, _, routes) in MODELS.items():
        for route in routes:
            key = name if len(routes) == 1 else f"{name}, {route}"
            rows[key] = known.get(key)
            if rows[key] is None if arguments.only is None else name in arguments.only:
                run = given.get(name) or train(name, arguments.steps, arguments.work.resolve())
                rows[key] = {
                    "model": title if len(routes) == 1 else f"{title}, {route}",
                    **measure(run, route),
                }
                if path is not None:
                    save({**known, **{each: row for each, row in rows.items() if row is not None}}, path)
                print(key, rows[key], flush=True)
    rows = {key: row for key, row in rows.items() if row is not None}
    for name, (title, changes) in REFUSED.items():
        rows[name] = {"model": title, "refused": refusal(changes)}
    save(rows, path)
    print(table(rows))


def save(rows: dict[str, Any], out: Path | None) -> None:
    versions = {
        name: importlib.metadata.version(name) for name in ("transformers", "ctranslate2", "sacrebleu")
    }
    write(
        {
            "versions": versions,
            "beam": Search().beam,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "rows": rows,
        },
        out,
    )


if __name__ == "__main__":
    run_main(main)

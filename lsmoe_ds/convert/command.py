"""The conversion as the command does it: convert, load the result, compare it with what it came from, write
that down.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsmoe_ds import __version__
from lsmoe_ds.analysis.measuring import measure_use
from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.m2m_100 import count_padding
from lsmoe_ds.checkpoint.stored import (
    RECIPE,
    Stored,
    check_writable,
    find_model,
    read_weights,
    write_folder,
)
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.console import waiting
from lsmoe_ds.convert.agreement import check_agreement
from lsmoe_ds.convert.gguf import convert_gguf, find_gguf
from lsmoe_ds.convert.layout import convert_layout
from lsmoe_ds.convert.model_card import model_card
from lsmoe_ds.data.prepared import open_data
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.ctranslate2 import QUANTIZATIONS
from lsmoe_ds.export.grown import Likeness, grow, grown_recipe
from lsmoe_ds.export.importing import read_huggingface
from lsmoe_ds.export.kept_experts import SAID, Keep, One, keep_one, keep_used
from lsmoe_ds.export.peft import BASE, base_of, measure, refer, split_stored
from lsmoe_ds.export.subnetwork import ALL, describe, extract_stored
from lsmoe_ds.export.vocabulary_map import VocabularyMap
from lsmoe_ds.folders import explain_errors, is_huggingface, write_whole
from lsmoe_ds.inference.engine import say_untrained
from lsmoe_ds.inference.load import known_direction, load
from lsmoe_ds.languages import nearest, normalize_code, table

WRITERS = {
    "consolidated": "lsmoe_ds.export.consolidated",
    "grown": "lsmoe_ds.export.consolidated",
    "hybrid": "lsmoe_ds.checkpoint.stored",
    "dense": "lsmoe_ds.checkpoint.stored",
    "huggingface": "lsmoe_ds.export.huggingface",
    "ctranslate2": "lsmoe_ds.export.ctranslate2",
    "peft": "lsmoe_ds.export.peft",
}
"""What a model can be converted to: the module whose ``write_files`` is its
:class:`~lsmoe_ds.checkpoint.stored.Writer`.
"""
SERVED = ("dense", "huggingface", "ctranslate2", "peft")  # without experts; a run's report tells of them
OPTIONS = {
    "quantization": "ctranslate2",
    "vocabulary_map": "ctranslate2",
    "optimizer": "consolidated",
    "nproc": "layout",
    "base": "peft",
    "keep": "hybrid",
    "experts": "dense",
}  # and the kind that has them


def convert(
    run: str | Path,
    to: str,
    direction: Direction | None,
    out: str | Path,
    check: int = 100,
    route: str = "specific",
    average: Averaging = 1,
    overrides: Sequence[str] = (),
    like: Likeness | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Convert a run, a checkpoint, a converted folder or one of Hugging Face, and return what was written.

    For one direction, or by the shared route for all; a dense folder is taken as it is. ``average`` chooses
    the weights of a run. ``overrides`` change the recipe of a grown or imported model; ``like`` says what
    new parts begin as. ``options`` are those of the kind's writer: ``quantization`` and ``vocabulary_map`` of
    ctranslate2, ``optimizer`` of consolidated, ``nproc`` of layout, ``base`` of peft, ``keep`` of hybrid and
    ``experts`` of dense (:mod:`lsmoe_ds.export.kept_experts`). The first ``check``
    held-out sentences of the direction, or as many spread over all, are translated by both models. If that is
    not possible, the record says why. What is made of a run for serving is also noted in the run's folder
    (:func:`_note`). Raises UserError for a target, direction, route, option or folder that is not possible.
    """
    kinds = [*WRITERS, "layout"]
    if to not in kinds:
        language = (
            "; a language goes into --direction, as in --direction en-de"
            if normalize_code(to) in table()
            else ""
        )
        known = f"choose {', '.join(kinds[:-1])} or {kinds[-1]}"
        raise UserError(f"'{to}' is nothing to convert to{nearest(to, kinds)}: {known}{language}")
    options = {name: value for name, value in options.items() if value}
    for name in options:
        if OPTIONS[name] != to:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is for --to {OPTIONS[name]}, not for {to}")
    if to == "layout":
        if direction or route != "specific" or average != 1 or like:
            raise UserError(
                "--to layout keeps the whole run as it is: beside --out it takes --set and --nproc only"
            )
        return convert_layout(Path(run), overrides, Path(out), options.get("nproc"))
    if (gguf := find_gguf(Path(run))) is not None:
        if to != "huggingface" or direction or route != "specific" or options or overrides or like:
            raise UserError(f"{gguf} is a GGUF file, of which --to huggingface alone makes a model to use")
        return convert_gguf(gguf, Path(out))
    whole = to in ("consolidated", "grown")
    imported = is_huggingface(Path(run)) or bool(
        to == "consolidated" and overrides and find_model(run).kind == "huggingface"
    )
    if overrides and to != "grown" and not (imported and whole):
        raise UserError(
            "--set is for --to grown and layout, and for --to consolidated of a Hugging Face folder"
        )
    if whole and (direction is not None or route != "specific"):
        raise UserError(
            f"--to {to} keeps the whole model: leave out --direction and --route, or choose --to dense"
        )
    if like and to != "grown":
        raise UserError("--like-language and --like-expert are for --to grown")
    out = Path(out)
    check_writable(out)
    began = time.perf_counter()
    if imported:
        if average != 1 or options:
            raise UserError(
                f"{run} is a Hugging Face model, which has no checkpoints to average and no optimizer's state"
            )
        return _import(Path(run), to, overrides, out)
    stored = find_model(run)
    if stored.recipe.model.huggingface is not None and to in ("dense", "hybrid", "ctranslate2"):
        ways = "huggingface or peft" if stored.recipe.model.task == "translate" else "huggingface"
        raise UserError(f"--to {to} is not for models of transformers: use --to {ways}")
    if stored.recipe.model.task != "translate" and to == "peft":
        raise UserError("--to peft is for models that translate: use --to huggingface, by language")
    direction = known_direction(stored.recipe, stored.kind, direction) if direction else None
    if direction is not None and direction not in stored.recipe.languages.directions:
        say_untrained([direction])
    vocabulary: Path | bytes = stored.vocabulary
    rows: list[dict[str, Any]] = []
    if whole:
        tensors, recipe, made = consolidate_stored(stored, average)
    elif to == "peft":
        tensors, recipe, adapters, made = split_stored(stored, direction, route, average)
        rows, base = measure(adapters, tensors, recipe), options.get("base") or base_of(tensors, recipe)
        options |= {"adapters": adapters, "sizes": rows, "of_base": made, "base": base, "home": out}
        made = made | {"base": refer(base or out / BASE, out, out)}
    else:
        fewer = options.pop("keep", None), options.pop("experts", None)
        hybrid = to == "hybrid" or any(fewer)
        tensors, recipe, made = extract_stored(stored, direction, route, hybrid, average)
        if any(fewer):
            tensors, recipe, said = _keep_experts(stored, average, tensors, recipe, *fewer)
            made |= {**said, "dense_parameters": tensors.numbers}
    if to == "grown":
        recipe, vocabulary = grown_recipe(stored, overrides, out)
        tensors = grow(tensors, stored.recipe, recipe, Vocabulary.load(stored.vocabulary), like or Likeness())
        made |= {
            "run": recipe.name,
            "grown_from": made["run"],
            "direction": ALL,
            "dense_parameters": tensors.numbers,
        }
    if to == "huggingface" and recipe.model.huggingface is None and (padding := count_padding(recipe)):
        made["padded_parameters"] = tensors.numbers + padding
    if options.pop("optimizer", False):
        options["optimizer_of"] = stored
    shown: dict[str, Any] = {}
    if to == "ctranslate2":
        shown = {"quantization": options.get("quantization", QUANTIZATIONS[0])}
        if count := options.pop("vocabulary_map", None):
            options["candidates"], shown["vocabulary_map"] = _map_vocabulary(stored, recipe, direction, count)
    kind = "consolidated" if whole else to
    provenance = {"kind": kind, **made, **shown, **({"average": average} if average != 1 else {})}
    card = model_card(kind, recipe, provenance, stored.home, rows)
    write = importlib.import_module(WRITERS[to]).write_files
    with waiting(f"writing {out}"):
        files = write_folder(out, tensors, recipe, vocabulary, provenance, card, write, **options)
    seconds = time.perf_counter() - began
    served = {Direction.parse(each) for row in rows for each in row["directions"]}
    found = check_agreement(
        stored, to, direction, out, check, route, average, made, served, options.get("base")
    )
    sizes = {"bytes": _bytes(files), "seconds": round(seconds, 3), "folder": str(out)}
    if to not in SERVED:
        return {"kind": to, "parameters": tensors.numbers, **found, **sizes}
    record: dict[str, Any] = {"kind": to, **shown}
    sizes_of = ("sparse_parameters", "dense_parameters", "padded_parameters")
    record |= {name: made[name] for name in ("direction", "route", "step", *sizes_of) if name in made}
    record |= {"average": average} if average != 1 else {}
    record |= {"adapters": rows} if rows else {}
    record |= {
        **found,
        **{name if name == "seconds" else f"dense_{name}": value for name, value in sizes.items()},
    }
    record |= {name: made[name] for name in ("approximates",) if name in made}
    record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if stored.kind == "sparse" and "approximates" not in made:
        _note(record, stored.home)
    return record


def _keep_experts(
    stored: Stored, average: Averaging, tensors: Tensors, recipe: Recipe, keep: str | None, one: One | None
) -> tuple[Tensors, Recipe, dict[str, Any]]:
    """Measure which experts the recipe's direction uses, and keep some of them, or one a layer.

    Return the model, its recipe and what the provenance says of it.
    """
    kept = None if keep is None else Keep.parse(keep)
    if one is not None and one not in SAID:
        raise UserError(f"--experts is {one!r}: choose {' or '.join(SAID)}")
    (direction,) = recipe.languages.directions
    loaded = load(stored.weights_in, "cpu", average=average, streamed=True)
    uses = measure_use(loaded, open_data(stored), direction)
    if kept is not None:
        tensors, recipe, said = keep_used(tensors, recipe, uses, kept)
        return tensors, recipe, {"kept_experts": said}
    assert one is not None
    tensors, recipe = keep_one(tensors, recipe, uses, one)
    return tensors, recipe, {"approximates": f"{SAID[one]} stands for all of a layer"}


def _map_vocabulary(
    stored: Stored, recipe: Recipe, direction: Direction | None, count: int
) -> tuple[VocabularyMap, dict[str, Any]]:
    """Make the vocabulary map of one direction, with ``count`` candidates for each source piece.

    Return what the record says of it, too.
    """
    if direction is None and len(recipe.languages.directions) > 1:
        raise UserError("--vocabulary-map is of one direction: add --direction")
    direction, data = direction or recipe.languages.directions[0], open_data(stored)
    with waiting("counting which pieces go together"):
        found = VocabularyMap.of(data, direction, count)
    return found, {
        "mapped": str(direction),
        "candidates_of_a_piece": count,
        **found.measure(data, direction),
    }


def _note(record: Mapping[str, Any], run: Path) -> None:
    """Keep a record in ``RUN/conversions``, beside those of other kinds, directions, routes and
    quantizations, and as the run's latest in ``conversion.json``.

    A run that cannot be written is no error: the model has been written, and the record is printed.
    """
    parts = [
        record["kind"],
        record.get("quantization"),
        "mapped" if "vocabulary_map" in record else None,
        record["direction"],
        record["route"],
        f"of-{record.get('average', 1)}",
    ]
    dull = (None, "float32", "specific", "of-1")
    name = "-".join(part for part in parts if part not in dull)
    folder = run / "conversions"
    try:
        with explain_errors(folder):
            folder.mkdir(exist_ok=True)
        for path in (folder / f"{name}.json", run / "conversion.json"):
            write_whole(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    except UserError as error:
        print(
            f"lsmoe: the model is written, its record for the run's report is not: {error}",
            file=sys.stderr,
            flush=True,
        )


def _bytes(files: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the size of the weights among the files of a folder."""
    weights = ("model", "adapter_model")
    return sum(each["bytes"] for name, each in files.items() if Path(name).name.startswith(weights))


def _import(folder: Path, to: str, overrides: Sequence[str], out: Path) -> dict[str, Any]:
    """Write a model of Hugging Face in our form, from which a training starts, and return what was
    written.
    """
    if to != "consolidated":
        raise UserError(
            f"{folder} is a Hugging Face model: import it first, by `lsmoe convert {folder} --to "
            "consolidated`"
        )
    tensors, recipe, vocabulary = read_huggingface(folder, overrides, out)
    made = {
        "run": recipe.name,
        "imported_from": folder.resolve().name,
        "direction": ALL,
        "route": "specific",
        "step": 0,
    }
    made |= {
        "version": __version__,
        "source_files": {},
        "sparse_parameters": tensors.numbers,
        "dense_parameters": tensors.numbers,
    }
    provenance = {"kind": to, **made}
    write = importlib.import_module(WRITERS[to]).write_files
    files = write_folder(
        out, tensors, recipe, vocabulary, provenance, model_card(to, recipe, provenance, folder), write
    )
    return {
        "kind": to,
        "parameters": tensors.numbers,
        "bytes": _bytes(files),
        "folder": str(out),
        "recipe": str(out / RECIPE),
    }


def consolidate_stored(stored: Stored, average: Averaging = 1) -> tuple[Tensors, Recipe, dict[str, Any]]:
    """Return the whole model as it is, with its recipe and the ``provenance.json`` of the result, except kind
    and files.
    """
    whole = read_weights(stored, average)
    tensors = Tensors.of(whole.tensors)
    of_all = len(stored.recipe.data.directions) > 1
    direction = ALL if of_all else stored.recipe.data.directions[0]
    return tensors, stored.recipe, describe(stored, whole, direction, "specific", tensors.numbers)

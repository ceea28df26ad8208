"""Run ``lsmoe convert``: convert, load the result, compare it with the original, and write a record."""

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

from lsmoe_ds.analysis.measuring import measure_use
from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.m2m_100 import count_padding
from lsmoe_ds.checkpoint.stored import (
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
from lsmoe_ds.convert.imported import import_model, weight_bytes
from lsmoe_ds.convert.layout import convert_layout
from lsmoe_ds.convert.model_card import model_card
from lsmoe_ds.data.prepared import open_data
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.metrics import TASKS
from lsmoe_ds.export.ctranslate2 import QUANTIZATIONS
from lsmoe_ds.export.grown import Likeness, grow, grown_recipe
from lsmoe_ds.export.importing import Asked
from lsmoe_ds.export.kept_experts import SAID, Keep, One, add_pruning, keep_one, keep_used
from lsmoe_ds.export.nllb_moe import check_exportable
from lsmoe_ds.export.peft import BASE, base_of, measure, refer, split_stored
from lsmoe_ds.export.subnetwork import ALL, describe, expert_layers, extract_stored
from lsmoe_ds.export.vocabulary_map import VocabularyMap
from lsmoe_ds.folders import explain_errors, is_huggingface, write_whole
from lsmoe_ds.inference.engine import say_untrained
from lsmoe_ds.inference.load import known_direction, load
from lsmoe_ds.interrupt import Interrupted
from lsmoe_ds.languages import nearest, normalize_code, table
from lsmoe_ds.notices import counted, notice

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
KINDS = [*WRITERS, "layout"]
SERVED = ("dense", "huggingface", "ctranslate2", "peft")  # kinds in a run's report, if they have no experts
OPTIONS = {
    "quantization": "ctranslate2",
    "vocabulary_map": "ctranslate2",
    "optimizer": "consolidated",
    "nproc": "layout",
    "base": "peft",
    "keep": "hybrid or huggingface",
    "experts": "dense",
}  # and the kinds to which they apply


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

    The result is for one direction, or for all by the shared route; a dense folder is used unchanged.
    ``average`` chooses the weights of a run. ``overrides`` change the recipe of a grown or imported model;
    ``like`` names the parts that new ones copy. ``options`` belong to kinds: ``quantization`` and
    ``vocabulary_map`` to ctranslate2, ``optimizer`` to consolidated, ``nproc`` to layout, ``base`` to peft,
    ``keep`` to hybrid and huggingface, ``experts`` to dense (:mod:`lsmoe_ds.export.kept_experts`). Both
    models translate the first ``check`` held-out sentences of the direction, or as many spread over all; if
    that is not possible, the record says why. A run's folder also keeps the records of models for serving
    (:func:`_note`). Raises UserError for an impossible target, direction, route, option or folder.
    """
    if to not in KINDS:
        language = (
            "; a language goes into --direction, as in --direction en-de"
            if normalize_code(to) in table()
            else ""
        )
        known = f"choose {', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise UserError(f"'{to}' is nothing to convert to{nearest(to, KINDS)}: {known}{language}")
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    for name in options:
        if to not in OPTIONS[name].split(" or "):
            option = name.replace("_", "-")
            raise UserError(f"--{option} is for --as {OPTIONS[name]}, not for {to}")
    if to == "layout":
        if direction or route != "specific" or average != 1 or like:
            raise UserError(
                "--as layout keeps the whole run as it is: beside --out it takes --set and --nproc only"
            )
        return convert_layout(Path(run), overrides, Path(out), options.get("nproc"))
    if (gguf := find_gguf(Path(run))) is not None:
        if to != "huggingface" or direction or route != "specific" or options or overrides or like:
            raise UserError(f"{gguf} is a GGUF file, of which --as huggingface alone makes a model to use")
        return convert_gguf(gguf, Path(out))
    whole = to in ("consolidated", "grown")
    imported = is_huggingface(Path(run)) or bool(
        to == "consolidated" and overrides and find_model(run).kind == "huggingface"
    )
    if overrides and to != "grown" and not (imported and whole):
        raise UserError(
            "--set is for --as grown and layout, and for --as consolidated of a Hugging Face folder"
        )
    if whole and (direction is not None or route != "specific"):
        raise UserError(
            f"--as {to} keeps the whole model: leave out --direction and --route, or choose --as dense"
        )
    if like and to != "grown":
        raise UserError("--like-language and --like-expert are for --as grown")
    out = Path(out)
    check_writable(out)
    began = time.perf_counter()
    if imported:
        if average != 1 or options:
            raise UserError(
                f"{run} is a Hugging Face model, which has no checkpoints to average and no optimizer's state"
            )
        return import_model(Path(run), to, Asked(overrides), out)
    stored = find_model(run)
    if stored.recipe.model.huggingface is not None and to in ("dense", "hybrid", "ctranslate2"):
        ways = "huggingface or peft" if stored.recipe.model.task == "translate" else "huggingface"
        raise UserError(f"--as {to} is not for models of transformers: use --as {ways}")
    if stored.recipe.model.task != "translate" and to == "peft":
        raise UserError("--as peft is for models that translate: use --as huggingface, by language")
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
        prunes = any(each is not None for each in fewer)
        layers = list(expert_layers(stored.recipe.model, route))
        as_nllb_moe = to == "huggingface" and any(not moe.by_task for _, _, moe in layers)
        if as_nllb_moe and not prunes:  # with fewer experts NLLB-MoE may have an equivalent
            check_exportable(layers)
        hybrid = to == "hybrid" or as_nllb_moe or prunes
        tensors, recipe, made = extract_stored(stored, direction, route, hybrid, average)
        if prunes:
            tensors, recipe, said = _keep_experts(stored, average, tensors, recipe, *fewer)
            if "kept_experts" in said:
                said["kept_experts"] = add_pruning(made.get("kept_experts", {}), said["kept_experts"])
            made |= {**said, "dense_parameters": tensors.numbers}
        if as_nllb_moe:
            check_exportable(recipe.model.moe_layers())
        if direction is not None and made["direction"] == ALL and not hybrid:
            notice(
                f"all directions of {run} have the same parameters: {out} serves all, not {direction} alone"
            )
    if to == "grown":
        recipe, vocabulary = grown_recipe(stored, overrides, out)
        tensors = grow(tensors, stored.recipe, recipe, Vocabulary.load(stored.vocabulary), like or Likeness())
        made |= {
            "run": recipe.name,
            "grown_from": made["run"],
            "direction": ALL,
            "sparse_parameters": made["dense_parameters"],
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
    try:
        found = check_agreement(
            stored, to, direction, out, check, route, average, made, served, options.get("base")
        )
    except Interrupted:
        notice(f"{out} is written whole, but was not compared with {run}")
        raise
    task = TASKS[recipe.model.task]
    if (compared := found.get(f"{task.item}s")) and not found[f"same_{task.results}"]:
        what = f"0 of {counted(compared, task.item)} have the same {task.results} as in {run}"
        notice(f"{what}: evaluate {out} before you use it")
    sizes = {"bytes": weight_bytes(files), "seconds": round(seconds, 3), "folder": str(out)}
    if to not in SERVED or any(recipe.model.moe_layers()):
        padded = {name: made[name] for name in ("padded_parameters",) if name in made}
        return {"kind": to, "parameters": tensors.numbers, **padded, **found, **sizes}
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

    Returns the model, its recipe and its fields of the provenance.
    """
    kept = None if keep is None else Keep.parse(keep)
    if one is not None and one not in SAID:
        raise UserError(f"--experts is {one!r}: choose {' or '.join(SAID)}")
    if len(recipe.languages.directions) > 1:
        first = recipe.languages.directions[0].label
        raise UserError(
            f"experts are chosen by their use in one direction: name it, as in --direction {first}"
        )
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

    Also returns the fields of the record that describe it.
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
    """Write a record to ``RUN/conversions``, one for each kind, direction, route and quantization, and to
    ``conversion.json``, the run's latest.

    A read-only run is no error, because the model has been written and the record is printed.
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


def consolidate_stored(stored: Stored, average: Averaging = 1) -> tuple[Tensors, Recipe, dict[str, Any]]:
    """Return the whole model as it is, with its recipe and the ``provenance.json`` of the result, except kind
    and files.
    """
    whole = read_weights(stored, average)
    tensors = Tensors.of(whole.tensors)
    of_all = len(stored.recipe.data.directions) > 1
    direction = ALL if of_all else stored.recipe.data.directions[0]
    return tensors, stored.recipe, describe(stored, whole, direction, "specific", tensors.numbers)

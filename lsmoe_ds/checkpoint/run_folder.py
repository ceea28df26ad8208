"""Open the run folder: ``recipe.yaml``, ``vocabulary.model``, ``origin.json``, ``checkpoints/step-N/``,
``metrics.jsonl``, ...

This module knows who may write it, and which of its checkpoints are whole; training knows what is in a
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lsmoe_ds.config.codes import mean_the_same
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.host import HOST
from lsmoe_ds.config.host_origin import CONVERTED, copy_host
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.comparison import (
    MANIFEST,
    ORIGIN,
    check_trained_on,
    check_vocabulary,
    describe_origin,
    read_origin,
)
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import (
    damage,
    explain_errors,
    is_count,
    is_stored_recipe,
    read_json,
    replaced,
    resolved,
    sha256,
    write_whole,
)

# What may differ when a run is resumed: it changes neither the model nor any step already taken.
MAY_CHANGE = {
    "data.directory",
    "model.huggingface",  # the folder may be elsewhere: the run has the weights
    "data.vocabulary.file",
    "data.name",  # that the data are the same is checked
    "model.encoder.moe.replicas",  # which ranks compute rows, and nothing else
    "model.decoder.moe.replicas",
    "parallel",  # a checkpoint is resharded to other ranks
    "deepspeed.zero_optimization",
    "training.steps",
    "training.adam",  # moments move to the host and back
    "training.activation_checkpointing",
    "training.log_every",
    "training.log_to",
    "training.peak_flops",
    "training.validate_every",
    "training.validate_pairs",
    "training.validate_translations",
    "training.early_stopping",
    "training.checkpoint_every",
    "training.keep",
    "training.keep_best",
    "training.hang_timeout",
    "training.max_skipped",
    "training.deterministic",
}

CHRF = "dev_chrf"  # of dev translations, in records and checkpoints
STOPPING = "stopping"  # in the position of a checkpoint: see :class:`lsmoe_ds.training.stopping.Stopping`
START = "start"  # in ``origin.json``: :func:`weights_digest` of ``training.start_from``
STARTS = ("consolidated", "hybrid", "dense", "huggingface")  # kinds of converted folders to start from
FROZEN = "frozen"  # the folder of what does not train, see :mod:`lsmoe_ds.checkpoint.frozen`
BEGUN = (
    ".vocabulary.model.",
    f".{ORIGIN}.",
    ".recipe.yaml.",
    f".{HOST}.",
)  # how files are called until they are whole


def check_run(recipe: Recipe, run: Path, vocabulary: Path) -> None:
    """Raise UserError if the folder belongs to another recipe, vocabulary or text, or to somebody else; write
    nothing.

    ``vocabulary`` is that of the prepared data, in their folder.
    """
    stored, copied = run / "recipe.yaml", run / "vocabulary.model"
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file: choose a folder with --out")
    if not stored.exists():
        if run.exists() and any(not _is_begun(path, vocabulary) for path in run.iterdir()):
            raise UserError(f"{run} is not empty and holds no run: choose another folder with --out")
        return
    for key, before, now in find_changes(load_recipe(stored), recipe):
        advice = "set it back"
        if mean_the_same(before, now):
            advice = (
                "the run keeps the codes that it was started with, so continue it with its own recipe, "
                f"{stored}"
            )
        was, has = ("no value" if value is None else value for value in (before, now))
        raise UserError(
            f"the run {run} was started with {key} {was}, the recipe now has {has}: "
            f"{advice}, or write to another folder with --out"
        )
    check_vocabulary(run, read_origin(run).get("vocabulary"))
    if sha256(copied) != sha256(vocabulary):
        raise UserError(
            f"the run {run} was started with another vocabulary than {vocabulary}: write to another folder "
            "with --out"
        )
    prepared = vocabulary.parent
    manifest = read_json(prepared / MANIFEST)
    if manifest is not None and describe_origin(prepared) is not None:
        check_trained_on(run, prepared, manifest)


def find_changes(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key with its two values that differs between recipes, unless a resumed run may change it."""
    old, new = (_flat(recipe.model_dump(mode="json")) for recipe in (before, now))
    for key in sorted(old.keys() | new.keys()):
        may_change = any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)
        if old.get(key) != new.get(key) and not may_change:
            yield key, old.get(key), new.get(key)


def _is_begun(path: Path, vocabulary: Path) -> bool:
    """Tell whether a file in a folder without recipe is what :func:`open_run` leaves when it is killed."""
    if path.name == "vocabulary.model":
        return path.is_file() and sha256(path) == sha256(vocabulary)
    return path.name in (ORIGIN, HOST) or path.name.startswith(BEGUN)


def choose_run(file: Path, recipe: Recipe, out: Path | None) -> Path:
    """Return the folder that a training of this recipe file writes.

    That is ``out`` if it is given, the run's own folder for the recipe that a run has stored, and otherwise
    ``runs/NAME``.
    """
    if out is not None:
        return out
    return file.parent if is_stored_recipe(file) else Path("runs") / recipe.name


def open_run(recipe: Recipe, run: Path, vocabulary: Path) -> None:
    """Make the run folder of a recipe if need be, after :func:`check_run`; store the recipe, and where and on
    what it is trained.
    """
    check_run(recipe, run, vocabulary)
    stored, text, origin = run / "recipe.yaml", recipe.to_yaml(), describe_origin(vocabulary.parent)
    if origin is not None and (start := _start(recipe, run)) is not None:
        origin |= {START: start}
    with explain_errors(run):
        resolved(run).mkdir(parents=True, exist_ok=True)
        if origin is not None and origin != read_json(run / ORIGIN):
            write_whole(run / ORIGIN, json.dumps(origin) + "\n")
        if not stored.exists():
            partial = run / f"{BEGUN[0]}partial"
            shutil.copyfile(vocabulary, partial)
            partial.replace(run / "vocabulary.model")
        if recipe.model.huggingface is not None and not (run / HOST).is_dir():
            with replaced(run / HOST) as new:
                copy_host(recipe.model.huggingface, new)
        if not stored.exists() or stored.read_text(encoding="utf-8") != text:
            write_whole(stored, text)  # the last file that a new run gets


def weights_digest(folder: Path) -> str | None:
    """Return a checksum of the weights of a converted folder, as it notes those of its files; None if there
    are none.
    """
    files = (read_json(folder / CONVERTED) or {}).get("files")
    sums = {
        name: each.get("sha256") if isinstance(each, dict) else None
        for name, each in (files.items() if isinstance(files, dict) else ())
        if name.endswith(".safetensors")
    }
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest() if sums else None


def check_start(folder: Path) -> None:
    """Raise UserError if a folder is a run, a checkpoint of one, or converted to what no training begins
    with.
    """
    kind = (read_json(folder / CONVERTED) or {}).get("kind")
    is_checkpoint = resolved(folder).parent.name == "checkpoints" and (folder / MANIFEST).is_file()
    if kind is None and (is_checkpoint or is_stored_recipe(folder / "recipe.yaml")):
        raise UserError(
            f"{folder} is a run: `lsmoe convert {folder} --to consolidated --out DIR` makes a folder to "
            "start from"
        )
    if kind is not None and kind not in STARTS:
        raise UserError(
            f"{folder} is made by `lsmoe convert --to {kind}`: give a folder made with --to "
            f"{', '.join(STARTS)}"
        )


def _start(recipe: Recipe, run: Path) -> str | None:
    """Return the checksum of the weights with which a run began, whose folder may be gone since."""
    if (run / "recipe.yaml").exists():
        known = read_origin(run).get(START)
        return known if isinstance(known, str) else None
    return None if recipe.training.start_from is None else weights_digest(recipe.training.start_from)


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one, whose keys are paths such as ``"a.b"``."""
    if not isinstance(value, dict):
        return {at: value}
    found = {
        key: leaf
        for name, child in value.items()
        for key, leaf in _flat(child, f"{at}.{name}" if at else name).items()
    }
    if value and all(isinstance(child, list) for child in value.values()):  # the first that fits may decide
        found[f"{at} (order)"] = list(value)
    return found


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def has_ended(checkpoint: Path, steps: int, patience: int | None) -> bool:
    """Tell whether a training of ``steps`` ends with a checkpoint: it is of the last step, or early stopping
    with this ``patience`` ends it there.
    """
    if step_of(checkpoint) >= steps:
        return True
    state = (read_json(checkpoint / "state.json") or {}).get("position")
    stopping = state.get(STOPPING) if isinstance(state, dict) else None
    waited = stopping.get("waited") if isinstance(stopping, dict) else None
    return patience is not None and is_count(waited) and waited >= patience


def list_checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first; what was cut off while being written is not among them."""
    found = [
        p
        for p in (run / "checkpoints").glob("step-*")
        if p.is_dir() and p.name.removeprefix("step-").isdecimal()
    ]
    return sorted(found, key=step_of)


def to_remove(checkpoints: list[Path], keep: int, best: int, by_chrf: bool = False) -> list[Path]:
    """List a run's checkpoints, oldest first, that are neither among the newest ``keep`` nor among the
    ``best`` of lowest dev loss, or of highest chrF. Checkpoints without that never count as best.
    """
    key, sign = (CHRF, -1) if by_chrf else ("dev_loss", 1)
    found = {path: (read_json(path / "state.json") or {}).get(key) for path in checkpoints}
    scored = sorted((sign * value, path) for path, value in found.items() if isinstance(value, float | int))
    kept = {*checkpoints[-keep:], *(path for _, path in scored[:best])}
    return [path for path in checkpoints if path not in kept]


def find_damage(checkpoint: Path, checksums: bool = True) -> str | None:
    """Say what is wrong with a checkpoint; None if nothing is."""
    manifest, state = read_json(checkpoint / "manifest.json"), read_json(checkpoint / "state.json")
    if manifest is None or not isinstance(manifest.get("files"), dict):
        return f"{checkpoint / 'manifest.json'} is missing or damaged"
    if state is None or state.get("step") != step_of(checkpoint):
        return f"{checkpoint / 'state.json'} is missing or damaged"
    return damage(checkpoint, manifest["files"], checksums) or frozen_damage(checkpoint, state, checksums)


def frozen_damage(checkpoint: Path, state: dict[str, Any], checksums: bool) -> str | None:
    """Say what is wrong with the frozen base that a checkpoint's ``state.json`` refers to; None if nothing
    is, or it refers to none.
    """
    wanted = state.get(FROZEN)
    if wanted is None:
        return None
    folder = checkpoint.resolve().parent.parent / FROZEN
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        what = f"{folder} has the weights that do not train, and belongs to every checkpoint of the run"
        return f"{manifest} is missing: {what}"
    if sha256(manifest) != wanted:
        other = f"{folder} has other weights than those beside which the checkpoint was trained"
        return f"{other} (the sha256 of {manifest.name} differs)"
    return damage(folder, (read_json(manifest) or {}).get("files"), checksums)


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint of a run, and what is wrong with each newer one.

    Raises UserError if there are checkpoints and all are damaged: resuming would mean to start over silently.
    """
    complaints: list[str] = []
    for checkpoint in reversed(list_checkpoints(run)):
        wrong = find_damage(checkpoint)
        if wrong is None:
            return checkpoint, complaints
        complaints.append(wrong)
    if complaints:
        reasons, base = "; ".join(dict.fromkeys(complaints)), str((run / FROZEN).resolve())
        way = "remove the folder to start over"
        if all(base in each for each in complaints):  # what trained is there, and needs only its base
            way = f"put {base} back as it was; a copy of the run has the same"
        raise UserError(f"no checkpoint in {run / 'checkpoints'} is whole ({reasons}): {way}")
    return None, complaints

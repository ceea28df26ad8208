"""Open the run folder: ``recipe.yaml``, ``vocabulary.model``, ``origin.json``, ``checkpoints/step-N/``,
``metrics.jsonl``, ...

This module decides who may write the folder and which of its checkpoints are complete; the content of
checkpoints is up to training.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
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

SECTION = "one"  # shown as the value of a section that only one of two recipes has

# Keys that may change when a run is resumed: they affect neither the model nor earlier steps.
MAY_CHANGE = {
    "data.directory",
    "model.huggingface",  # the folder may be elsewhere: the run has the weights
    "data.vocabulary.file",
    "data.name",  # the data themselves are compared
    "model.encoder.moe.replicas",  # only decides which ranks compute rows
    "model.decoder.moe.replicas",
    "model.encoder.moe.chunks",  # changes results only by rounding
    "model.decoder.moe.chunks",
    "parallel",  # a checkpoint is resharded to other ranks
    "deepspeed.zero_optimization",
    "training.steps",
    "training.adam",  # moments move to the host and back
    "training.activation_checkpointing",
    "training.packed",
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
TEACHER = "teacher"  # and of ``training.teacher.model``
STARTS = ("consolidated", "hybrid", "dense", "huggingface")  # kinds of converted folders to start from
FROZEN = "frozen"  # the folder of what does not train, see :mod:`lsmoe_ds.checkpoint.frozen`
BEGUN = (
    ".vocabulary.model.",
    f".{ORIGIN}.",
    ".recipe.yaml.",
    f".{HOST}.",
)  # prefixes of the names of incomplete files


def check_run(recipe: Recipe, run: Path, vocabulary: Path) -> None:
    """Raise UserError if the folder holds a run of another recipe, vocabulary or text, or is no run folder.

    ``vocabulary`` is the file in the folder of the prepared data. A run that has not yet trained may change,
    because training may have refused its recipe. Nothing is written.
    """
    stored, copied = run / "recipe.yaml", run / "vocabulary.model"
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file: choose a folder with --out")
    if not stored.exists():
        if run.exists() and any(not _is_begun(path, vocabulary) for path in run.iterdir()):
            raise UserError(f"{run} is not empty and holds no run: choose another folder with --out")
        return
    if not has_trained(run):
        return
    for key, before, now in find_changes(load_recipe(stored), recipe):
        advice = "set it back"
        if mean_the_same(before, now):
            advice = (
                "the run keeps the codes that it was started with, so continue it with its own recipe, "
                f"{stored}"
            )
        raise UserError(
            f"the run {run} was started {_differs(key, before, now)}: {advice}, or write to another folder "
            "with --out"
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


def has_trained(run: Path) -> bool:
    """Tell whether a run has a checkpoint, even a damaged one, or a record of a step."""
    metrics = run / "metrics.jsonl"
    return bool(list_checkpoints(run)) or (metrics.is_file() and metrics.stat().st_size > 0)


def find_changes(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key that differs between recipes, with both values, unless a resumed run may change it.

    A section that only one recipe has, such as a method, counts as one key with the value ``SECTION``.
    """
    old, new = (_flat(recipe.model_dump(mode="json")) for recipe in (before, now))
    told: set[str] = set()
    for key in sorted(old.keys() | new.keys()):
        may_change = any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)
        if old.get(key) == new.get(key) or may_change:
            continue
        parts = key.split(".")
        sections = [".".join(parts[:end]) for end in range(1, len(parts))]
        section = next((each for each in sections if each in old or each in new), None)
        if section is None:
            yield key, old.get(key), new.get(key)
        elif section not in told:
            told.add(section)
            yield section, *((None, SECTION) if section in old else (SECTION, None))


def _differs(key: str, before: Any, now: Any) -> str:
    """Describe a change that :func:`find_changes` has found."""
    if before is None:
        return f"without {key}, the recipe now has {now}"
    value = "" if before == SECTION else f" {before}"
    return f"with {key}{value}, the recipe now has {'none' if now is None else now}"


def _is_begun(path: Path, vocabulary: Path) -> bool:
    """Tell whether a file in a folder without recipe may be left from a killed :func:`open_run`."""
    if path.name == "vocabulary.model":
        return path.is_file() and sha256(path) == sha256(vocabulary)
    return path.name in (ORIGIN, HOST) or path.name.startswith(BEGUN)


def choose_run(file: Path, recipe: Recipe, out: Path | None) -> Path:
    """Return the run folder for a training of this recipe file.

    It is ``out`` if that is given, the file's own folder if a run has stored it, and otherwise ``runs/NAME``.
    """
    if out is not None:
        return out
    return file.parent if is_stored_recipe(file) else Path("runs") / recipe.name


def open_run(recipe: Recipe, run: Path, vocabulary: Path) -> None:
    """Make the run folder of a recipe, if needed, after :func:`check_run`; store the recipe and
    ``origin.json``.
    """
    check_run(recipe, run, vocabulary)
    stored, text, origin = run / "recipe.yaml", recipe.to_yaml(), describe_origin(vocabulary.parent)
    is_new = not stored.exists() or not has_trained(run)
    changes = not stored.exists() or stored.read_text(encoding="utf-8") != text
    if origin is not None:
        origin |= _digests(recipe, run)
    with explain_errors(run):
        resolved(run).mkdir(parents=True, exist_ok=True)
        if origin is not None and origin != read_json(run / ORIGIN):
            write_whole(run / ORIGIN, json.dumps(origin) + "\n")
        if is_new:
            partial = run / f"{BEGUN[0]}partial"
            shutil.copyfile(vocabulary, partial)
            partial.replace(run / "vocabulary.model")
        if recipe.model.huggingface is not None and ((is_new and changes) or not (run / HOST).is_dir()):
            with replaced(run / HOST) as new:
                copy_host(recipe.model.huggingface, new)
        if changes:
            write_whole(stored, text)  # a new run gets this file last


def weights_digest(folder: Path) -> str | None:
    """Return a checksum of the weights of a converted folder, a checkpoint, or a run's newest checkpoint.

    It is made of the checksums of files in the folder's provenance or manifest; None if there are none.
    """
    checkpoints = list_checkpoints(folder)
    listed = checkpoints[-1] / "manifest.json" if checkpoints else folder / "manifest.json"
    files = (read_json(folder / CONVERTED) or read_json(listed) or {}).get("files")
    sums = {
        name: each.get("sha256") if isinstance(each, dict) else None
        for name, each in (files.items() if isinstance(files, dict) else ())
        if name.endswith((".safetensors", "model_states.pt"))
    }
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest() if sums else None


def check_start(folder: Path) -> None:
    """Raise UserError if training cannot start from a folder: a run, a checkpoint, or a converted folder of
    another kind than :data:`STARTS`.
    """
    kind = (read_json(folder / CONVERTED) or {}).get("kind")
    is_checkpoint = resolved(folder).parent.name == "checkpoints" and (folder / MANIFEST).is_file()
    if kind is None and (is_checkpoint or is_stored_recipe(folder / "recipe.yaml")):
        raise UserError(
            f"{folder} is a run: `lsmoe convert {folder} --as consolidated --out DIR` makes a folder to "
            "start from"
        )
    if kind is not None and kind not in STARTS:
        raise UserError(
            f"{folder} is made by `lsmoe convert --as {kind}`: give a folder made with --as "
            f"{', '.join(STARTS)}"
        )


def _digests(recipe: Recipe, run: Path) -> dict[str, str]:
    """Return the checksums of the weights with which a run starts, or started, and of its teacher's.

    Their folders may be gone when a run is resumed. A run without a checkpoint starts from the beginning,
    even if it has trained before.
    """
    teacher = recipe.training.teacher
    folders = {START: recipe.training.start_from, TEACHER: teacher.model if teacher else None}
    if list_checkpoints(run):
        found = {key: read_origin(run).get(key) for key in folders}
    else:
        found = {key: weights_digest(folder) for key, folder in folders.items() if folder is not None}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one, whose keys are paths such as ``"a.b"``."""
    if not isinstance(value, dict):
        return {at: value}
    found = {
        key: leaf
        for name, child in value.items()
        for key, leaf in _flat(child, f"{at}.{name}" if at else name).items()
    }
    if value and all(isinstance(child, list) for child in value.values()):  # their order may matter
        found[f"{at} (order)"] = list(value)
    return found


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def has_ended(checkpoint: Path, steps: int, patience: int | None) -> bool:
    """Tell whether a training of ``steps`` ends with this checkpoint: because it is the last step, or by
    early stopping with this ``patience``.
    """
    if step_of(checkpoint) >= steps:
        return True
    state = (read_json(checkpoint / "state.json") or {}).get("position")
    stopping = state.get(STOPPING) if isinstance(state, dict) else None
    waited = stopping.get("waited") if isinstance(stopping, dict) else None
    return patience is not None and is_count(waited) and waited >= patience


def list_checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first, without those that were not completely written."""
    found = [
        p
        for p in (run / "checkpoints").glob("step-*")
        if p.is_dir() and p.name.removeprefix("step-").isdecimal()
    ]
    return sorted(found, key=step_of)


def to_remove(checkpoints: list[Path], keep: int, best: int, by_chrf: bool = False) -> list[Path]:
    """List the checkpoints to remove: those neither among the newest ``keep`` nor among the ``best``.

    The best have the lowest dev loss, or the highest chrF; checkpoints without one never count as best.
    ``checkpoints`` are those of a run, oldest first.
    """
    kept = {*checkpoints[-keep:], *(path for _, path in best_first(checkpoints, by_chrf)[:best])}
    return [path for path in checkpoints if path not in kept]


def best_first(checkpoints: Iterable[Path], by_chrf: bool = False) -> list[tuple[float, Path]]:
    """List the checkpoints that have a dev loss, or a chrF, best first, each after that value."""
    key, sign = (CHRF, -1) if by_chrf else ("dev_loss", 1)
    found = {path: (read_json(path / "state.json") or {}).get(key) for path in checkpoints}
    scored = sorted(
        (sign * value, step_of(path), path) for path, value in found.items() if isinstance(value, float | int)
    )
    return [(sign * value, path) for value, _, path in scored]  # of equals the first step


def find_damage(checkpoint: Path, checksums: bool = True) -> str | None:
    """Describe the damage to a checkpoint; None if there is none."""
    manifest, state = read_json(checkpoint / "manifest.json"), read_json(checkpoint / "state.json")
    if manifest is None or not isinstance(manifest.get("files"), dict):
        return f"{checkpoint / 'manifest.json'} is missing or damaged"
    if state is None or state.get("step") != step_of(checkpoint):
        return f"{checkpoint / 'state.json'} is missing or damaged"
    return damage(checkpoint, manifest["files"], checksums) or frozen_damage(checkpoint, state, checksums)


def frozen_damage(checkpoint: Path, state: dict[str, Any], checksums: bool) -> str | None:
    """Describe the damage to the frozen base that a checkpoint's ``state.json`` names; None if there is no
    damage, or no base.
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
    """Return the newest undamaged checkpoint of a run, and a complaint about each newer one.

    Raises UserError if all of at least one checkpoint are damaged: training would silently start over.
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
        if all(base in each for each in complaints):  # only the base is damaged
            way = f"put {base} back as it was; a copy of the run has the same"
        raise UserError(f"no checkpoint in {run / 'checkpoints'} is whole ({reasons}): {way}")
    return None, complaints

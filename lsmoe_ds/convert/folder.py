"""Where a model lies: a run folder, a checkpoint in it, or a converted folder; and writing the latter.

A converted folder holds the files of its kind (of a dense model ``model.safetensors``), ``recipe.yaml``, ``vocabulary.model``,
a model card ``README.md`` and ``provenance.json``::

    {"format": "lsmoe_ds", "kind": "dense", "version": ..., "run": ..., "step": N, "direction": "en-de" or "all",
     "route": "specific" or "shared", "source_files": {name: sha256}, "sparse_parameters": N, "dense_parameters": N,
     "files": {name: {"bytes", "sha256"}}}
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from lsmoe_ds.config import Recipe
from lsmoe_ds.convert.consolidate import read_checkpoint
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, describe_files, explain_errors, locked, read_json, replaced, write_json
from lsmoe_ds.recipe_file import load_recipe
from lsmoe_ds.run_folder import list_checkpoints

WEIGHTS, RECIPE, VOCABULARY, PROVENANCE = "model.safetensors", "recipe.yaml", "vocabulary.model", "provenance.json"
CARD = "README.md"
FORMAT = "lsmoe_ds"


@dataclass(frozen=True)
class Stored:
    """A model on disk. ``home`` holds its recipe and vocabulary, ``weights_in`` its weights; ``kind`` is "sparse" for a
    training checkpoint (whatever its layers are) and otherwise what it was converted to."""

    kind: str
    home: Path
    weights_in: Path
    recipe: Recipe

    @property
    def vocabulary(self) -> Path:
        return self.home / VOCABULARY


@dataclass(frozen=True)
class Weights:
    """All parameters by global name, float32, and the step and files they come from."""

    tensors: dict[str, Tensor]
    step: int
    files: dict[str, str]

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.tensors.values())


def find_model(path: str | Path) -> Stored:
    """What a path that a person gave is. Of a run it is the newest checkpoint. Raises UserError if it is no model."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: give a run folder, a checkpoint in it, or a converted folder")
    provenance = read_json(path / PROVENANCE)
    if provenance is not None and provenance.get("format") == FORMAT:
        found = Stored(str(provenance.get("kind")), path, path, load_recipe(path / RECIPE))
    elif (path / "manifest.json").is_file() and path.resolve().parent.name == "checkpoints":
        home = path.resolve().parent.parent
        found = Stored("sparse", home, path, load_recipe(home / RECIPE))
    elif (path / RECIPE).is_file():
        checkpoints = list_checkpoints(path)
        if not checkpoints:
            raise UserError(f"the run {path} has no checkpoint yet: `lsmoe train` writes the first after training.checkpoint_every steps")
        found = Stored("sparse", path, checkpoints[-1], load_recipe(path / RECIPE))
    else:
        raise UserError(f"{path} is neither a run folder, a checkpoint in it, nor a converted folder: it holds no {RECIPE}")
    if not found.vocabulary.is_file():
        raise UserError(f"{found.home} is damaged: {found.vocabulary} is missing")
    return found


def read_weights(stored: Stored) -> Weights:
    """Raises UserError if they are damaged."""
    if stored.kind == "sparse":
        try:
            whole = read_checkpoint(stored.weights_in)
        except UserError as error:
            earlier = [c for c in list_checkpoints(stored.home) if c.resolve() != stored.weights_in.resolve()]
            raise UserError(f"{error}; an earlier checkpoint is {earlier[-1]}" if earlier else str(error)) from None
        return Weights(whole.weights, whole.step, whole.files)
    if stored.kind != "dense":
        raise UserError(
            f"{stored.home} was made by `lsmoe convert --to {stored.kind}`: give the run, or a folder that was made with --to dense"
        )
    provenance = read_json(stored.home / PROVENANCE) or {}
    try:
        step, files = int(provenance["step"]), provenance["files"]
        wrong = damage(stored.home, files, verify=True)
        if wrong is not None:
            raise UserError(f"{stored.home} is damaged: {wrong}")
        tensors = safetensors.torch.load_file(stored.home / WEIGHTS)
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{stored.home} is damaged: {PROVENANCE} or {WEIGHTS} lacks {error}") from None
    return Weights(tensors, step, {WEIGHTS: files[WEIGHTS]["sha256"]})


Writer = Callable[..., list[str]]
"""``write_files(folder, tensors, recipe, vocabulary, **options)`` writes a dense model (tensors by global name) into a folder in
the way of one kind, and returns the names of its files."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file. Raises OSError on a full disk, otherwise UserError, if it cannot be written."""
    try:
        safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"format": "pt"})
    except safetensors.SafetensorError as error:
        if "No space left" in str(error):  # it reports a full disk as an error of its own
            raise OSError(errno.ENOSPC, str(error)) from None
        raise UserError(f"{path} cannot be written: {error}") from None


def write_files(folder: Path, tensors: Mapping[str, Tensor], recipe: Recipe, vocabulary: Path) -> list[str]:
    """The writer of the kind ``dense``."""
    save_tensors(tensors, folder / WEIGHTS)
    return [WEIGHTS]


def write_folder(
    out: Path,
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    vocabulary: Path,
    provenance: Mapping[str, Any],
    card: str = "",
    write: Writer = write_files,
    **options: Any,
) -> None:
    """Writes a converted folder, whole or not at all; one that was converted earlier is replaced, any other is refused.

    ``write``, which gets the ``options``, makes the files of its kind; ``card`` is the text of README.md, without one there is none.
    """
    check_writable(out)
    with locked(out), replaced(out) as new, explain_errors(out):
        names = write(new, tensors, recipe, vocabulary, **options)
        (new / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        shutil.copyfile(vocabulary, new / VOCABULARY)
        files = describe_files(new, (*names, RECIPE, VOCABULARY))
        if card:  # a text for people, who may change it
            (new / CARD).write_text(card, encoding="utf-8")
        write_json(new / PROVENANCE, {"format": FORMAT, **provenance, "files": files})


def check_writable(out: Path) -> None:
    """Raises UserError where something lies that `lsmoe convert` did not make."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose a folder with --out")
    if out.is_dir() and any(out.iterdir()) and (read_json(out / PROVENANCE) or {}).get("format") != FORMAT:
        raise UserError(f"{out} is not empty and was not made by `lsmoe convert`: choose another folder with --out")

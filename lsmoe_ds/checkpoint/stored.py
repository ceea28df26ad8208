"""Find a stored model (a run folder, a checkpoint in it, or a converted folder), and write converted folders.

A converted folder holds the files of its kind (for most, :func:`lsmoe_ds.checkpoint.tensors.save_tensors`
writes them), ``recipe.yaml``, ``vocabulary.model``, a model card ``README.md`` and ``provenance.json``::

    {"format": "lsmoe_ds", "kind": "dense", "version": ..., "run": ..., "step": N,
     "direction": "en-de" or "all", "route": "specific" or "shared", "source_files": {name: sha256},
     "sparse_parameters": N, "dense_parameters": N, "files": {name: {"bytes", "sha256"}}}

If methods were merged, ``merged`` describes them. In the kind "huggingface" ``padded_parameters`` also counts
the padding of narrower feed-forwards and of layers with fewer experts. ``trained`` lists the directions of
the run's training. If training did not begin with a new model, ``started_from`` names the model that it
started from, and ``start`` is a checksum of that model's weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.averages import EMA, Averaging
from lsmoe_ds.checkpoint.m2m_100 import restore
from lsmoe_ds.checkpoint.optimizer import Pieces, open_optimizer
from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.checkpoint.run_folder import FROZEN, START, list_checkpoints, step_of, weights_digest
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors, open_tensors, save_tensors
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.host import HOST, PREFIX
from lsmoe_ds.config.host_origin import copy_host
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.comparison import check_vocabulary, read_origin
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import (
    check_can_write,
    check_nothing_lost,
    checker,
    damage,
    describe_files,
    explain_errors,
    how_to_import,
    locked,
    read_fields,
    read_json,
    replaced,
    write_json,
)
from lsmoe_ds.notices import counted, notice

RECIPE, VOCABULARY, PROVENANCE = "recipe.yaml", "vocabulary.model", "provenance.json"
READABLE = ("sparse", "consolidated", "hybrid", "dense", "huggingface")  # kinds whose weights are read here
PLAIN = ("dense", "huggingface")  # kinds of dense models, unless tokens choose experts
CARD = "README.md"
FORMAT = "lsmoe_ds"


@dataclass(frozen=True)
class Stored:
    """A model on disk. ``home`` holds its recipe and vocabulary, ``weights_in`` its weights. ``kind`` is
    "sparse" for any training checkpoint, and otherwise the kind to which the model was converted.
    """

    kind: str
    home: Path
    weights_in: Path
    recipe: Recipe

    @property
    def vocabulary(self) -> Path:
        return self.home / VOCABULARY

    @property
    def is_dense(self) -> bool:
        """Tell whether it is a converted folder without experts."""
        return self.kind in PLAIN and not any(self.recipe.model.moe_layers())


@dataclass(frozen=True)
class Weights:
    """All parameters, float32, and buffers by global name, and the step and files they come from."""

    tensors: Mapping[str, Tensor]
    step: int
    files: dict[str, str]

    @property
    def parameters(self) -> int:
        return Tensors.of(self.tensors).numbers


def find_model(path: str | Path) -> Stored:
    """Find the model at a user's path; in a run, the newest checkpoint. Raises UserError if there is none."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}: give a run folder, a checkpoint in it, or a converted folder"
        )
    provenance = read_json(path / PROVENANCE)
    if provenance is not None and provenance.get("format") == FORMAT:
        found = Stored(str(provenance.get("kind")), path, path, load_recipe(path / RECIPE))
    elif (path / "manifest.json").is_file() and path.resolve().parent.name == "checkpoints":
        home = path.resolve().parent.parent
        found = Stored("sparse", home, path, load_recipe(home / RECIPE))
    elif (path / RECIPE).is_file():
        checkpoints = list_checkpoints(path)
        if not checkpoints:
            raise UserError(
                f"the run {path} has no checkpoint yet: `lsmoe train` writes the first after "
                "training.checkpoint_every steps"
            )
        found = Stored("sparse", path, checkpoints[-1], load_recipe(path / RECIPE))
    else:
        how = how_to_import(path) or f"it holds no {RECIPE}"
        raise UserError(f"{path} is neither a run folder, a checkpoint in it, nor a converted folder: {how}")
    if found.kind == "sparse":
        check_vocabulary(found.home, read_origin(found.home).get("vocabulary"))
    else:
        files = provenance.get("files") if provenance is not None else None
        noted = files.get(VOCABULARY) if isinstance(files, dict) else None
        check_vocabulary(found.home, noted.get("sha256") if isinstance(noted, dict) else None)
    return found


def start_of(stored: Stored) -> str | None:
    """Return the checksum of the weights from which a model's training started
    (:func:`lsmoe_ds.checkpoint.run_folder.weights_digest`): empty for a new model, None if it is unknown.
    """
    if stored.kind == "sparse":
        noted, folder = read_origin(stored.home).get(START), stored.recipe.training.start_from
        if noted is None and folder is not None:
            noted = weights_digest(folder)
        return "" if folder is None else noted if isinstance(noted, str) else None
    provenance = read_json(stored.home / PROVENANCE) or {}
    if isinstance(noted := provenance.get(START), str):
        return noted
    return "" if "trained" in provenance and "started_from" not in provenance else None


def read_weights(stored: Stored, average: Averaging = 1) -> Weights:
    """Return the weights, or an ``average`` of a run's weights; tensors are read on demand.

    Raises UserError if they are damaged, or if there is no such average.
    """
    if average != 1 and stored.kind != "sparse":
        raise UserError(f"--average is for the checkpoints of a run: {stored.home} holds one model")
    if average == EMA:
        return _moving_average(stored)
    if average != 1:
        return _mean(stored, average)
    if stored.kind == "sparse":
        with _naming_another(stored):
            whole = read_checkpoint(stored.weights_in)

        def entry(before: LazyTensor) -> LazyTensor:
            def make() -> Tensor:
                with _naming_another(stored):
                    return before.make()

            return before._replace(make=make)

        return Weights(
            Tensors({name: entry(each) for name, each in whole.weights.entries.items()}),
            whole.step,
            whole.files,
        )
    if stored.kind not in READABLE:
        raise UserError(
            f"{stored.home} was made by `lsmoe convert --as {stored.kind}`: give the run, or a folder that "
            "was made with --as dense"
        )
    provenance = read_fields(stored.home / PROVENANCE, step=int, files=dict)
    files = provenance["files"]
    small = {name: each for name, each in files.items() if not str(name).endswith(".safetensors")}
    if wrong := damage(stored.home, files, verify=False) or damage(stored.home, small, verify=True):
        raise UserError(f"{stored.home} is damaged: {wrong}")
    sums = {name: each["sha256"] for name, each in files.items() if name.startswith("model")}
    if not sums:
        raise UserError(f"{stored.home} is damaged: {PROVENANCE} lists no weights")
    tensors = open_tensors(stored.home, check=checker(stored.home, files))
    if stored.kind == "huggingface" and stored.recipe.model.huggingface is not None:
        tensors = Tensors({f"{PREFIX}{name}": each for name, each in tensors.entries.items()})
    elif stored.kind == "huggingface":
        tensors = restore(tensors, stored.recipe)
    return Weights(tensors, provenance["step"], sums)


@contextmanager
def _naming_another(stored: Stored) -> Iterator[None]:
    """Add a remedy to errors about a damaged checkpoint: an earlier one, or the frozen base."""
    try:
        yield
    except UserError as error:
        base, own = (stored.home / FROZEN).resolve(), step_of(stored.weights_in)
        earlier = [each for each in list_checkpoints(stored.home) if step_of(each) < own]
        way = f"; an earlier checkpoint is {earlier[-1]}" if earlier else ""
        if str(base) in str(error):
            way = f"; put {base} back as it was: a copy of the run has the same"
        raise UserError(f"{error}{way}") from None


def _moving_average(stored: Stored) -> Weights:
    """Return the moving average of trained parameters, and other tensors unchanged."""
    if stored.recipe.training.ema is None:
        raise UserError(
            f"--average {EMA} is the average that training.ema keeps, but {stored.home} was trained without: "
            "--average N takes the mean of the last N checkpoints"
        )
    with _naming_another(stored):
        whole = read_checkpoint(stored.weights_in)
        state = open_optimizer(stored.weights_in, verify=True)
    assert isinstance(state, Pieces)

    def entry(name: str, shape: tuple[int, ...]) -> LazyTensor:
        def make() -> Tensor:
            with _naming_another(stored):
                if (found := state.whole(name, shape, EMA).get(EMA)) is None:
                    raise UserError(f"{stored.weights_in} is damaged: it holds no average of {name}")
                return found

        return LazyTensor(shape, make)

    entries = whole.weights.entries
    trained = [name for name, each in entries.items() if name not in whole.frozen and not each.is_buffer]
    averages = {name: entry(name, entries[name].shape) for name in trained}
    described = read_fields(stored.weights_in / "manifest.json", files=dict)["files"]
    files = {name: described[name]["sha256"] for name in state.file_names}
    return Weights(Tensors(entries | averages), whole.step, whole.files | files)


def _mean(stored: Stored, average: int) -> Weights:
    here = stored.weights_in.resolve()
    chosen = [each for each in list_checkpoints(stored.home) if step_of(each) <= step_of(here)][-average:]
    if len(chosen) < average:
        raise UserError(
            f"--average {average} asks for more than the {counted(len(chosen), 'checkpoint')} that "
            f"{stored.home} has up to {here.name}: training.keep says how many a run keeps"
        )
    parts = [read_checkpoint(each) for each in chosen]

    def entry(name: str, shape: tuple[int, ...]) -> LazyTensor:
        def make() -> Tensor:
            total = torch.zeros(shape, dtype=torch.float64)
            for part in parts:
                total += part.weights[name]
            return (total / average).float()

        return LazyTensor(shape, make)

    last, whole = parts[-1], parts[-1].weights.entries
    for name in [name for name, each in whole.items() if each.is_buffer]:
        for path, part in zip(chosen, parts, strict=True):
            if not torch.equal(part.weights[name], last.weights[name]):
                both = f"--average: {name} differs between checkpoints {path.name} and {here.name}"
                raise UserError(f"{both}, and is no weight that has a mean: leave --average out")
    kept = {name: each for name, each in whole.items() if each.is_buffer or name in last.frozen}
    mean = Tensors({name: entry(name, each.shape) for name, each in whole.items()} | kept)
    files = {
        f"{path.name}/{name}": value
        for path, part in zip(chosen, parts, strict=True)
        for name, value in part.files.items()
    }
    return Weights(mean, parts[-1].step, files)


Writer = Callable[..., list[str]]
"""``write_files(folder, tensors, recipe, vocabulary, **options)`` writes a dense model (tensors by global
name) into a folder in the way of one kind, and returns the names of its files.
"""


def write_files(folder: Path, tensors: Mapping[str, Tensor], recipe: Recipe, vocabulary: Path) -> list[str]:
    """Write a folder's files for the kinds that store weights under our names."""
    return save_tensors(tensors, folder)


def write_folder(
    out: Path,
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    vocabulary: Path | bytes,
    provenance: Mapping[str, Any],
    card: str = "",
    write: Writer = write_files,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Write a converted folder completely or not at all, and return its files.

    A folder converted earlier is replaced, any other is refused. ``write``, called with the ``options``,
    writes the files of the kind. ``card`` is the text of README.md, if there is to be one.
    """
    check_writable(out)
    if (replaced_one := read_json(out / PROVENANCE)) is not None:
        notice(f"{out} is replaced: it held {_describe(replaced_one)}")
    with locked(out), replaced(out) as new, explain_errors(out):
        (new / VOCABULARY).write_bytes(
            vocabulary if isinstance(vocabulary, bytes) else vocabulary.read_bytes()
        )
        names = write(new, tensors, recipe, new / VOCABULARY, **options)
        if recipe.model.huggingface is not None:
            names = [*names, *(f"{HOST}/{name}" for name in copy_host(recipe.model.huggingface, new / HOST))]
        (new / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        files = describe_files(new, (*names, RECIPE, VOCABULARY))
        if card:  # not among the files with checksums, because people may edit it
            (new / CARD).write_text(card, encoding="utf-8")
        write_json(new / PROVENANCE, {"format": FORMAT, **provenance, "files": files})
    return files


def _describe(provenance: Mapping[str, Any]) -> str:
    """Describe the content of a converted folder: ``dense, en-de, of step 200``."""
    kind, direction, step = (provenance.get(key) for key in ("kind", "direction", "step"))
    return ", ".join(
        str(each)
        for each in (kind, direction, None if step is None else f"of step {step}")
        if each is not None
    )


def name_of(out: Path) -> str:
    """Return the name of a recipe for a folder."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", out.name).lstrip("._-") or "model"


def check_writable(out: Path) -> None:
    """Raise UserError if the path holds something that `lsmoe convert` did not make, or cannot be written."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose a folder with --out")
    if out.is_dir() and any(out.iterdir()):
        provenance = read_json(out / PROVENANCE) or {}
        if provenance.get("format") != FORMAT:
            raise UserError(
                f"{out} is not empty and was not made by `lsmoe convert`: choose another folder with --out"
            )
        ours = [*(provenance.get("files") or ()), PROVENANCE, CARD]
        check_nothing_lost(out, ours, "choose another folder with --out")
    check_can_write(out.absolute().parent, "choose another folder with --out")

"""The teacher of ``training.teacher``: find it, compare it with the recipe, and load it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.run_folder import TEACHER, list_checkpoints, weights_digest
from lsmoe_ds.checkpoint.stored import READABLE, Stored, find_model, read_weights
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.comparison import read_origin
from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import build_model, check_direction, with_direction
from lsmoe_ds.methods.taught import Teacher
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.layers import project
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import check_precision
from lsmoe_ds.training.start_from import check_same_vocabulary


def check_teacher(recipe: Recipe, vocabulary: Path, run: Path) -> None:
    """Raise UserError unless the recipe's teacher, if it has one, reads the same text and vocabulary, and is
    the one with which the ``run`` was started.
    """
    if (teacher := recipe.training.teacher) is None:
        return
    try:
        stored = _find(teacher.model, run if list_checkpoints(run) else None)
        if stored.kind not in READABLE or stored.recipe.model.huggingface is not None:
            raise UserError("it is no model of lsmoe_ds: give a run, or a folder made with --as consolidated")
        check_same_vocabulary(stored, vocabulary)
        if stored.recipe.data.tags != recipe.data.tags:
            raise UserError(
                f"its 'data.tags' is {stored.recipe.data.tags}, the recipe's {recipe.data.tags}: give the "
                "same"
            )
        for direction in recipe.trained:
            check_direction(stored.recipe, stored.kind, direction)
    except UserError as error:
        raise UserError(f"'training.teacher.model' is {teacher.model}: {error}") from None


def _find(path: Path, run: Path | None) -> Stored:
    """Find the teacher at a path; if it is a run, the checkpoint from which the student ``run`` has learned.

    The teacher may have been trained further since then. Raises UserError if that checkpoint is gone.
    """
    newest = find_model(path)
    noted = None if run is None else read_origin(run).get(TEACHER)
    if noted is None or weights_digest(newest.weights_in) == noted:
        return newest
    for checkpoint in reversed(list_checkpoints(path)):
        if weights_digest(checkpoint) == noted:
            return replace(newest, weights_in=checkpoint)
    raise UserError(
        f"it has other weights than those from which {run} has learned: put them back, or write to another "
        "folder with --out"
    )


def load_teacher(recipe: Recipe, vocabulary: int, topology: Topology, run: Path | None = None) -> Teacher:
    """Load the recipe's whole teacher onto this rank's device, in the type of the training.

    It is the one that is noted in the ``run``, so that all ranks load the same checkpoint, even while the
    teacher still trains. The returned function computes its logits [N, V] for a batch at N flat positions of
    decoder inputs.
    """
    assert recipe.training.teacher is not None
    stored, half = _find(recipe.training.teacher.model, run), check_precision(recipe)
    dtype = torch.float32 if half is None else torch.float16 if half == "fp16" else torch.bfloat16
    model = build_model(stored.recipe, vocabulary, read_weights(stored), topology.device, dtype=dtype)
    assert isinstance(model, Transformer)
    languages, directions = (each.to(topology.device) for each in _numbers(recipe, stored))

    def logits(source: Tensor, decoder_input: Tensor, ids: SentenceIds, index: Tensor) -> Tensor:
        theirs = SentenceIds(languages[ids.source], languages[ids.target], directions[ids.direction])
        hidden, _ = model.states(source, decoder_input, theirs)
        return project(hidden.flatten(0, 1)[index], model.embedding.tokens, model.topology)

    return logits


def _numbers(recipe: Recipe, stored: Stored) -> tuple[Tensor, Tensor]:
    """Return the teacher's ids of the recipe's languages and directions.

    Languages and directions that are not trained get the id 0, which is never used.
    """
    languages, trained = recipe.languages, recipe.trained
    known = {code for each in trained for code in (each.source, each.target)}
    codes = [stored.recipe.languages.id(code) if code in known else 0 for code in languages.codes]
    directions = []
    for each in languages.directions:
        if each not in trained:
            directions.append(0)
            continue
        other = check_direction(stored.recipe, stored.kind, each)
        theirs = with_direction(stored.recipe, stored.kind, each)
        directions.append(theirs.direction_id(other or each))
    return torch.tensor(codes), torch.tensor(directions)

"""The teacher of ``training.teacher``: find it, compare it with the recipe, and load it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.stored import READABLE, Stored, find_model, read_weights
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import build_model, check_direction, with_direction
from lsmoe_ds.methods.taught import Teacher
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.layers import project
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import check_precision
from lsmoe_ds.training.start_from import check_same_vocabulary


def check_teacher(recipe: Recipe, vocabulary: Path) -> None:
    """Raise UserError unless the recipe's teacher, if it has one, reads the same text and vocabulary."""
    if (teacher := recipe.training.teacher) is None:
        return
    try:
        stored = find_model(teacher.model)
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


def load_teacher(recipe: Recipe, vocabulary: int, topology: Topology) -> Teacher:
    """Load the recipe's whole teacher onto this rank's device, in the type of the training.

    The returned function computes its logits [N, V] for a batch at N flat positions of decoder inputs.
    """
    assert recipe.training.teacher is not None
    stored, half = find_model(recipe.training.teacher.model), check_precision(recipe)
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

"""Start a training with the weights of a converted folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lsmoe_ds.checkpoint.run_folder import check_start
from lsmoe_ds.checkpoint.stored import PROVENANCE, Stored, find_model, read_weights
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, read_fields, sha256
from lsmoe_ds.inference.load import empty_model
from lsmoe_ds.model.build import outline
from lsmoe_ds.model.initialization import drawn
from lsmoe_ds.model.methods import check_holders, same_methods
from lsmoe_ds.notices import listed
from lsmoe_ds.parallel.parameters import global_names, named_state
from lsmoe_ds.parallel.topology import Topology


def added_methods(recipe: Recipe, stored: Stored) -> list[str]:
    """List the methods that a recipe adds to the model from which its training starts."""
    before = {method.name for method in stored.recipe.model.methods}
    return [method.name for method in recipe.model.methods if method.name not in before]


def starting_weights(recipe: Recipe, stored: Stored, vocabulary: int) -> Tensors:
    """Return a stored model's weights, with initial values for what the recipe's methods add to it.

    A method that both have may add parameters and masks, too, such as weights that only this recipe learns.
    ``vocabulary`` is the number of tokens.
    """
    weights = Tensors.of(read_weights(stored).tensors)
    model = outline(recipe, vocabulary)
    names = global_names(model, Topology.single())
    new = {
        names[name]: drawn(names[name], value, recipe.training.seed, model.methods)
        for name, value in named_state(model)
        if names[name] not in weights and any(method.owns(names[name]) for method in model.methods)
    }
    return Tensors(weights.entries | new)


def check_start_from(recipe: Recipe, folder: Path, vocabulary: Path) -> None:
    """Raise UserError unless the folder holds weights for this recipe, and for this vocabulary."""
    try:
        check_start(folder)
        stored = find_model(folder)
        check_same_vocabulary(stored, vocabulary)
        if (labels := stored.recipe.data.labels) != recipe.data.labels:
            raise UserError(
                f"its 'data.labels' are {listed(labels or ['none'])}: give the same in this order"
            )
        size = Vocabulary.load(vocabulary).size
        _check_same_model(recipe, stored, size, starting_weights(recipe, stored, size))
        if wrong := damage(
            stored.home, read_fields(stored.home / PROVENANCE, files=dict)["files"], verify=True
        ):
            raise UserError(f"{stored.home} is damaged: {wrong}")
    except UserError as error:
        raise UserError(f"'training.start_from' is {folder}: {error}") from None


def check_same_vocabulary(stored: Stored, vocabulary: Path) -> None:
    """Raise UserError unless a stored model has the prepared ``vocabulary``."""
    if sha256(stored.vocabulary) != sha256(vocabulary):
        raise UserError(
            f"its vocabulary is not the prepared one: set data.vocabulary.file to {stored.vocabulary} and "
            "prepare again"
        )


def _check_same_model(recipe: Recipe, stored: Stored, vocabulary: int, weights: Tensors) -> None:
    """Raise UserError unless the weights fit the recipe's model. Different languages are reported first."""
    for method, old in same_methods(stored.recipe, recipe):
        method.check_takes_over(old)
    try:
        empty_model(recipe, vocabulary, weights, Topology.single())
    except UserError as error:
        before, now = (set(each.languages.directions) for each in (stored.recipe, recipe))
        if before == now:
            raise
        lacks = "the recipe lacks " + listed(map(str, sorted(before - now))) if before - now else ""
        new = "it was not trained on " + listed(map(str, sorted(now - before))) if now - before else ""
        raise UserError(
            "layers of the model know its directions, and "
            f"{' and '.join(each for each in (lacks, new) if each)}: give the recipe the same "
            "data.directions, start from a folder of one direction (--as dense), or add languages with --as "
            f"grown ({error})"
        ) from None
    check_holders(stored.recipe, recipe)
    for method, old in same_methods(stored.recipe, recipe):
        was, now_is = old.holdings(stored.recipe.languages), method.holdings(recipe.languages)
        if list(was.items()) != list(now_is.items()):
            raise UserError(
                f"its rows of '{method.name}' belong to {_held(was)}, the recipe's to {_held(now_is)}: "
                "languages would get the rows of others"
            )


def _held(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{code} {count}" for code, count in rows.items()) or "none"

"""Fix the resource groups of a recipe's languages: replace thresholds by lists of languages."""

from __future__ import annotations

from pathlib import Path

from lsmoe_ds.config.file import validate
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.comparison import MANIFEST
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import GROUPS
from lsmoe_ds.errors import UserError


def with_listed_groups(recipe: Recipe) -> Recipe:
    """Replace the thresholds of ``data.groups`` by the lists of languages that they yield.

    Reads the prepared data; a recipe whose groups are lists is returned as it is. Raises UserError if the
    data are not prepared, and if a method does not fit the groups.
    """
    if recipe.data.groups.listed:
        return recipe
    if recipe.model.task != "translate":
        raise UserError(
            "the model depends on resource groups, but labelled text has no bitexts to count: list the "
            "languages of each group in 'data.groups'"
        )
    if not (recipe.prepared / MANIFEST).is_file():
        raise UserError(
            "the model depends on resource groups, but 'data.groups' has thresholds and there is no prepared "
            f"data in {recipe.prepared}: run 'lsmoe data prepare' on the recipe, or list the languages of "
            "each group"
        )
    found = PreparedData.of(recipe).language_groups()
    members = {name: [code for code, group in found.items() if group == name] for name in GROUPS}
    value = recipe.model_dump(mode="json", exclude_none=True)
    value["data"]["groups"] = {name: codes for name, codes in members.items() if codes}
    at = f"recipe {recipe.name}, with the groups of its prepared data"
    return validate(Recipe, value, Path(at), {})

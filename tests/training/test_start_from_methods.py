"""A training adds methods to the model from which it starts."""

from __future__ import annotations

from pathlib import Path

from support import starts
from support.starts import first_steps, recipe_from, short_recipe

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.training import start

one, root = starts.one, starts.root  # fixtures


def with_matrices(root: Path, recipe: Recipe) -> Recipe:
    value = recipe.model_dump(mode="json", exclude_none=True)
    value["model"]["low_rank"] = {"rank": 2, "at": "attention"}
    return Recipe.model_validate(value)


def test_a_method_may_be_added(pool, root, one, tmp_path):
    recipe = with_matrices(root, recipe_from(root))
    start.check(recipe, tmp_path / "run")
    found = pool.run(1, first_steps, recipe, tmp_path / "run")[0]
    assert found["said"] == [f"starting from {root / 'model'}, which is given low_rank"]
    assert found["losses"][0] == one["losses"][0], "its matrices begin at zero"
    assert found["losses"][1] != one["losses"][1]
    assert found["weights"].keys() - one["weights"].keys() == {
        name for name in found["weights"] if "_low_rank." in name
    }


def test_a_recipe_may_say_of_the_model_only_what_it_adds(root, tmp_path):
    matrices = {"low_rank": {"rank": 2, "at": "attention"}}
    recipe = load_recipe(short_recipe(root, tmp_path / "short.yaml", model=matrices))
    assert recipe.model == with_matrices(root, recipe_from(root)).model
    assert load_recipe(short_recipe(root, tmp_path / "short.yaml"), ["model.low_rank.rank=2"]).model.low_rank

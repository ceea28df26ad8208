"""A small study and the prepared data of its recipe."""

from __future__ import annotations

from pathlib import Path

from lsmoe_ds.data.prepare import prepare
from support.small_run import make_recipe, write_corpus


def study_file(**changes) -> dict:
    value = {
        "name": "pair",
        "recipe": "base.yaml",
        "seeds": [3],
        "baseline": "naive",
        "evaluate": {"beam": 2, "limit": 4},
        "members": {
            "naive": {"title": "Naive"},
            "fd": {
                "set": {"model": {"low_rank": {"rank": 2, "fuse_distillation": True}}},
                "routes": ["specific", "shared"],
            },
        },
    }
    return {**value, **changes}


def prepared_base(folder: Path) -> Path:
    """Prepare data, and write the recipe base.yaml."""
    write_corpus(folder)
    recipe = make_recipe(folder, None, None, stage=0)
    recipe.training.steps, recipe.training.log_every = 4, 2
    (folder / "base.yaml").write_text(recipe.to_yaml())
    prepare(recipe)
    return folder

"""Train small encoders of transformers that tag words or find answers."""

from __future__ import annotations

import pytest

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.directions import Direction
from support.host_runs import trained
from support.small_encoder import encoder_recipe, write_encoder, write_names, write_questions

DE = Direction("de", "de")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders-training")
    write_names(folder / "names", 60)
    write_questions(folder / "questions", 40)
    for kind, task in (("XLMRoberta", "tag"), ("Bert", "answer")):
        write_encoder(folder / task, kind)
        prepare(recipe_of(folder, task))
    return folder


def recipe_of(folder, task: str, stage: int = 0, steps: int = 4, **changes) -> Recipe:
    """Return a recipe of LMS with fuse distillation, language-wise at the feed-forwards."""
    low_rank = {"rank": 2, "index": "language", "at": "feed_forward", "fuse_distillation": True}
    recipe = encoder_recipe(folder, folder / task, task, stage, **(low_rank | changes))
    recipe.training.trainable, recipe.training.steps = "all", steps
    recipe.training.log_every, recipe.training.checkpoint_every = 1, 2
    recipe.training.validate_every, recipe.training.keep = 2, 9
    return recipe


@pytest.fixture(scope="module", params=("tag", "answer"))
def task(request):
    return request.param


@pytest.fixture(scope="module")
def run(pool, base, task):
    return trained(pool, recipe_of(base, task), base / f"run-{task}")

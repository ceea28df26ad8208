"""Every method trains, translates, is scored, converted and grown with the tags of both languages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.loops import loop
from support.small_run import TARGET_TOP2, make_recipe, write_corpus

from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.methods.low_rank.settings import LowRank

EN_DE = Direction("en", "de")
SENTENCE = {"routing": "sentence", "experts": 4, "every": 2, "top_k": 2}
SHARED = {
    "routing": "static",
    "task": "target",
    "experts": 3,
    "every": 1,
    "top_k": 1,
    "fuse_distillation": True,
}
METHODS: dict[
    str, tuple[dict[str, Any] | None, dict[str, Any], tuple[str, ...]]
] = {  # experts, other settings, dense routes
    "dense": (None, {}, ("specific",)),
    "task": (TARGET_TOP2, {}, ("specific",)),
    "sentence": (SENTENCE, {}, ()),
    "fuse distillation": (SHARED, {}, ("specific", "shared")),
    "LMS": (None, {"low_rank": LowRank(rank=4, fuse_distillation=True)}, ("specific", "shared")),
    "CLSR": (None, {"clsr": Clsr(budget=0.3)}, ()),
}


def recipe_of(folder: Path, name: str) -> Recipe:
    experts, others, _ = METHODS[name]
    recipe = make_recipe(folder, experts, experts)
    data = recipe.data.model_copy(update={"tags": "source-target", "name": "small"})
    model = recipe.model.model_copy(update=others)
    training = recipe.training.model_copy(update={"validate_every": 2, "learning_rate": 0.01})
    return recipe.model_copy(
        update={"name": name.replace(" ", "-"), "data": data, "model": model, "training": training}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tags")
    write_corpus(path)
    prepare(recipe_of(path, "dense"))
    return path


@pytest.mark.parametrize("name", METHODS)
def test_a_method(pool, folder, tmp_path, name):
    recipe, run = recipe_of(folder, name), tmp_path / "run"
    pool.run(1, loop, recipe, run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(each["dev_loss"]) for each in records if "dev_loss" in each) and any(
        "dev_loss" in each for each in records
    )

    table = evaluate(run, beam=2, limit=2, progress=False)
    assert {score.sentences for score in table.directions} == {2} and len(table.directions) == 4
    model, lines = load(run, "cpu"), PreparedData.of(recipe).text(EN_DE, "test")[0][:3]
    assert len(list(translate(model, EN_DE, lines))) == 3
    for route in METHODS[name][2]:
        for kind in ("dense", "huggingface", "ctranslate2"):
            record = convert(run, kind, EN_DE, tmp_path / f"{kind}-{route}", check=6, route=route)
            assert record["sentences"] == record["same_translations"] == 6, (kind, route)
            assert record.get("largest_logit_difference", 0.0) <= 1e-4
        dense = load_engine(tmp_path / f"dense-{route}")
        assert dense.recipe.data.tags == "source-target"
    grown = convert(run, "grown", None, tmp_path / "grown", check=6, overrides=["data.languages=[de,fr,nl]"])
    assert grown["sentences"] == grown["same_translations"]
    assert load_engine(tmp_path / "grown").recipe.data.tags == "source-target"


def test_losses_of_experts_count_the_tags_that_are_given(pool, folder, tmp_path):
    """A single expert gets all tokens with all probability: the balance loss of each layer is its weight,
    0.01.
    """
    recipe = recipe_of(folder, "task")
    one = MoE(routing="token", experts=1, every=1, top_k=1)
    sides = {
        side: getattr(recipe.model, side).model_copy(update={"moe": one}) for side in ("encoder", "decoder")
    }
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=sides)})
    pool.run(1, loop, recipe, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [record["balance"] for record in records if "balance" in record]
    assert found and found == pytest.approx([(2 + 3) * 0.01] * len(found), rel=1e-5)

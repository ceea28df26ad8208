"""Every DeepSpeed configuration that comes with the project trains, and gives what the plain one gives."""

from __future__ import annotations

import json

import pytest
from test_sameness import VOCABULARY, recipe_for, steps_of

from lsmoe_ds.config import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.shipped import ROOT as PROJECT
from lsmoe_ds.training.engine import engine_config

CONFIGS = sorted(path.name for path in (PROJECT / "ds_configs").glob("*.json"))


def losses(topology, recipe):
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    steps = steps_of(recipe, topology.data_rank, topology.data)
    results = [train_step(engine, step, i + 1, recipe, topology) for i, step in enumerate(steps)]
    dtype = str(next(engine.module.parameters()).dtype)
    engine.destroy()
    return [result.loss for result in results], dtype


def with_config(name: str, expert: int = 1) -> Recipe:
    recipe = recipe_for("mixed", 1, expert, 1)
    return Recipe.model_validate({**recipe.model_dump(exclude_none=True), "deepspeed": f"ds_configs/{name}"})


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_on_two_ranks(pool, name):
    (wanted, _), *_ = pool.run(1, losses, with_config("zero0.json"))
    (found, dtype), (other, _) = pool.run(2, losses, with_config(name, expert=2), expert=2)
    assert found == other
    assert ("bfloat16" in dtype) == name.startswith("bf16")
    assert found == pytest.approx(wanted, rel=2e-2 if name.startswith("bf16") else 1e-5)
    assert found[-1] < found[0]


def test_the_named_kinds_are_there():
    assert {"zero0.json", "zero1.json", "zero2.json", "bf16_zero1.json", "bf16_zero2.json"} <= set(CONFIGS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "asks for ZeRO stage 3: 0, 1 and 2 are supported"),
        ({"gradient_clipping": 1.0}, "sets 'gradient_clipping', which the recipe decides by training.clip"),
        ({"train_batch_size": 8}, "sets 'train_batch_size', which the recipe decides by data.batch"),
    ],
)
def test_what_contradicts_the_recipe_is_refused(config, message):
    recipe = recipe_for("mixed", 1, 1, 1).model_copy(update={"deepspeed": json.loads(json.dumps(config))})
    with pytest.raises(UserError, match=message):
        engine_config(recipe, Topology())

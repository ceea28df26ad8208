"""Start trainings from a converted folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.checkpoint.stored import find_model, read_weights, write_folder
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe, make_run

# (tensor, expert, world, ZeRO stage, bfloat16)
ONE, FOUR, FOUR_ZERO, FOUR_BF16 = (
    (1, 1, 1, 0, False),
    (2, 2, 4, 0, False),
    (2, 2, 4, 1, False),
    (2, 2, 4, 1, True),
)


def first_steps(topology: Any, recipe: Recipe, run: Path) -> dict[str, Any]:
    """Train; return the weights before the first step, the float32 copies as (name, start, values), losses,
    and what was said.
    """
    from lsmoe_ds.parallel import deepspeed_engine
    from lsmoe_ds.parallel.parameters import global_names, partition_dimension
    from lsmoe_ds.training import loop as module

    true_step, true_say = module.train_step, module.Monitor.say
    kept: dict[str, Any] = {"losses": [], "said": []}

    def step(engine: Any, batch: Any, number: int, *arguments: Any) -> Any:
        if not kept["losses"]:
            names = global_names(engine.module, topology)
            local = {parameter: names[name] for name, parameter in engine.module.named_parameters()}
            kept["weights"] = {
                name: (parameter.detach().float().numpy().copy(), partition_dimension(parameter))
                for parameter, name in local.items()
            }
            kept["copies"] = [
                (
                    local[piece.parameter],
                    piece.start,
                    piece.values.detach().view(-1)[piece.offset : piece.offset + piece.length].numpy(),
                )
                for piece in deepspeed_engine.optimizer_pieces(engine)
            ]
            kept["copies"] = [(name, begin, values.copy()) for name, begin, values in kept["copies"]]
            kept["moved"] = any(
                state["exp_avg"].any()
                for state in deepspeed_engine.optimizer_states(engine).values()
                if "exp_avg" in state
            )
        result = true_step(engine, batch, number, *arguments)
        kept["losses"].append(result.loss)
        return result

    module.train_step = step
    module.Monitor.say = lambda self, text: kept["said"].append(text)
    try:
        if topology.is_main:
            open_run(recipe, run, recipe.prepared / "vocabulary.model")
        module.train(recipe, run, topology)
    finally:
        module.train_step, module.Monitor.say = true_step, true_say
    return kept


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    value = recipe.model_dump(mode="json", exclude_none=True)
    for name, section in sections.items():
        value[name] = {**value[name], **section}
    return Recipe.model_validate(value)


def recipe_from(root: Path, layout: tuple = ONE, folder: str = "model") -> Recipe:
    tensor, expert, _, stage, bf16 = layout
    recipe = make_recipe(root, TOKEN_TOP2, TARGET_TOP2, tensor=tensor, expert=expert, stage=stage, bf16=bf16)
    vocabulary = {"size": 140, "file": root / "model" / "vocabulary.model"}
    training = {"start_from": root / folder, "steps": 3, "log_every": 1, "learning_rate": 0.01}
    return changed(recipe, data={"vocabulary": vocabulary}, training=training)


@pytest.fixture(scope="module")
def root(pool, tmp_path_factory):
    """Make a trained model: as the folder ``model``, as its run, and as a dense one; data prepared with its
    vocabulary.
    """
    root = tmp_path_factory.mktemp("start")
    run, _ = make_run(pool, root, TOKEN_TOP2, TARGET_TOP2)
    run.rename(root / "trained")
    stored = find_model(root / "trained")
    made = {"kind": "consolidated", "step": 2}
    write_folder(root / "model", read_weights(stored).tensors, stored.recipe, stored.vocabulary, made)
    prepare(recipe_from(root))
    return root


@pytest.fixture(scope="module")
def one(pool, root):
    return pool.run(1, first_steps, recipe_from(root), root / "one")[0]


def short_recipe(root: Path, file: Path, **sections: Any) -> Path:
    """Write a recipe that leaves out what the folder knows."""
    value = yaml.safe_load(recipe_from(root).to_yaml())
    value.pop("model")
    for key in ("vocabulary", "tags"):
        value["data"].pop(key)
    for name, section in sections.items():
        value[name] = {**value.get(name, {}), **section} if isinstance(section, dict) else section
    file.write_text(yaml.safe_dump(value))
    return file

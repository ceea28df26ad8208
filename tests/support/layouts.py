"""Train a small run in several layouts, and read what it recorded and saved."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lsmoe_ds.checkpoint.optimizer import open_optimizer
from lsmoe_ds.checkpoint.reading import read_checkpoint
from support.loops import loop
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe

# (tensor, expert, world, ZeRO stage)
ONE, EXPERTS, TENSOR, BOTH, FOUR = (1, 1, 1, 0), (1, 2, 2, 0), (2, 1, 2, 1), (2, 2, 4, 2), (1, 4, 4, 1)
EIGHT = {"experts": 8}  # in no layout as many on a rank as there are ranks that share them, unlike 4


def recipe_in(folder, layout, steps: int = 20, bf16: bool = False):
    tensor, expert, _, stage = layout
    sides = TOKEN_TOP2 | EIGHT, TARGET_TOP2
    recipe = make_recipe(folder, *sides, tensor=tensor, expert=expert, stage=stage, bf16=bf16)
    training = {
        "steps": steps,
        "checkpoint_every": 10,
        "log_every": 1,
        "max_grad_norm": 1.0,
        "keep": 2,
        "learning_rate": 0.01,
    }
    batch = recipe.data.batch.model_copy(update={"tokens": 96, "count": 4})
    return recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update=training),
            "data": recipe.data.model_copy(update={"batch": batch}),
            "deepspeed": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}},
        }
    )


def train(pool, recipe, run, layout):
    """Train a recipe on the processes of a layout."""
    tensor, expert, world, _ = layout
    assert pool.run(world, loop, recipe, run, tensor=tensor, expert=expert) == [None] * world


def load_and_save(topology, recipe, checkpoint, run):
    """Load a checkpoint and save it without a step between."""
    from lsmoe_ds.checkpoint import saving as checkpoints
    from lsmoe_ds.data.prepared import PreparedData
    from lsmoe_ds.training.engine import build_engine

    engine = build_engine(recipe, PreparedData.open(recipe.prepared).vocabulary.size, topology)
    state = checkpoints.load(engine, checkpoint, topology)
    with checkpoints.Saver(run, topology, keep=1) as saver:
        saver.save(engine, state["step"], state["position"])


def losses(run) -> list[float]:
    """Return the losses that a run recorded."""
    return [
        line["loss"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]


def states(checkpoint, shapes) -> dict[str, dict[str, torch.Tensor]]:
    from lsmoe_ds.checkpoint.reading import read_checkpoint

    state, weights = open_optimizer(checkpoint), read_checkpoint(checkpoint).weights
    return {name: {**state.whole(name, shape), "weight": weights[name]} for name, shape in shapes.items()}


def pruned_of(checkpoint) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Return the mask of each pruned matrix, with its values and all that the optimizer holds of it."""
    weights, state = read_checkpoint(checkpoint).weights, open_optimizer(checkpoint)
    found = {}
    for name in [name for name in weights if name.endswith("_mask")]:
        matrix = name.removesuffix("_mask")
        held = state.whole(matrix, weights.shape(matrix))
        found[matrix] = weights[name], {"weight": weights[matrix], **held}
    return found


def shapes_in(checkpoint: Path) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in read_checkpoint(checkpoint).weights.items()}

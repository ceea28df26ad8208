"""Take steps of the engine's optimizer, with torch's own loss to compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Batch
from lsmoe_ds.languages import PAD
from lsmoe_ds.methods.context import Route
from lsmoe_ds.model.transformer import Transformer
from support.sameness import VOCABULARY, recipe_for, steps_of


def recipe_of(
    routing: str = "dense",
    tensor: int = 1,
    expert: int = 1,
    stage: int = 0,
    clip: float = 0.5,
    decay: float = 0.1,
) -> Recipe:
    """Make a recipe with a peak rate of 0.01 after 2 steps of warmup."""
    recipe = recipe_for(routing, tensor, expert, stage, clip)
    recipe.training.weight_decay = decay
    return recipe


def take_steps(topology, recipe: Recipe):
    """Return each group's rates in both steps, its other settings, the steps' results, and the weights."""
    from lsmoe_ds.parallel.parameters import global_names
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    rates, results = [], []
    for number, step in enumerate(steps_of(recipe, topology.data_rank, topology.data), start=1):
        results.append(train_step(engine, step, number, recipe, topology))
        rates.append([group["lr"] for group in engine.optimizer.param_groups])
    settings = ("betas", "eps", "weight_decay")
    groups = [tuple(group[name] for name in settings) for group in engine.optimizer.param_groups]
    names = global_names(engine.module, topology)
    parameters = engine.module.named_parameters()
    weights = {names[name]: parameter.detach().float().numpy().copy() for name, parameter in parameters}
    engine.destroy()
    return rates, groups, [(r.learning_rate, r.loss, r.metrics["nll"], r.grad_norm) for r in results], weights


def smoothed(model: Transformer, batch: Batch, smoothing: float, route: Route = "specific") -> torch.Tensor:
    """Return the label-smoothed cross-entropy of a batch, summed over its tokens, by torch's own."""
    logits = model.logits(batch.source, batch.decoder_input, batch.ids, route)
    return F.cross_entropy(
        logits.flatten(0, 1),
        batch.labels.flatten(),
        ignore_index=PAD,
        label_smoothing=smoothing,
        reduction="sum",
    )

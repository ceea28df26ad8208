"""Read the gradients of one step, whichever way a rank computes its experts."""

from __future__ import annotations

import math
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import PairBatch, Step
from lsmoe_ds.languages import PAD
from lsmoe_ds.moe import experts as module
from support.sameness import VOCABULARY, draw_masks, ragged_batch, recipe_for


def of_one_direction(generator: torch.Generator, recipe: Recipe, sentences: int, number: int) -> PairBatch:
    """Make a batch whose sentences all have one target language, and so the same experts."""
    batch, direction = ragged_batch(generator, recipe, sentences), recipe.languages.directions[number]
    batch.source_language.fill_(recipe.languages.id(direction.source))
    batch.target_language.fill_(recipe.languages.id(direction.target))
    batch.direction.fill_(number)
    return batch


def step_of(recipe: Recipe, rank: int, ranks: int) -> Step:
    """Make a step in which the first two ranks translate into German, the others into English."""
    generator = torch.Generator().manual_seed(13)
    batches = [of_one_direction(generator, recipe, 2 + i, number) for i, number in enumerate((0, 0, 1, 1))]
    tokens = sum(batch.target_tokens for batch in batches)
    source_tokens = sum(int((batch.source != PAD).sum()) for batch in batches)
    return Step(batches[rank::ranks], tokens, source_tokens, 0, [])


def static(expert: int, stage: int, chunks: int = 1) -> Recipe:
    """Route statically by target language, so that experts of German are on one rank of two, and those of
    English on the other.
    """
    recipe = recipe_for("target", 1, expert, stage)
    for side in (recipe.model.encoder, recipe.model.decoder):
        moe = side.moe.model_copy(update={"routing": "static", "experts": 4, "every": 1, "chunks": chunks})
        side.moe = moe
    return recipe


def gradients(topology, recipe: Recipe, with_kernel: tuple[int, ...], noted: bool = False, idle: bool = True):
    """Return loss and norm, whole gradients by global name, the rows of each layer's experts, and, if
    ``noted``, the order in which gradients arrived.

    The ranks ``with_kernel`` have a grouped product: torch's own for CPUs. Without ``idle``, experts without
    rows do not run, and have no gradient.
    """
    from deepspeed.utils import safe_get_full_grad

    from lsmoe_ds.parallel.parameters import global_names, partition_dimension
    from lsmoe_ds.training.engine import build_engine, train_step

    rows, order, found = [], [], {}
    true_forward = module.Experts.forward

    def forward(self, given, *arguments, **options):
        rows.append(len(given))
        return true_forward(self, given, *arguments, **options)

    has_kernel = topology.rank in with_kernel
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module.Experts, "forward", forward))
        stack.enter_context(mock.patch.object(module, "has_kernel", lambda device, dtype: has_kernel))
        engine = build_engine(recipe, VOCABULARY, topology)
        draw_masks(engine.module, topology)
        names = global_names(engine.module, topology)
        for _, layer in engine.module.moe_layers():
            layer.deepspeed_moe.experts.run_idle = idle
        for name, parameter in engine.module.named_parameters():
            if noted:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
        true_step = engine.step

        def step(*arguments, **options):
            if engine.is_gradient_accumulation_boundary():
                for name, parameter in engine.module.named_parameters():
                    gradient = safe_get_full_grad(parameter)
                    found[names[name]] = (gradient.numpy().copy(), partition_dimension(parameter))
            return true_step(*arguments, **options)

        engine.step = step
        made = step_of(recipe, topology.data_rank, topology.data)
        result = train_step(engine, made, 1, recipe, topology)
        engine.destroy()
    return (result.loss, result.grad_norm), found, rows, order


def norm_of(gradients: dict[str, Tensor]) -> float:
    """Return the norm of all gradients together."""
    return math.sqrt(sum(float(each.double().square().sum()) for each in gradients.values()))

"""A model that is loaded to translate computes what the trained one does in evaluation mode."""

from __future__ import annotations

import pytest
import torch
from support.sameness import VOCABULARY, ragged_batch, recipe_for

from lsmoe_ds.checkpoint.stored import Weights
from lsmoe_ds.config.moe import Capacity
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import build_model
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology


def trained() -> tuple[Recipe, Transformer, Weights]:
    """Return a model whose training would drop and shake values, and its weights by global name."""
    recipe = recipe_for("token", 1, 1, 0)
    recipe.data.vocabulary.size = VOCABULARY
    recipe.training.dropout = recipe.training.attention_dropout = 0.5
    for side in (recipe.model.encoder, recipe.model.decoder):
        side.moe.jitter, side.moe.capacity = 0.9, Capacity(training=0.1)
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    names = global_names(model, Topology.single())
    weights = {names[name]: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return recipe, model, Weights(weights, 7, {})


@torch.no_grad()
def test_a_loaded_model_evaluates():
    recipe, model, weights = trained()
    loaded = build_model(recipe, VOCABULARY, weights, torch.device("cpu"))
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    batch = ragged_batch(torch.Generator().manual_seed(2), recipe, 6)
    arguments = (batch.source, batch.decoder_input, batch.ids)
    first, again, wanted = (
        loaded.logits(*arguments),
        loaded.logits(*arguments),
        model.eval().logits(*arguments),
    )
    real = batch.labels != 1
    assert torch.equal(first, again)
    torch.testing.assert_close(first[real], wanted[real])
    noisy = model.train().logits(*arguments)
    assert not torch.allclose(noisy[real], wanted[real], atol=0.1), "training must differ"


@pytest.mark.parametrize("change", ["missing", "more", "shape"])
def test_weights_of_another_model_are_refused(change):
    recipe, _, weights = trained()
    name = "encoder.1.feed_forward.experts.7.expand.bias"
    if change == "missing":
        weights.tensors.pop(name)
    elif change == "more":
        weights.tensors["encoder.1.feed_forward.experts.8.expand.bias"] = weights.tensors[name]
    else:
        weights.tensors[name] = weights.tensors[name][:-1]
    with pytest.raises(
        UserError,
        match=r"do not belong to the recipe and vocabulary: encoder\.1\.feed_forward\.experts\.[78]\.expand",
    ):
        build_model(recipe, VOCABULARY, weights, torch.device("cpu"))

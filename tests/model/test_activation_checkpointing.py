"""Activation checkpointing changes no loss, gradient, norm or weight, in any layout; it keeps less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.recomputing import both
from support.sameness import UNITS, in_units, recipe_for
from support.small_encoder import built as built_encoder
from support.small_encoder import example as labelled_example
from support.small_encoder import recipe_of as labelled_recipe
from support.small_encoder import write_all
from support.small_host import built, example, host_recipe, write_host

from lsmoe_ds.checkpoint.run_folder import find_changes
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.model.recomputing import as_a_whole, recompute


def recipe_with(routing: str, tensor: int, expert: int, stage: int, optimizer: str = "adam") -> Recipe:
    """Make a recipe with all kinds of random numbers, and without activation checkpointing."""
    base = "dense" if routing == "clsr" else routing
    given = recipe_for(base, tensor, expert, stage).model_dump(exclude_none=True)
    given["model"] |= {"clsr": {"gate": 8}} if routing == "clsr" else {}
    given["training"] |= {"dropout": 0.2, "attention_dropout": 0.2, "optimizer": optimizer}
    for side in ("encoder", "decoder"):
        if (moe := given["model"][side].get("moe")) and moe["routing"] == "token":
            moe["jitter"] = 0.1
    return Recipe.model_validate(given)


CASES = [
    ("dense", 1, 1, 1, 0),
    ("token", 1, 1, 1, 0),
    ("token", 2, 1, 2, 1),
    ("capacity", 2, 1, 2, 2),
    ("chunks", 2, 1, 2, 1),
    ("sentence", 2, 2, 1, 0),
    ("token", 2, 2, 2, 1),
    ("distilled", 2, 2, 2, 0),
    ("lora", 2, 2, 1, 2),
    ("square", 1, 1, 1, 0),
    ("adapters", 2, 1, 1, 0),
    ("clsr", 2, 2, 1, 1),
    ("token", 4, 2, 2, 2),
    ("target", 4, 4, 4, 1),
]


@pytest.mark.parametrize(("routing", "world", "tensor", "expert", "stage"), CASES)
def test_all_is_as_without(pool, routing, world, tensor, expert, stage):
    units = 2 if tensor == world else UNITS
    recipe = in_units(units, recipe_with(routing, tensor, expert, stage))
    for without, again in pool.run(world, both, recipe, tensor=tensor, expert=expert):
        assert again[0] == without[0], "losses and gradient norms"
        for which, what in ((1, "gradient"), (2, "weight")):
            assert again[which].keys() == without[which].keys()
            for name, (value, _) in without[which].items():
                assert (again[which][name][0] == value).all(), f"{what} of {name}"
        assert again[3] == without[3], "random numbers after the steps"
        assert again[4]["layers"] == 2 * without[4]["layers"] > 0
        assert again[4]["notes"] == without[4]["notes"], "each layer's note stands once among those of a step"


class Exchange(torch.autograd.Function):
    """Stands for a collective: it keeps nothing, and notes when it runs."""

    events: list[str] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        Exchange.events.append("forward")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        Exchange.events.append("backward")
        return gradients[0]


@pytest.mark.parametrize("last", [0, 1], ids=["first", "last"])
def test_a_layer_is_computed_again_whole_before_its_backward_pass(last):
    """Though the first gradient needs nothing that was kept, and what is needed comes before the exchange."""

    def layer(x: torch.Tensor) -> torch.Tensor:
        return as_a_whole(Exchange.apply(x.square()) if last else Exchange.apply(x).square())

    x = torch.randn(3, requires_grad=True)
    Exchange.events.clear()
    recompute(layer, [], x).sum().backward()
    assert Exchange.events == ["forward", "forward", "backward"]
    assert torch.equal(x.grad, 2 * x)


def step_of_host(model: torch.nn.Module, inputs: tuple) -> tuple[float, dict[str, torch.Tensor], int]:
    """Return the loss and the gradients of a pass with dropout, and how often the first layer ran."""
    runs = []
    (first,) = (
        module
        for name, module in model.named_modules()
        if name.endswith(("layers.0.self_attn.q_proj", "layer.0.attention.self.query"))
    )
    first.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    torch.manual_seed(9)
    loss = model.train()(*inputs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, sum(runs)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "XLMRoberta", "Bert"])
@pytest.mark.parametrize("methods", [{}, {"rank": 2, "at": "attention"}], ids=["plain", "matrices"])
def test_models_of_transformers_too(tmp_path, kind, methods):
    pytest.importorskip("transformers")
    encoder = kind in ("XLMRoberta", "Bert")
    if encoder:
        recipe = labelled_recipe(write_all(tmp_path), kind, **methods)
    else:
        recipe = host_recipe(tmp_path, write_host(tmp_path / kind, kind), **methods)
    recipe.training.dropout = recipe.training.attention_dropout = 0.2
    found = []
    for again in (False, True):
        recipe.training.activation_checkpointing = again
        model = built_encoder(recipe) if encoder else built(recipe)
        if encoder:
            inputs = labelled_example(recipe).inputs
        else:
            tokens, labels, ids = example(model, [0, 1, 0])
            inputs = tokens, labels, torch.ones_like(tokens), ids
        found.append(step_of_host(model, inputs))
    (loss, gradients, once), (other, others, twice) = found
    assert (once, twice) == (1, 2)
    assert loss == other and gradients.keys() == others.keys() and gradients
    for name, value in gradients.items():
        assert torch.equal(value, others[name]), name


def test_a_resumed_run_may_switch_it():
    before, now = (recipe_with("dense", 1, 1, 0) for _ in range(2))
    now.training.activation_checkpointing = True
    assert list(find_changes(before, now)) == []
    now.training.dropout = 0.3
    assert [key for key, _, _ in find_changes(before, now)] == ["training.dropout"]

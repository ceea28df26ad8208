"""Count what autograd keeps for the backward pass."""

from __future__ import annotations

from unittest import mock

import torch

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology
from support.plans import VOCABULARY
from support.sameness import ragged_batch


def small_batches(recipe: Recipe, dropout: float = 0.1) -> Recipe:
    """Make a recipe wider, with batches of 8 sentences of 32 tokens on each side."""
    given = recipe.model_dump(exclude_none=True)
    given["model"] |= {"hidden": 64, "heads": 2}
    given["data"]["batch"]["tokens"] = 2 * 8 * 32
    given["training"]["dropout"] = dropout
    return Recipe.model_validate(given)


class Kept:
    """Count the bytes of what autograd keeps inside the context, without the model's weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        self.tensors: dict[int, torch.Tensor] = {}  # held, so that no address is used twice

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in self.weights:
            self.tensors[value.untyped_storage().data_ptr()] = value
        return value

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda value: value)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(value.untyped_storage().nbytes() for value in self.tensors.values())

    def with_largest(self, layers: list[Kept], logits: int) -> int:
        """Return the bytes with those of the largest of ``layers`` alone, which are computed again, in the
        place of the ``logits`` if they are more.
        """
        for within in layers:
            for place in within.tensors.keys() & self.tensors.keys():
                del within.tensors[place]
        return self.bytes - logits + max(logits, *(within.bytes for within in layers))


def kept_by_autograd(recipe: Recipe) -> int:
    """Return the bytes that a batch of :func:`small_batches` leaves for its backward pass.

    With activation checkpointing those of what is outside the layers, of their inputs, and of the largest
    layer in the place of the logits, if that is more.
    """
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    generator = torch.Generator().manual_seed(4)
    source, decoder_input = (torch.randint(4, VOCABULARY, (8, 32), generator=generator) for _ in range(2))
    ids = ragged_batch(generator, recipe, 8).ids
    layers: list[Kept] = []
    true_start = model.start

    def start(*arguments):
        state = true_start(*arguments)
        for cache in state.cross:  # which layers read that are computed again
            outside.keep(cache[0])
            outside.keep(cache[1])
        return state

    def recompute(layer, again, x):
        outside.keep(x)
        with Kept(model) as within:
            outside.keep(y := layer(x))  # an input too
        layers.append(within)
        return y

    if recipe.training.activation_checkpointing:
        model.start = start
    with mock.patch("lsmoe_ds.model.transformer.recompute", recompute), Kept(model) as outside:
        losses = model(source, decoder_input, decoder_input, ids)
        losses.loss + sum(
            record.probabilities.square().sum() + record.squares for record in losses.notes.get("moe", [])
        )
    if not layers:
        return outside.bytes
    assert len(layers) == 2 * len(model.encoder)
    return outside.with_largest(layers, 8 * 32 * VOCABULARY * 4)

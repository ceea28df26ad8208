"""Train with and without activation checkpointing."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from lsmoe_ds.config.recipe import Recipe
from support.sameness import train as train_on_rank


def both(topology: Any, recipe: Recipe) -> list[Any]:
    """Train without and with activation checkpointing, from the same random state; return both results, and
    how often each layer ran and left notes with it.
    """
    from lsmoe_ds.methods.context import LanguageContext
    from lsmoe_ds.model.transformer import Layer
    from lsmoe_ds.parallel import compat

    found = []
    true_forward, true_note = Layer.forward, LanguageContext.note
    for again in (False, True):
        compat.seed_tensor_parallel_random(5 + topology.data_rank, topology.tensor_rank)
        recipe.training.activation_checkpointing = again
        counted = {"layers": 0, "notes": 0}

        def forward(*arguments: Any, **options: Any) -> Any:
            counted["layers"] += torch.is_grad_enabled()  # noqa: B023
            return true_forward(*arguments, **options)

        def note(context: Any, method: str, value: Any) -> None:
            before = len(context.notes.get(method, ()))
            true_note(context, method, value)
            counted["notes"] = max(counted["notes"], before + 1)  # noqa: B023

        with mock.patch.object(Layer, "forward", forward), mock.patch.object(LanguageContext, "note", note):
            results = train_on_rank(topology, recipe)
        state = compat.random_state(topology.tensor)
        found.append((*results, {key: value.tolist() for key, value in state.items()}, counted))
    return found

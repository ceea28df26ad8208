"""Build the model of a recipe: ours, or one of transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.model.base import Model
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology


def build(recipe: Recipe, vocabulary: int, topology: Topology | None = None) -> Model:
    """Build a model with ``vocabulary`` tokens. One of transformers comes with its weights, except on no
    device (:func:`outline`). Raises UserError if they cannot be loaded.
    """
    if recipe.model.huggingface is None:
        return Transformer(recipe, vocabulary, topology)
    from lsmoe_ds.model.host import HostModel, LabellingModel  # needs transformers

    kind = HostModel if recipe.model.task == "translate" else LabellingModel
    return kind(recipe, vocabulary, topology)


def outline(recipe: Recipe, vocabulary: int, topology: Topology | None = None) -> Model:
    """Build the model on no device: names and shapes without weights."""
    with torch.device("meta"):
        return build(recipe, vocabulary, topology)


def buffers_of(recipe: Recipe, vocabulary: int) -> dict[str, Tensor]:
    """Return the buffers of a model as its modules make them, by local name."""
    if recipe.model.huggingface is None:
        return dict(build(recipe, vocabulary).named_buffers())
    from lsmoe_ds.model.host import host_buffers  # needs transformers

    return host_buffers(recipe)

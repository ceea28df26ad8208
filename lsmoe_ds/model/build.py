"""Build the model of a recipe: ours, or one of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.model.base import Model
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology


def build(recipe: Recipe, vocabulary: int, topology: Topology | None = None) -> Model:
    """Build a model with ``vocabulary`` tokens.

    A model of transformers is built with its weights, except on the meta device (:func:`outline`). Raises
    UserError if they cannot be loaded.

    Also disables cuDNN's attention in torch: it makes a new plan for each pair of lengths, which batches
    rarely repeat. On an H200 a step of Transformer-Big with new lengths took at least 325 ms with cuDNN and
    75 to 106 ms with torch's own kernels; steps with known lengths took a seventh less with cuDNN.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if recipe.model.huggingface is None:
        return Transformer(recipe, vocabulary, topology)
    from lsmoe_ds.model.host import HostModel, LabellingModel  # needs transformers

    kind = HostModel if recipe.model.task == "translate" else LabellingModel
    return kind(recipe, vocabulary, topology)


@contextmanager
def made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Build modules inside the context with parameters of this type on this device.

    Otherwise an engine would convert a float32 model in the host's memory, which needs twice the memory of a
    16-bit one. Buffers are not converted.
    """

    def convert(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.dtype == dtype:
            return None
        return nn.Parameter(parameter.detach().to(device, dtype), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(convert)  # type: ignore[arg-type]  # it may return one
    try:
        yield
    finally:
        hook.remove()


def outline(recipe: Recipe, vocabulary: int, topology: Topology | None = None) -> Model:
    """Build the model on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        return build(recipe, vocabulary, topology)


def buffers_of(recipe: Recipe, vocabulary: int) -> dict[str, Tensor]:
    """Return a model's buffers with the values that its modules give them, by local name."""
    if recipe.model.huggingface is None:
        return dict(build(recipe, vocabulary).named_buffers())
    from lsmoe_ds.model.host import host_buffers  # needs transformers

    return host_buffers(recipe)

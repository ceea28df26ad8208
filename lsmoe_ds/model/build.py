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
    """Build a model with ``vocabulary`` tokens. One of transformers comes with its weights, except on no
    device (:func:`outline`). Raises UserError if they cannot be loaded.

    From then on torch leaves out cuDNN's attention: it plans anew for each pair of lengths, and batches
    hardly ever repeat one. On an H200 such a step of Transformer-Big took 325 ms or more by it and 75 to 106
    by torch's own kernels, though steps whose lengths it knew took a seventh less.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if recipe.model.huggingface is None:
        return Transformer(recipe, vocabulary, topology)
    from lsmoe_ds.model.host import HostModel, LabellingModel  # needs transformers

    kind = HostModel if recipe.model.task == "translate" else LabellingModel
    return kind(recipe, vocabulary, topology)


@contextmanager
def made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Make the parameters of modules that are built inside the context in a type and on a device at once.

    A float32 model in the host's memory, which an engine would convert, takes twice the memory of one in 16
    bits. Buffers stay as they are made.
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
    """Build the model on no device: names and shapes without weights."""
    with torch.device("meta"):
        return build(recipe, vocabulary, topology)


def buffers_of(recipe: Recipe, vocabulary: int) -> dict[str, Tensor]:
    """Return the buffers of a model as its modules make them, by local name."""
    if recipe.model.huggingface is None:
        return dict(build(recipe, vocabulary).named_buffers())
    from lsmoe_ds.model.host import host_buffers  # needs transformers

    return host_buffers(recipe)

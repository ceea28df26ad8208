"""Activation checkpointing: keep only the input of a layer, and recompute the rest in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recompute(
    layer: Callable[..., T], again: list[AbstractContextManager[Any]], *arguments: Any, **options: Any
) -> T:
    """Call a layer and keep only its arguments for the backward pass.

    The backward pass runs it again, inside the contexts ``again``, with the same random numbers of torch's
    generator.
    """

    @contextmanager
    def all_of_them() -> Iterator[None]:
        with ExitStack() as entered:
            for each in again:
                entered.enter_context(each)
            yield

    found: T = checkpoint(
        layer,
        *arguments,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), all_of_them()),
        **options,
    )
    return found


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        assert ctx.saved_tensors  # reading them recomputes the layer
        return gradients[0]


def as_a_whole(x: Tensor) -> Tensor:
    """Return a layer's result unchanged; in the backward pass, first recompute the whole layer.

    Otherwise the first gradient that needs a stored tensor would start the recomputation, and only as far as
    it needs. That point may differ between ranks, for instance if one has no padding, and then collectives of
    one rank's forward pass would meet those of another rank's backward pass.
    """
    found: Tensor = _Last.apply(x)
    return found

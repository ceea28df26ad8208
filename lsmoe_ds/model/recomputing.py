"""Activation checkpointing: keep the input of a layer, and compute the rest again in the backward pass."""

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
    """Call a layer, of which only the arguments are kept for the backward pass.

    It runs once more there, inside the contexts ``again``, with the random numbers of torch's generator that
    it drew before.
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
        assert ctx.saved_tensors  # asking for them computes the layer again
        return gradients[0]


def as_a_whole(x: Tensor) -> Tensor:
    """Return the result of a layer unchanged; its backward pass first computes the whole layer again.

    Otherwise the first gradient that needs anything kept would start that, and only as far as it needs.
    Between ranks that would differ, for instance where one has no padding, and their collectives of the
    forward and the backward pass would meet.
    """
    found: Tensor = _Last.apply(x)
    return found

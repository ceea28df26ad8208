"""LaSS: language-specific sub-networks ("Learning Language Specific Sub-network for Multilingual Machine
Translation", 2021; a baseline of "Neuron Specialization").

With the mask M of a sentence's direction a linear layer computes

    y = (M W) x + b

in training and at inference, so a direction reads and updates only its own values of W. M is 1 where the
magnitude of the direction's fine-tuned weight exceeds the k-th smallest magnitude, k = ratio x tensor size.

Masks are buffers that do not train: [D, outputs, inputs] booleans, stored as one bit each in files and one
byte each in memory. A tensor-parallel rank holds the masks of its own part of W. S rows (tokens), D
directions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.methods.base import Draw, Method, direction_like
from lsmoe_ds.methods.context import LanguageContext, Route
from lsmoe_ds.methods.lass.settings import Lass
from lsmoe_ds.methods.sites import LinearSite
from lsmoe_ds.notices import counted
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.collectives import copy_together, sum_together
from lsmoe_ds.parallel.grouped import Groups
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe
    from lsmoe_ds.data.batches import Batch

NAME = "lass"
MASK = "mask"
# How many values of masked weights are computed at once. On a CPU they should fit the cache.
AT_ONCE, AT_ONCE_ON_GPU = 2**18, 2**26


def largest(weight: Tensor, ratio: float) -> Tensor:
    """Mask the values whose magnitude is above the k-th smallest, k = ratio x size; a ratio 0 keeps all."""
    magnitude = weight.detach().float().abs()
    count = round(ratio * magnitude.numel())
    if count == 0:
        return torch.ones_like(magnitude, dtype=torch.bool)
    return magnitude > magnitude.flatten().kthvalue(count).values


class _MultiplyMasked(torch.autograd.Function):
    """Multiply tokens by the masked weight of their direction, x [S, inputs] -> [S, outputs].

    ``masks`` [D, outputs, inputs] are the masks of the directions, and ``groups`` groups tokens by direction.
    Masked weights are computed for about ``AT_ONCE`` values at a time, and again in the backward pass:
    storing them would need a copy of W for each direction.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, masks: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, weight, masks)
        ctx.groups = groups
        rows, y = groups.take(x), []
        for directions, tokens, part in _parts(groups, weight):
            masked = weight * masks[directions]
            y.append(part.multiply(rows[tokens], masked, transpose=True))
        return groups.put(_together(y))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x, weight, masks), groups = ctx.saved_tensors, ctx.groups
        given, rows = groups.take(gradients[0]), groups.take(x)
        grad_x, grad_weight = [], torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for directions, tokens, part in _parts(groups, weight):
            own = masks[directions]
            if ctx.needs_input_grad[0]:
                grad_x.append(part.multiply(given[tokens], weight * own))
            if grad_weight is not None:
                products = part.outer(given[tokens], rows[tokens])
                if len(products) == 1:
                    grad_weight.addcmul_(products[0], own[0].to(weight.dtype))
                else:
                    grad_weight += products.mul_(own).sum(0)
        return groups.put(_together(grad_x)) if grad_x else None, grad_weight, None, None


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parts(groups: Groups, weight: Tensor) -> list[tuple[Tensor | slice, slice, Groups]]:
    """Split the directions into parts whose masked weights are computed at once, each with its tokens."""
    return groups.parts(max(1, (AT_ONCE_ON_GPU if weight.is_cuda else AT_ONCE) // weight.numel()))


class MaskedWeight(nn.Module):
    """The masks of one linear layer, which each call passes as ``base``."""

    mask: Tensor

    def __init__(self, site: LinearSite, directions: int, topology: Topology) -> None:
        super().__init__()
        self.topology, self.split = topology, site.split
        shape = [directions, site.outputs, site.inputs]
        dimension = 1 if site.split == "column" else 2
        shape[dimension] //= topology.tensor
        self.is_packed = False
        self._kept: tuple[int, Tensor] | None = None
        self.register_buffer(MASK, torch.ones(shape, dtype=torch.bool))
        if topology.tensor > 1:
            compat.mark_tensor_parallel(self.mask, dimension)

    def forward(self, base: Any, x: Tensor, context: LanguageContext) -> Tensor:
        """Apply the linear layer ``base`` with masked weights, x [..., inputs] -> [..., outputs]."""
        rows = x.reshape(-1, x.shape[-1])
        groups = context.once((NAME, len(rows)), lambda: self._groups(context, rows))
        group = self.topology.tensor_group if self.topology.tensor > 1 else None
        if group is not None and self.split == "column":
            (rows,) = copy_together((rows,), group)
        if groups.count == 1 and not torch.is_grad_enabled():
            y = F.linear(rows, self._masked(base.weight, groups.first))
        else:
            y = _MultiplyMasked.apply(rows, base.weight, self.mask, groups)
        if group is not None and self.split == "row":
            (y,) = sum_together((y,), group)
        return (y + base.bias).view(*x.shape[:-1], y.shape[-1])

    def _groups(self, context: LanguageContext, rows: Tensor) -> Groups:
        spans = context.spans("pair", len(rows))
        return Groups(spans, len(self.mask), len(rows), rows.device)

    def pack(self) -> None:
        """From now on cache the masked weight of the latest direction; weights must not change after that."""
        self.is_packed = True

    def _masked(self, weight: Tensor, direction: int) -> Tensor:
        """Return the masked weight of a direction."""
        if not self.is_packed:
            return weight * self.mask[direction]
        if self._kept is None or self._kept[0] != direction:
            self._kept = direction, weight * self.mask[direction]
        return self._kept[1]


class LanguageSpecificSubNetworks(Method):
    """Mask the weights of linear layers by direction."""

    name = NAME
    by_direction = True

    section: Lass

    def __init__(self, section: Lass, recipe: Recipe, topology: Topology) -> None:
        super().__init__(section, recipe, topology)
        self.masks: dict[str, MaskedWeight] = {}  # by the name of the linear layer
        self.directions = recipe.languages.directions

    def make(self, site: LinearSite) -> MaskedWeight:
        """Return the masks beside one linear layer."""
        made = MaskedWeight(site, len(self.directions), self.topology)
        self.masks[site.at] = made
        return made

    def initial(self, name: str) -> Draw | None:
        """Keep all weights until :meth:`begin`."""
        return _fill_with_ones if self.owns(name) else None

    def begin(self, model: Any, dev: Callable[[int | None], Iterable[Batch]]) -> str | None:
        """Make the masks from the fine-tuned models."""
        begun, kept = time.perf_counter(), 0
        total = 0
        for number, direction in enumerate(self.directions):
            weights = self._tuned(direction)
            for at, module in self.masks.items():
                name = f"{at}.weight"
                if name not in weights or weights.shape(name) != self._shape(module):
                    raise SharedError(
                        f"the model of {direction} in {self.section.tuned} has no weight {name} of the size "
                        "of this model's: fine-tune the model from which the training starts"
                    )
                try:
                    mask = largest(weights[name], self.section.ratio)
                except UserError as error:  # the file's checksum is verified only when it is read
                    raise SharedError(f"'model.lass.tuned': {error}") from None
                kept, total = kept + int(mask.sum()), total + mask.numel()
                dimension = 0 if module.split == "column" else 1
                own = mask.chunk(self.topology.tensor, dimension)[self.topology.tensor_rank]
                module.mask[number].copy_(own)
        seconds = time.perf_counter() - begun
        return (
            f"lass: masks of {counted(len(self.directions), 'direction')} keep {kept / max(total, 1):.1%} of "
            f"the weights, in {counted((total + 7) // 8, 'byte')}, made in {seconds:.1f} s"
        )

    def _tuned(self, direction: Direction) -> Tensors:
        try:
            return Tensors.of(read_weights(find_model(self.section.tuned / str(direction))).tensors)
        except UserError as error:
            raise SharedError(f"'model.lass.tuned': {error}") from None

    def _shape(self, module: MaskedWeight) -> tuple[int, ...]:
        """Return the shape of the whole weight that a module masks."""
        shape = list(module.mask.shape[1:])
        shape[0 if module.split == "column" else 1] *= self.topology.tensor
        return tuple(shape)

    def language_rows(self, name: str, width: int) -> dict[str, slice]:
        return {str(direction): slice(i, i + 1) for i, direction in enumerate(self.directions)}

    def holder_like(self, new: str, known: Collection[str], like: str | None) -> str | None:
        """Return the direction whose sub-network a new direction copies (:func:`direction_like`)."""
        return direction_like(new, known, like)

    def merge_at(
        self, weights: Tensors, at: str, direction: Direction | None, route: Route
    ) -> dict[str, LazyTensor]:
        """Return the weight with the direction's mask."""
        assert direction is not None
        number = self.recipe.languages.direction_id(direction)
        name, mask = f"{at}.weight", f"{at}_{NAME}.{MASK}"
        return {name: LazyTensor(weights.shape(name), lambda: weights[name] * weights[mask][number])}


def _fill_with_ones(value: Tensor, generator: Generator) -> None:
    value.fill_(1)

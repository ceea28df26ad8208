"""Neuron Specialization: masks of hidden units for each direction ("Neuron Specialization: Leveraging
Intrinsic Task Modularity for Multilingual Machine Translation", 2024).

With the mask m of a sentence's direction its feed-forwards compute

    relu(m (x W_1 + b_1)) W_2 + b_2          remove: units
    relu(m (x W_1) + b_1) W_2 + b_2          remove: rows (equation 3; so does the authors' code)

in training and at inference. In training, a direction therefore updates only the rows of W_1 that its mask
keeps, and under ``units`` only those of W_2. All other parameters are shared.

Masks are buffers that do not train: [D, F] booleans, stored as one bit each in files. A tensor-parallel rank
holds the masks of its own units. B sentences, T positions, D directions, F units.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.shapes import FEED_FORWARD
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import SharedError
from lsmoe_ds.methods.base import Draw, Method, direction_like
from lsmoe_ds.methods.context import LanguageContext, Route
from lsmoe_ds.methods.findings import Findings
from lsmoe_ds.methods.neurons.analysis import find_overlaps
from lsmoe_ds.methods.neurons.recording import record
from lsmoe_ds.methods.neurons.selection import at_random, most_active, relatives
from lsmoe_ds.methods.neurons.settings import Neurons, Removed, kept_at_random
from lsmoe_ds.methods.sites import UnitsSite
from lsmoe_ds.notices import counted, listed
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe
    from lsmoe_ds.data.batches import Batch

NAME = "neurons"
MASK = "mask"


class _Silence(torch.autograd.Function):
    """Multiply hidden units by masks, hidden [B, T, F] and kept [B, 1, F].

    The gradient passes unchanged: the relu that follows has gradient 0 where its input is 0.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, kept: Tensor) -> Tensor:
        return hidden * kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class UnitMask(nn.Module):
    """The masks of one feed-forward's units, [D, F / t] on each of t tensor-parallel ranks."""

    mask: Tensor

    def __init__(self, directions: int, units: int, remove: Removed, topology: Topology) -> None:
        super().__init__()
        self.remove = remove
        self.register_buffer(MASK, torch.ones(directions, units // topology.tensor, dtype=torch.bool))
        if topology.tensor > 1:
            compat.mark_tensor_parallel(self.mask, 1)

    def forward(self, hidden: Tensor, bias: Tensor, context: LanguageContext) -> Tensor:
        """Mask the units, hidden [B, T, F] -> [B, T, F]; ``hidden`` already includes ``bias`` [F]."""
        kept = self.mask[context.ids.direction].to(hidden.dtype)[:, None]
        if self.remove == "rows":  # kept (hidden - bias) + bias, without a further pass over B T F values
            return torch.addcmul(bias * (1 - kept), hidden, kept)
        masked: Tensor = _Silence.apply(hidden, kept)
        return masked


class NeuronSpecialization(Method):
    """Mask the hidden units of feed-forwards by direction."""

    name = NAME
    by_direction = True
    analyses = (NAME,)
    reshapes = True

    section: Neurons

    def __init__(self, section: Neurons, recipe: Recipe, topology: Topology) -> None:
        super().__init__(section, recipe, topology)
        self.masks: dict[str, UnitMask] = {}  # by the name of their site
        self.directions = recipe.languages.directions

    def make(self, site: UnitsSite) -> UnitMask:
        """Return the masks of one feed-forward."""
        made = UnitMask(len(self.directions), site.units, self.section.remove, self.topology)
        self.masks[site.at] = made
        return made

    def initial(self, name: str) -> Draw | None:
        """Keep random units if the recipe says so; otherwise keep all until :meth:`begin`."""
        return self._draw if self.owns(name) else None

    def _draw(self, value: Tensor, generator: Generator) -> None:
        if self.section.random is None:
            value.fill_(1)
        else:
            directions, units = value.shape
            value.copy_(at_random(directions, units, self.section.random, generator))

    def begin(self, model: Any, dev: Callable[[int | None], Iterable[Batch]]) -> str | None:
        """Record which units each direction activates on dev text, and choose its masks."""
        section = self.section
        widths = [module.mask.shape[1] * self.topology.tensor for module in self.masks.values()]
        total = len(self.directions) * sum(widths)
        size = f"{counted(len(self.directions), 'direction')} keep {{:.1%}} of the units, in "
        size += counted((total + 7) // 8, "byte")
        if section.random is not None:
            drawn = sum(kept_at_random(units, section.random) for units in widths)
            return f"neurons: masks of {size.format(drawn / max(sum(widths), 1))}, at random"
        begun = time.perf_counter()
        found, sentences = record(model, dev(section.pairs), len(self.directions), section.per, self.topology)
        counts = {at: found[at] for at in self.masks}
        try:
            named = section.named(self.recipe.languages)
            others = relatives(self.directions, (sentences > 0).tolist(), named)
        except KeyError as error:
            lacking = self.directions[error.args[0]]
            told = f"'model.neurons' has no dev text of {lacking}, nor of a direction with the same target"
            if (other := named.get(error.args[0])) is not None:
                told = f"'model.neurons.like' names {self.directions[other]}, of which there is no dev text"
            raise SharedError(
                f"{told}: name one with dev text in 'model.neurons.like', as in "
                f"{{{lacking}: {self._recorded(sentences)}}}"
            ) from None
        kept = 0
        for at, module in self.masks.items():
            mask = most_active(counts[at], section.share)
            own_masks = mask.clone()
            for new, known in others.items():
                mask[new] = own_masks[known]
            kept += int(mask.sum())
            own = mask.chunk(self.topology.tensor, 1)[self.topology.tensor_rank]
            module.mask.copy_(own)
        names = [str(direction) for direction in self.directions]
        taken = [f"{names[new]} has that of {names[known]}" for new, known in others.items()]
        beside = f"; {listed(taken)}" if taken else ""
        read = counted(int(sentences.sum()), "dev pair")
        return (
            f"neurons: {read} recorded in {time.perf_counter() - begun:.1f} s; masks of "
            f"{size.format(kept / max(total, 1))}{beside}"
        )

    def _recorded(self, sentences: Tensor) -> Direction | str:
        """Return the first direction that has dev text."""
        return next(
            (d for d, n in zip(self.directions, sentences.tolist(), strict=True) if n), "SOURCE-TARGET"
        )

    def language_rows(self, name: str, width: int) -> dict[str, slice]:
        return {str(direction): slice(i, i + 1) for i, direction in enumerate(self.directions)}

    def holder_like(self, new: str, known: Collection[str], like: str | None) -> str | None:
        """Return the direction whose mask a new direction copies.

        That is the one that the recipe names for it, or else the result of :func:`direction_like`.
        """
        numbers = self.section.named(self.recipe.languages)
        number = numbers.get(next(i for i, each in enumerate(self.directions) if str(each) == new))
        named = None if number is None else str(self.directions[number])
        return named if named in known else direction_like(new, known, like)

    def analyze(self, kind: str, weights: Tensors) -> Findings:
        return find_overlaps(self.directions, units_of(self.recipe, weights), "the units that masks keep")

    def merge_at(
        self, weights: Tensors, at: str, direction: Direction | None, route: Route
    ) -> dict[str, LazyTensor]:
        """Return the feed-forward with only the units that the direction's mask keeps.

        Under ``rows`` masked units still contribute relu(b_1) W_2, which is added to the last bias. If the
        mask keeps nothing, one unit remains, which outputs 0.
        """
        assert direction is not None
        inside = at.removesuffix("units")
        names = {each: f"{inside}{each}" for each in FEED_FORWARD}
        kept = weights[f"{at}_{NAME}.{MASK}"][self.recipe.languages.direction_id(direction)].bool()
        index = kept.nonzero().squeeze(1) if kept.any() else torch.zeros(1, dtype=torch.long)
        hidden = weights.shape(names["expand.weight"])[1]
        constant = self.section.remove == "rows"

        def bias() -> Tensor:
            value = weights[names["contract.bias"]]
            if not constant:
                return value
            silent = F.relu(weights[names["expand.bias"]]).masked_fill(kept, 0.0)
            return value + (weights[names["contract.weight"]].double() @ silent.double()).to(value.dtype)

        return {
            names["expand.weight"]: LazyTensor(
                (len(index), hidden), lambda: weights[names["expand.weight"]][index]
            ),
            names["expand.bias"]: LazyTensor((len(index),), lambda: weights[names["expand.bias"]][index]),
            names["contract.weight"]: LazyTensor(
                (hidden, len(index)), lambda: weights[names["contract.weight"]][:, index] * bool(kept.any())
            ),
            names["contract.bias"]: LazyTensor((hidden,), bias),
        }


def units_of(recipe: Recipe, weights: Tensors) -> dict[str, Tensor]:
    """Return the masks [D, F] of each layer, keyed by a name such as ``encoder.0``."""
    end = f".feed_forward.units_{NAME}.{MASK}"
    sides = (("encoder", recipe.model.encoder.layers), ("decoder", recipe.model.decoder.layers))
    names = [f"{side}.{layer}" for side, layers in sides for layer in range(layers)]
    return {name: weights[f"{name}{end}"].bool() for name in names if f"{name}{end}" in weights}

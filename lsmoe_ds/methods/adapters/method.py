"""Adapters after layers (Bapna and Firat, 2019). For a token x [H] that a layer returns,

    y = x + W_up relu(W_down (scale norm(x) + shift) + inner) + outer

where scale, shift, W_down [W, H], W_up [H, W] and the biases inner and outer belong to the sentence's pair,
family or language. In a new adapter W_up and ``outer`` are 0, so adding it does not change the output.

An adapter equals a Transformer layer whose attentions output 0 and whose feed-forward has W units. The dense
model of a direction therefore has such a layer after each layer with an adapter, and computes exactly the
same.

With tensor parallelism every rank holds all adapters, because x, y and their gradients are whole and equal on
all ranks. N adapters, H hidden, W width, B sentences, T positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.shapes import attention_linears
from lsmoe_ds.directions import Direction
from lsmoe_ds.methods.adapters.settings import Adapters
from lsmoe_ds.methods.base import Draw, Method
from lsmoe_ds.methods.context import LanguageContext, Route
from lsmoe_ds.methods.products import Add, Matrices, Multiply
from lsmoe_ds.methods.sites import LayerSite
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe

NAME = "adapters"
SIDES = ("encoder", "decoder")


class AdapterBank(nn.Module):
    """The N adapters after one layer; each has its own rows of every parameter.

    ``kind`` is the task (direction or language) that chooses the adapter; ``numbers`` maps it to the adapter.
    """

    def __init__(self, hidden: int, width: int, numbers: list[int], kind: str) -> None:
        super().__init__()
        self.hidden, self.width, self.kind, self.numbers = hidden, width, kind, numbers
        count = max(numbers) + 1
        self.matrices = Matrices([slice(n * width, (n + 1) * width) for n in numbers])
        self.scale = nn.Parameter(torch.empty(count, hidden))
        self.shift = nn.Parameter(torch.empty(count, hidden))
        self.down = nn.Parameter(torch.empty(count * width, hidden))
        self.inner = nn.Parameter(torch.empty(count, width))
        self.up = nn.Parameter(torch.empty(count * width, hidden))  # transposed
        self.outer = nn.Parameter(torch.empty(count, hidden))

    def forward(self, x: Tensor, context: LanguageContext) -> Tensor:
        """Add to each sentence the output of its adapter, x [B, T, H] -> [B, T, H]."""
        chosen = context.once((NAME, self.kind), lambda: self._chosen(context))[:, None]  # [B, 1]
        normed = torch.addcmul(self.shift[chosen], F.layer_norm(x, (self.hidden,)), self.scale[chosen])
        rows = normed.view(-1, self.hidden)
        given = self.matrices, self.matrices.groups(context, self.kind, rows), slice(0, self.hidden)
        units = Multiply.apply(rows, self.down, *given).unflatten(0, x.shape[:2])
        units = F.relu(units + self.inner[chosen]).view(-1, self.width)
        y = (x + self.outer[chosen]).view(-1, self.hidden)
        out: Tensor = Add.apply(y, units, self.up, *given)
        return out.view_as(x)

    def _chosen(self, context: LanguageContext) -> Tensor:
        numbers = torch.tensor(self.numbers, device=context.ids.direction.device)
        return numbers[context.ids.task(self.kind)]


class BottleneckAdapters(Method):
    """Put adapters after layers."""

    name = NAME
    by_direction = True
    adds_layers = True
    reshapes = True

    section: Adapters

    def __init__(self, section: Adapters, recipe: Recipe, topology: Topology) -> None:
        super().__init__(section, recipe, topology)
        self.holders = section.holders(recipe.languages)
        self.names = list(dict.fromkeys(self.holders))  # the name of each adapter, by number

    def make(self, site: LayerSite) -> AdapterBank:
        """Return the adapters after one layer."""
        numbers = [self.names.index(holder) for holder in self.holders]
        return AdapterBank(site.hidden, self.section.width, numbers, self.section.kind(site.side))

    def initial(self, name: str) -> Draw | None:
        if not self.owns(name):
            return None
        kind = name.rpartition(".")[2]
        if kind == "down":
            return self._draw_down
        return lambda value, generator: value.fill_(1.0 if kind == "scale" else 0.0)

    def _draw_down(self, value: Tensor, generator: Generator) -> None:
        """Draw each matrix like the first weight of a feed-forward."""
        for matrix in value.split(self.section.width):
            nn.init.xavier_uniform_(matrix, generator=generator)

    def language_rows(self, name: str, width: int) -> dict[str, slice]:
        rows = self.section.width if name.endswith((".down", ".up")) else 1
        return {holder: slice(i * rows, (i + 1) * rows) for i, holder in enumerate(self.names)}

    def merge(self, weights: Tensors, direction: Direction | None, route: Route) -> Tensors:
        """Turn each adapter of the direction into a further layer; return the weights of that model."""
        assert direction is not None
        own = [name for name in weights if self.owns(name)]
        followed = {name.partition(f".layer_{self.name}.")[0] for name in own}
        moved: dict[str, str] = {}  # new names of layers, by their old names
        entries: dict[str, LazyTensor] = {}
        for side in SIDES:
            count = 0
            for layer in range(max(_numbers(weights, side), default=-1) + 1):
                old = f"{side}.{layer}"
                moved[old] = f"{side}.{count}"
                if old in followed:
                    count += 1
                    entries |= self._as_layer(weights, old, f"{side}.{count}", direction)
                count += 1
        for name in weights.keys() - set(own):
            side, _, rest = name.partition(".")
            number, _, rest = rest.partition(".")
            new = moved.get(f"{side}.{number}")
            entries[name if new is None else f"{new}.{rest}"] = weights.entries[name]
        return Tensors(entries)

    def _as_layer(self, weights: Tensors, old: str, new: str, direction: Direction) -> dict[str, LazyTensor]:
        """Return the tensors of the layer ``new`` that replaces the adapter after the layer ``old``."""
        languages, side = self.recipe.languages, old.partition(".")[0]
        kind = self.section.kind("decoder" if side == "decoder" else "encoder")
        adapter = self.names.index(self.holders[languages.task_id(kind, direction)])
        width = self.section.width
        hidden = weights.shape(f"{old}.layer_{NAME}.scale")[1]

        def row(name: str) -> LazyTensor:
            at = f"{old}.layer_{NAME}.{name}"
            return LazyTensor((weights.shape(at)[1],), lambda: weights[at][adapter])

        def matrix(name: str) -> Tensor:
            return weights[f"{old}.layer_{NAME}.{name}"][adapter * width : (adapter + 1) * width]

        def constant(value: float, *shape: int) -> LazyTensor:
            return LazyTensor(shape, lambda: torch.full(shape, value))

        made = {
            "feed_forward_norm.weight": row("scale"),
            "feed_forward_norm.bias": row("shift"),
            "feed_forward.expand.weight": LazyTensor((width, hidden), lambda: matrix("down")),
            "feed_forward.expand.bias": row("inner"),
            "feed_forward.contract.weight": LazyTensor(
                (hidden, width), lambda: matrix("up").t().contiguous()
            ),
            "feed_forward.contract.bias": row("outer"),
        }
        attentions = {"attention": "attention_norm"}
        if side == "decoder":
            attentions["cross_attention"] = "cross_norm"
        for attention, norm in attentions.items():
            made |= {f"{norm}.weight": constant(1.0, hidden), f"{norm}.bias": constant(0.0, hidden)}
            for linear in attention_linears(hidden):
                made[f"{attention}.{linear}.weight"] = constant(0.0, hidden, hidden)
                made[f"{attention}.{linear}.bias"] = constant(0.0, hidden)
        return {f"{new}.{name}": entry for name, entry in made.items()}


def _numbers(weights: Tensors, side: str) -> set[int]:
    """Return the numbers of a side's layers."""
    parts = (name.split(".") for name in weights if name.startswith(f"{side}."))
    return {int(layer) for _, layer, *_ in parts if layer.isdecimal()}

"""List the sites of a model with their shapes, and count parameters.

Sites are the places to which methods add modules, and which planning counts. The model is built from the same
shapes. No torch here, so that planning billions of parameters is instant. H hidden, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from lsmoe_ds.config.model import Model

SideName = Literal["encoder", "decoder"]
Sublayer = Literal["attention", "cross_attention", "feed_forward"]
Split = Literal["column", "row"]  # what is split over tensor-parallel ranks: the outputs, or the inputs
LinearShapes = dict[str, tuple[int, int, Split]]  # inputs, outputs and split of each linear layer, by name


@dataclass(frozen=True)
class Count:
    """Numbers of parameters by how ranks hold them."""

    split: int = 0  # spread over the tensor-parallel ranks
    whole: int = 0  # on every rank
    expert: int = 0  # spread over the expert-parallel ranks

    def __add__(self, other: Count) -> Count:
        return Count(self.split + other.split, self.whole + other.whole, self.expert + other.expert)

    @property
    def total(self) -> int:
        return self.split + self.whole + self.expert


@dataclass(frozen=True)
class LinearShape:
    """A linear layer [inputs -> outputs]."""

    side: SideName
    layer: int
    sublayer: Sublayer
    name: str
    inputs: int
    outputs: int
    split: Split

    @property
    def at(self) -> str:
        """Return its global name in the model: ``decoder.0.feed_forward.expand``."""
        return f"{self.side}.{self.layer}.{self.sublayer}.{self.name}"

    @property
    def reads(self) -> SideName:
        """Return the side whose tokens it reads: the encoder for keys and values of the cross-attention."""
        across = self.sublayer == "cross_attention" and self.name in ("key", "value")
        return "encoder" if across else self.side


@dataclass(frozen=True)
class SublayerShape:
    """A sublayer of a layer, whose input and output are [B, T, H]."""

    side: SideName
    layer: int
    sublayer: Sublayer
    hidden: int

    @property
    def at(self) -> str:
        """Return its global name in the model: ``decoder.0.feed_forward``."""
        return f"{self.side}.{self.layer}.{self.sublayer}"

    @property
    def reads(self) -> SideName:
        """Return the side whose tokens it reads."""
        return self.side


@dataclass(frozen=True)
class UnitsShape:
    """The hidden units of a feed-forward that is no expert, before the activation function."""

    side: SideName
    layer: int
    units: int
    hidden: int
    sublayer: ClassVar[Sublayer] = "feed_forward"

    @property
    def at(self) -> str:
        """Return its global name in the model: ``decoder.0.feed_forward.units``."""
        return f"{self.side}.{self.layer}.{self.sublayer}.units"

    @property
    def reads(self) -> SideName:
        """Return the side whose tokens it reads."""
        return self.side


@dataclass(frozen=True)
class LayerShape:
    """A whole layer, whose input and output are [B, T, H]."""

    side: SideName
    layer: int
    hidden: int
    sublayer: ClassVar[None] = None

    @property
    def at(self) -> str:
        """Return its global name in the model: ``decoder.0.layer``."""
        return f"{self.side}.{self.layer}.layer"

    @property
    def reads(self) -> SideName:
        """Return the side whose tokens it reads."""
        return self.side


Shape = LinearShape | SublayerShape | UnitsShape | LayerShape


@dataclass(frozen=True)
class MatrixProduct:
    """A product of a token's vector at a site with a matrix. Sites and methods list their products in order.

    ``reads`` says which vector: the site's ``input``; the ``output`` of the sublayer, for a method after it;
    the result of the product listed ``before`` (for the first: a value without gradient); or the encoder's
    output, the ``memory``. ``weight`` is the matrix's global name, None if it is no parameter. ``beside`` are
    other parameters that change the result, such as a bias.
    """

    flops: int  # forward
    weight: str | None
    beside: tuple[str, ...] = ()
    reads: Literal["input", "output", "before", "memory"] = "input"


def attention_linears(hidden: int) -> LinearShapes:
    """Return the linear layers of an attention."""
    return {
        "query": (hidden, hidden, "column"),
        "key": (hidden, hidden, "column"),
        "value": (hidden, hidden, "column"),
        "output": (hidden, hidden, "row"),
    }


# The tensors of a feed-forward, below its name.
FEED_FORWARD = ("expand.weight", "expand.bias", "contract.weight", "contract.bias")


def feed_forward_linears(hidden: int, width: int) -> LinearShapes:
    """Return the linear layers of a feed-forward."""
    return {"expand": (hidden, width, "column"), "contract": (width, hidden, "row")}


def shapes_of(model: Model) -> Iterator[Shape]:
    """Yield the shape of every site of a model, layer by layer. Linear layers of experts are no sites.

    In a model of transformers the sites are linear layers, and sublayers that have some.
    """
    if model.huggingface is not None:
        from lsmoe_ds.config.host_outline import read_outline  # needs transformers and torch

        sites = read_outline(model.huggingface, model.task).sites
        for (on, number, of), inside in groupby(sites, lambda site: (site.side, site.layer, site.sublayer)):
            yield SublayerShape(on, number, of, model.hidden)
            yield from inside
        return
    sides: tuple[SideName, ...] = ("encoder", "decoder")
    for side in sides:
        settings = model.encoder if side == "encoder" else model.decoder
        for layer in range(settings.layers):
            dense = feed_forward_linears(model.hidden, settings.width(layer))
            found: dict[Sublayer, LinearShapes] = {"attention": attention_linears(model.hidden)}
            if side == "decoder":
                found["cross_attention"] = attention_linears(model.hidden)
            found["feed_forward"] = {} if settings.is_moe(layer) else dense
            for sublayer, linears in found.items():
                yield SublayerShape(side, layer, sublayer, model.hidden)
                for name, (inputs, outputs, split) in linears.items():
                    yield LinearShape(side, layer, sublayer, name, inputs, outputs, split)
            if found["feed_forward"]:
                yield UnitsShape(side, layer, settings.width(layer), model.hidden)
            yield LayerShape(side, layer, model.hidden)


def count_linears(linears: LinearShapes) -> Count:
    """Count weights and biases: all are split over ranks, except biases of row linears."""
    split = sum(inputs * outputs + outputs * (kind == "column") for inputs, outputs, kind in linears.values())
    whole = sum(outputs for _, outputs, kind in linears.values() if kind == "row")
    return Count(split=split, whole=whole)


def count_feed_forward(hidden: int, width: int) -> Count:
    """Count a feed-forward: 2 H F + F + H."""
    return count_linears(feed_forward_linears(hidden, width))

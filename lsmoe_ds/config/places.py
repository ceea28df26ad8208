"""Patterns by which a recipe chooses sites: ``encoder.0-8``, ``cross_attention.query``.

A pattern is up to four words, joined by dots, in this order: a side (``encoder``, ``decoder``), a layer or a
range of layers counted from 0 (``3``, ``0-8``), a sublayer (``self_attention``, ``cross_attention``,
``feed_forward``, or ``attention`` for both attentions) and a linear layer (``query``, ``key``, ``value``,
``output``, ``expand``, ``contract``; in models of transformers also ``gate``). A word that is
left out matches anything; ``all`` and ``both`` (attentions and feed-forwards) match every site.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from lsmoe_ds.config.shapes import (
    LayerShape,
    LinearShape,
    SublayerShape,
    UnitsShape,
    attention_linears,
    feed_forward_linears,
)

if TYPE_CHECKING:
    from lsmoe_ds.config.model import Model

SIDES = ("encoder", "decoder")
SUBLAYERS = {
    "self_attention": ("attention",),
    "cross_attention": ("cross_attention",),
    "attention": ("attention", "cross_attention"),
    "feed_forward": ("feed_forward",),
}
LINEARS = (*attention_linears(1), *feed_forward_linears(1, 1), "gate")
LAYERS = re.compile(r"(\d+)(?:-(\d+))?")
EVERYTHING = ("all", "both")


@dataclass(frozen=True)
class Place:
    """The places that one pattern names; None stands for any."""

    side: str | None = None
    layers: range | None = None
    sublayers: tuple[str, ...] | None = None
    linear: str | None = None

    def __contains__(self, site: object) -> bool:
        return (
            isinstance(site, LinearShape | SublayerShape | UnitsShape | LayerShape)
            and self.side in (None, site.side)
            and (self.layers is None or site.layer in self.layers)
            and (self.sublayers is None or site.sublayer in self.sublayers)
            and self.linear in (None, getattr(site, "name", ""))
        )


@cache
def parse_place(pattern: str) -> Place:
    """Parse a pattern. Raises ValueError, with a sentence, for any other text."""
    words = [] if pattern in EVERYTHING else pattern.split(".")
    side = words.pop(0) if words and words[0] in SIDES else None
    layers = None
    if words and (found := LAYERS.fullmatch(words[0])):
        first, last = int(found[1]), int(found[2] or found[1])
        layers = range(first, last + 1)
        words.pop(0)
    sublayers = SUBLAYERS[words.pop(0)] if words and words[0] in SUBLAYERS else None
    linear = words.pop(0) if words and words[0] in LINEARS else None
    if words or (layers is not None and not layers):
        wrong = words[0] if words else pattern
        raise ValueError(
            f"'{pattern}' names no linear layers, because of '{wrong}': write a side ({', '.join(SIDES)}), "
            f"layers (3 or 0-8), a sublayer ({', '.join(SUBLAYERS)}) and a linear layer "
            f"({', '.join(LINEARS[:-1])}; gate in models of transformers), joined by "
            "dots, each of which may be left out, or all"
        )
    return Place(side, layers, sublayers, linear)


def _check(value: str | list[str]) -> str | list[str]:
    for pattern in patterns_of(value):
        parse_place(pattern)
    return value


# The type of a recipe's value: several patterns, or one.
PlaceList = Annotated[list[str], Field(min_length=1), AfterValidator(_check)]
Places = Annotated[str, AfterValidator(_check)] | PlaceList


def patterns_of(value: str | list[str]) -> list[str]:
    """List the patterns that a recipe gives."""
    return [value] if isinstance(value, str) else value


def is_in(site: object, patterns: Collection[str]) -> bool:
    """Tell whether one of the patterns names a site."""
    return any(site in parse_place(pattern) for pattern in patterns)


def describe_layers(model: Model) -> str:
    """Describe the layers of a model, for an error about a pattern that matches none of them."""
    encoder, decoder = model.encoder.layers, model.decoder.layers
    return f"the model, which has {encoder} and {decoder} layers, counted from 0"


def check_named(patterns: Iterable[str], sites: Sequence[object], what: str, model: Model) -> None:
    """Raise ValueError for a pattern that matches none of the ``sites`` (called ``what`` in the error), or
    that names layers that the model lacks.
    """
    counts, has = {"encoder": model.encoder.layers, "decoder": model.decoder.layers}, describe_layers(model)
    for pattern in patterns:
        place = parse_place(pattern)
        if not any(is_in(site, [pattern]) for site in sites):
            raise ValueError(f"'{pattern}' names no {what} of {has}: leave it out")
        layers = counts[place.side] if place.side else max(counts.values())
        if place.layers is not None and place.layers[-1] >= layers:
            raise ValueError(
                f"'{pattern}' names layers up to {place.layers[-1]} of {has}: let it end at {layers - 1}"
            )

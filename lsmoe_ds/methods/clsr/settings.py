"""The section ``model.clsr`` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lsmoe_ds.config.section import Positive, Section

Sublayer = Literal["attention", "cross_attention", "feed_forward"]


class Clsr(Section):
    """Conditional language-specific routing after each sublayer (CLSR; :mod:`lsmoe_ds.methods.clsr.method`).

    Gates, of ``gate`` hidden units each, choose for each token between its language's projection and one for all languages,
    so that the mean gate of a step comes to ``budget``; ``weight`` is that of this loss. ``shared`` makes one set of the
    languages' projections for all sublayers of a side; otherwise each sublayer has its own (CLSR*). ``at`` names the sublayers.
    """

    budget: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    shared: bool = True
    gate: Positive = 128
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    at: Annotated[tuple[Sublayer, ...], Field(min_length=1)] = ("attention", "cross_attention", "feed_forward")

    def sublayers(self, decoder: bool) -> list[Sublayer]:
        """Of one layer, those that are followed by gates: the encoder has no cross-attention."""
        names: tuple[Sublayer, ...] = ("attention", "cross_attention", "feed_forward")
        return [name for name in names if name in self.at and (decoder or name != "cross_attention")]

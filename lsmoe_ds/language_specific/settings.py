"""Sections of a recipe about language-specific parameters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lsmoe_ds.section import Positive, Section

Sublayer = Literal["attention", "cross_attention", "feed_forward"]


class LowRank(Section):
    """Low-rank language-specific matrices beside linear layers (LMS, "Condensing Multilingual Knowledge", section 2).

    ``index`` says which languages choose them: ``pair``, the source and the target; ``language``, the source in the encoder
    and the target in the decoder. ``rank`` is one number, or (``index: language``) one for each language.
    They stand beside the dense feed-forwards, the attentions or both, in every ``every``-th layer. With
    ``fuse_distillation`` all languages share further matrices, which learn from the specific ones (section 4).
    """

    rank: Positive | dict[str, Positive]
    index: Literal["pair", "language"] = "pair"
    at: Literal["feed_forward", "attention", "both"] = "feed_forward"
    every: Positive = 1
    fuse_distillation: bool = False

    def rank_of(self, language: str) -> int:
        return self.rank if isinstance(self.rank, int) else self.rank[language]

    @property
    def shared_rank(self) -> int:
        """Of the shared matrices: the largest of all."""
        return self.rank if isinstance(self.rank, int) else max(self.rank.values())

    def is_in(self, layer: int, place: str) -> bool:
        """Whether a layer counted from 0 has them in its "feed_forward" or its "attention"."""
        return self.at in (place, "both") and (layer + 1) % self.every == 0

    @model_validator(mode="after")
    def _ranks(self) -> LowRank:
        if isinstance(self.rank, dict) and not self.rank:
            raise ValueError("'rank' names no language: give one number, or one for each language")
        if isinstance(self.rank, dict) and self.index == "pair":
            raise ValueError(
                "'rank' differs by language, but with 'index: pair' any two languages meet: give one number, or 'index: language'"
            )
        return self


class Clsr(Section):
    """Conditional language-specific routing after each sublayer (CLSR; :mod:`lsmoe_ds.language_specific.clsr`).

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

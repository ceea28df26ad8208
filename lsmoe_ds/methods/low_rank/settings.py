"""The section ``model.low_rank`` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lsmoe_ds.config.section import Positive, Section


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

"""Low-rank matrices as a method: where banks are added, how they are initialized and merged."""

from __future__ import annotations

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.shapes import attention_linears, feed_forward_linears
from lsmoe_ds.languages import Direction
from lsmoe_ds.methods.base import Draw, Method
from lsmoe_ds.methods.context import SHARED, Route
from lsmoe_ds.methods.low_rank.bank import FLAT, NAME, VERTICAL, LowRankBank, indexes, rows_of
from lsmoe_ds.methods.low_rank.settings import LowRank
from lsmoe_ds.methods.sites import LinearSite

SPLITS = {name: split for name, (_, _, split) in (attention_linears(1) | feed_forward_linears(1, 1)).items()}


class LowRankMatrices(Method):
    """Add banks beside the linear layers of attentions, or of feed-forwards without experts."""

    name = NAME
    by_direction = True

    section: LowRank

    def make(self, site: LinearSite) -> LowRankBank:
        """Return the bank of one linear layer."""
        return LowRankBank(site, self.section, self.languages, self.topology)

    def is_spread(self, name: str) -> bool:
        """Tell whether it is the vertical matrix beside a column linear, or the flat one beside a row
        linear.
        """
        at, _, matrix = name.rpartition(".")
        linear = at.removesuffix(f"_{NAME}").rpartition(".")[2]
        return matrix == ("vertical" if SPLITS.get(linear) == "column" else "flat") and self.owns(name)

    def merge_at(
        self, weights: Tensors, at: str, direction: Direction | None, route: Route
    ) -> dict[str, LazyTensor]:
        """Return the merged weight W + V F of the linear layer ``at``."""
        numbers = {"source": SHARED, "target": SHARED}
        if route == "specific" and direction is not None:
            numbers = {
                "source": self.languages.id(direction.source),
                "target": self.languages.id(direction.target),
            }
        rows = rows_of(self.section, self.languages)
        vertical, flat = (
            rows[numbers[kind]]
            for kind in indexes(self.section, "decoder" if at.startswith("decoder.") else "encoder")
        )
        base, vertical_name, flat_name = f"{at}.weight", f"{at}{VERTICAL}", f"{at}{FLAT}"

        def make() -> Tensor:
            return torch.addmm(weights[base], weights[vertical_name][vertical].t(), weights[flat_name][flat])

        return {base: LazyTensor(weights.shape(base), make)}

    def language_rows(self, name: str, width: int) -> dict[str, slice]:
        return dict(
            zip([*self.languages.codes, "shared"], rows_of(self.section, self.languages), strict=False)
        )

    def initial(self, name: str) -> Draw | None:
        """Initialize flat matrices to 0, so that a new model computes the same as without them.

        Vertical matrices are drawn from a normal distribution with standard deviation ``init_std``.
        """
        if name.endswith(FLAT):
            return lambda value, generator: value.zero_()
        if name.endswith(VERTICAL):
            return lambda value, generator: value.normal_(0.0, self.section.init_std, generator=generator)
        return None

"""Low-rank matrices as a method: where banks stand, how they begin, and how they merge into linear layers."""

from __future__ import annotations

import torch

from lsmoe_ds.checkpoint.tensors import Entry, Tensors
from lsmoe_ds.config.shapes import Split
from lsmoe_ds.languages import Direction, Languages
from lsmoe_ds.methods.base import Draw, Method
from lsmoe_ds.methods.context import SHARED, Route
from lsmoe_ds.methods.low_rank.bank import FLAT, NAME, VERTICAL, LowRankBank, indexes, rows_of
from lsmoe_ds.methods.low_rank.settings import LowRank
from lsmoe_ds.methods.sites import LinearSite, Site
from lsmoe_ds.parallel.topology import Topology


class LowRankMatrices(Method):
    """Banks beside the linear layers of attentions, or of feed-forwards that have no experts."""

    name = NAME
    by_direction = True

    def __init__(self, settings: LowRank, languages: Languages, topology: Topology) -> None:
        self.settings, self.languages, self.topology = settings, languages, topology

    def install(self, site: Site) -> None:
        if isinstance(site, LinearSite) and self.settings.is_at(site):
            site.add(NAME, self.make(site.inputs, site.outputs, site.side == "decoder", site.split))

    def make(self, inputs: int, outputs: int, decoder: bool, split: Split) -> LowRankBank:
        return LowRankBank(inputs, outputs, self.settings, self.languages, decoder, self.topology, split)

    def merge(self, weights: Tensors, direction: Direction | None, route: Route) -> Tensors:
        """Return the weights with every bank merged into the linear layer beside it: W + V F."""
        numbers = {"source": SHARED, "target": SHARED}
        if route == "specific" and direction is not None:
            numbers = {"source": self.languages.id(direction.source), "target": self.languages.id(direction.target)}
        rows = rows_of(self.settings, self.languages)

        def merged(at: str) -> Entry:
            vertical, flat = (rows[numbers[kind]] for kind in indexes(self.settings, at.startswith("decoder.")))
            base, of_vertical, of_flat = f"{at}.weight", f"{at}{VERTICAL}", f"{at}{FLAT}"
            return Entry(
                weights.shape(base), lambda: torch.addmm(weights[base], weights[of_vertical][vertical].t(), weights[of_flat][flat])
            )

        kept = {name: entry for name, entry in weights.entries.items() if not name.endswith((FLAT, VERTICAL))}
        return Tensors(kept | {f"{at}.weight": merged(at) for at in (name.removesuffix(FLAT) for name in weights if name.endswith(FLAT))})

    def language_rows(self, name: str, width: int) -> dict[str, slice]:
        return dict(zip([*self.languages.codes, "shared"], rows_of(self.settings, self.languages), strict=False))

    def initial(self, name: str) -> Draw | None:
        """Make flat matrices 0, so that a model begins as it would without them, and draw vertical ones normal
        with deviation 0.1.
        """
        if name.endswith(FLAT):
            return lambda value, generator: value.zero_()
        if name.endswith(VERTICAL):
            return lambda value, generator: value.normal_(0.0, 0.1, generator=generator)
        return None

"""The base class of models: methods at their sites, an objective, and the totals of methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.methods.base import Totals
from lsmoe_ds.methods.context import Notes
from lsmoe_ds.methods.sites import Site
from lsmoe_ds.model.methods import methods_of, objective_of
from lsmoe_ds.parallel.topology import Topology


@dataclass
class Losses:
    """The losses of one micro-batch, summed over its target tokens."""

    loss: Tensor  # this and the next two: see TokenLosses
    nll: Tensor
    further: dict[str, Tensor]
    notes: Notes  # of each method, encoder first, for the auxiliary losses; empty in evaluation


class Model(nn.Module):
    """A model of a recipe. Call it with a batch's ``inputs``, and optionally a ``route``, for its Losses."""

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        super().__init__()
        self.topology = topology
        self.smoothing = recipe.training.label_smoothing
        self.objective = objective_of(recipe)
        self.moe_names = [f"{side}.{layer}" for side, layer, _ in recipe.model.moe_layers()]
        self.methods = methods_of(recipe, topology)

    def add_shared_modules(self) -> None:
        """Add the modules that several sites share. Call this before the sites exist."""
        for method in self.methods:
            for name, module in method.shared_modules():
                self.add_module(name, module)

    def sites(self) -> Iterator[Site]:
        """Yield the sites at which methods can add modules, layer by layer."""
        raise NotImplementedError

    def install_methods(self) -> None:
        """Let each method add its modules at the sites."""
        for site in self.sites():
            for method in self.methods:
                method.install(site)

    def is_loaded(self, name: str) -> bool:
        """Tell whether the parameter with this global name comes with pretrained weights."""
        return False

    def is_in_head(self, name: str) -> bool:
        """Tell whether the parameter with this global name is in a head that a task adds to a host model."""
        return False

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the parameters and stored buffers by these tensors, by local name."""
        self.load_state_dict(dict(weights), assign=True)

    def totals_ahead(self, *inputs: Any) -> Totals:
        """Return the part of the totals that a forward pass on these inputs will compute.

        The forward pass must draw the same random numbers.
        """
        raise NotImplementedError

    def counted_ahead(self, real: Mapping[str, Tensor], ids: SentenceIds) -> Totals | None:
        """Return :meth:`totals_ahead` if all methods can count from the ids; None otherwise."""
        ahead = {method.name: method.count_ahead(self, real, ids) for method in self.methods}
        if None in ahead.values():
            return None
        return {name: totals for name, totals in ahead.items() if totals is not None}

    def pack(self) -> None:
        """Pack all modules that have a ``pack``, for inference; weights must not change after that."""
        for module in self.modules():
            if module is not self and callable(pack := getattr(module, "pack", None)):
                pack()

    def moe_layers(self) -> list[tuple[str, Any]]:
        """Return (side, MixtureOfExperts) of each MoE layer, in the order in which they run."""
        return [(name.split(".")[0], self.get_submodule(f"{name}.feed_forward")) for name in self.moe_names]

    def count(self, notes: Notes) -> Totals:
        """Return a micro-batch's part of each method's totals."""
        return {method.name: method.count(notes.get(method.name, [])) for method in self.methods}

"""Sites: linear layers, sublayers, hidden units and layers of a model, at which methods add modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lsmoe_ds.config.shapes import (
    LayerShape,
    LinearShape,
    LinearShapes,
    SideName,
    Sublayer,
    SublayerShape,
    UnitsShape,
)
from lsmoe_ds.methods.context import LanguageContext


@dataclass(frozen=True)
class LinearSite(LinearShape):
    """A linear layer [inputs -> outputs].

    If a method adds a module here, ``module`` calls ``added(base, x, context)`` instead of the linear layer,
    which it passes as ``base``.
    """

    module: Linears

    def add(self, method: str, added: nn.Module) -> None:
        """Add a method's module under the name ``NAME_METHOD``. Raises ValueError for a second method."""
        if self.name in self.module.beside:
            raise ValueError(f"two methods are placed at {self.at}: a linear layer takes one")
        self.module.add_module(f"{self.name}_{method}", added)
        self.module.beside[self.name] = added


@dataclass(frozen=True)
class SublayerSite(SublayerShape):
    """A sublayer of a layer.

    An added module runs after the sublayer, before the residual: ``y = added(y, x, real, context)``, where
    the sublayer read x and returned y, both [B, T, H].
    """

    module: WithSublayers

    def add(self, method: str, added: nn.Module) -> None:
        """Add a method's module under the name ``SUBLAYER_METHOD``."""
        self.module.add_module(f"{self.sublayer}_{method}", added)
        self.module.after.setdefault(self.sublayer, []).append(added)


@dataclass(frozen=True)
class UnitsSite(UnitsShape):
    """The hidden units of a feed-forward.

    An added module runs before the activation function: ``hidden = added(hidden, bias, context)``, ``hidden``
    [B, T, F]. ``hidden`` already includes ``bias`` [F], the bias of the first linear layer. With tensor
    parallelism F counts only this rank's units.
    """

    module: Linears

    def add(self, method: str, added: nn.Module) -> None:
        """Add a method's module under the name ``units_METHOD``."""
        self.module.add_module(f"units_{method}", added)
        self.module.within.append(added)


@dataclass(frozen=True)
class LayerSite(LayerShape):
    """A layer. An added module runs after it: ``x = added(x, context)``, [B, T, H]."""

    module: WithSublayers

    def add(self, method: str, added: nn.Module) -> None:
        """Add a method's module under the name ``layer_METHOD``."""
        self.module.add_module(f"layer_{method}", added)
        self.module.last.append(added)


Site = LinearSite | SublayerSite | UnitsSite | LayerSite


class Linears(nn.Module):
    """A module whose linear layers, named in ``shapes``, are sites."""

    shapes: LinearShapes  # inputs, outputs and split of each linear layer, by attribute

    def __init__(self) -> None:
        super().__init__()
        self.beside: dict[str, nn.Module] = {}
        self.within: list[nn.Module] = []  # the modules added at hidden units

    def linear(self, name: str, x: Tensor, context: LanguageContext | None) -> Tensor:
        """Apply a linear layer, or the module added beside it; only the added module needs the context."""
        base, added = getattr(self, name), self.beside.get(name)
        out: Tensor = base(x) if added is None else added(base, x, context)
        return out

    def linear_sites(self, side: SideName, layer: int, sublayer: Sublayer) -> Iterator[LinearSite]:
        for name, (inputs, outputs, split) in self.shapes.items():
            yield LinearSite(side, layer, sublayer, name, inputs, outputs, split, self)


class WithSublayers(nn.Module):
    """A layer whose sublayers are sites."""

    def __init__(self) -> None:
        super().__init__()
        self.after: dict[str, list[nn.Module]] = {}
        self.last: list[nn.Module] = []

    def follow(
        self, sublayer: Sublayer, y: Tensor, x: Tensor, real: Tensor, context: LanguageContext
    ) -> Tensor:
        """Apply the modules added after a sublayer that read x and returned y, both [B, T, H]."""
        for added in self.after.get(sublayer, ()):
            y = added(y, x, real, context)
        return y

    def finish(self, x: Tensor, context: LanguageContext) -> Tensor:
        """Apply the modules added after the layer, x [B, T, H] -> [B, T, H]."""
        for added in self.last:
            x = added(x, context)
        return x

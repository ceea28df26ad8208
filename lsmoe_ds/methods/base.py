"""The hooks by which training knows a method, and what passes through them.

A forward pass leaves *notes*: each layer of a method appends one under the method's name. Some sums of notes
must be known over the whole step before its first gradient, such as how many tokens chose each expert: these
are the method's *totals*. From notes and totals it makes its losses, each by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Generator, Tensor, nn

from lsmoe_ds.checkpoint.tensors import Entry, Tensors
from lsmoe_ds.languages import Direction, SentenceIds
from lsmoe_ds.methods.context import Route
from lsmoe_ds.methods.sites import Site
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe

Draw = Callable[[Tensor, Generator], object]  # fills a whole parameter in place
Totals = dict[str, list[Tensor]]  # of a step, by method


@dataclass(frozen=True)
class StepSize:
    """Real tokens of one optimizer step that each side reads, over all ranks and micro-batches."""

    source_tokens: int
    target_tokens: int

    def tokens(self, side: str) -> int:
        """Return the tokens that the "encoder" or the "decoder" reads."""
        return self.source_tokens if side == "encoder" else self.target_tokens


class Method:
    """What one method adds to a training. Each hook has a default that adds nothing.

    Its modules may have state that is no parameter, such as masks: persistent buffers are stored, resumed,
    resharded and exported as parameters are, in their own type. If a buffer is spread over tensor-parallel
    ranks, each holds its part, marked by :func:`lsmoe_ds.parallel.compat.mark_tensor_parallel`.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ()  # names of what :meth:`measure` returns
    by_direction: ClassVar[bool] = False  # whether what a sentence meets by the specific route depends on its languages

    def __init__(self, section: Any, recipe: Recipe, topology: Topology) -> None:
        self.section, self.recipe, self.topology = section, recipe, topology
        self.languages = recipe.languages

    def owns(self, name: str) -> bool:
        """Tell whether a parameter, by its global name, is this method's."""
        return f"_{self.name}." in name

    def shared_modules(self) -> list[tuple[str, nn.Module]]:
        """Return modules that several sites share, by their name in the model; called before any is installed."""
        return []

    def install(self, site: Site) -> None:
        """Add a module at a site, if the section says that this method has one there."""
        if self.section is not None and self.section.is_at(site):
            site.add(self.name, self.make(site))

    def make(self, site: Any) -> nn.Module:
        """Return the module for a site at which the section says that there is one."""
        raise NotImplementedError

    def initial(self, name: str) -> Draw | None:
        """Return how a parameter of this method is drawn, by its global name; None for all others, and for weights,
        biases and norms that are drawn as the model's own are. A buffer without one stays as it was made.
        """
        return None

    def is_spread(self, name: str) -> bool:
        """Tell whether tensor-parallel ranks share out a parameter of this method, by its global name."""
        return False

    def check_merge(self, route: Route) -> None:
        """Raise UserError, with the reason, if no dense model computes the same by this route."""

    def merge(self, weights: Tensors, direction: Direction | None, route: Route) -> Tensors:
        """Return weights of the whole model, by global name, with this method's merged into those beside them."""
        own = [name for name in weights if self.owns(name)]
        entries = {name: weights.entries[name] for name in weights.keys() - set(own)}
        for at in dict.fromkeys(name.partition(f"_{self.name}.")[0] for name in own):
            entries |= self.merge_at(weights, at, direction, route)
        return Tensors(entries)

    def merge_at(self, weights: Tensors, at: str, direction: Direction | None, route: Route) -> dict[str, Entry]:
        """Return what takes the place of the tensors of the layer ``at``, beside which this method's stand.

        Only the specific route of a method that is ``by_direction`` reads ``direction``.
        """
        raise NotImplementedError

    def language_rows(self, name: str, width: int) -> dict[str, slice]:
        """Return which rows of a parameter [R, width] of this method belong to each language, by code, and to
        "shared": there a grown model puts them. Empty if none do.
        """
        return {}

    def before_step(self, model: nn.Module, number: int, steps: int) -> None:
        """Prepare the model for the ``number``-th of ``steps`` training steps, counted from 1."""

    def count(self, notes: Sequence[Any]) -> list[Tensor]:
        """Return a micro-batch's part of the totals, as vectors without gradient."""
        return []

    def count_ahead(self, model: nn.Module, real: Mapping[str, Tensor], ids: SentenceIds) -> list[Tensor] | None:
        """Return the same as :meth:`count` without a forward pass, from the ids of B sentences and their real
        positions [B, T] on each side; None if that takes a forward pass.
        """
        return [] if type(self).count is Method.count else None

    def losses(self, notes: Sequence[Any], totals: list[Tensor], size: StepSize) -> dict[str, Tensor]:
        """Return a micro-batch's part of each loss. The parts of all micro-batches of a step sum to the loss."""
        return {}

    def sums(self, notes: Sequence[Any]) -> dict[str, float]:
        """Return further numbers of a micro-batch that are summed over the step, by name."""
        return {}

    def measure(self, sums: Mapping[str, float], totals: list[Tensor], size: StepSize) -> dict[str, float]:
        """Return the step's :attr:`metrics`, from the sums over the step of :meth:`sums` and :meth:`losses`."""
        return {}

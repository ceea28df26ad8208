"""The hooks through which training calls a method.

In a forward pass each layer of a method appends a *note* under the method's name. The method's *totals* are
sums of notes that must be known over the whole step before its first gradient, such as how many tokens chose
each expert. From notes and totals the method computes its losses, each with a name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Generator, Tensor, nn

from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.directions import Direction, SentenceIds
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods.context import Route
from lsmoe_ds.methods.findings import Findings
from lsmoe_ds.methods.sites import Site
from lsmoe_ds.parallel.topology import Topology

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe
    from lsmoe_ds.data.batches import Batch

Draw = Callable[[Tensor, Generator], object]  # fills a whole parameter in place
Totals = dict[str, list[Tensor]]  # the totals of a step, by method


@dataclass(frozen=True)
class StepSize:
    """The real tokens of one optimizer step, over all ranks and micro-batches."""

    source_tokens: int
    target_tokens: int

    def tokens(self, side: str) -> int:
        """Return the tokens that the "encoder" or the "decoder" reads."""
        return self.source_tokens if side == "encoder" else self.target_tokens


@dataclass(frozen=True)
class Product:
    """What a method adds to the weight W of one linear layer: W + up down.

    ``make`` returns ``down`` [rank, inputs] and ``up`` [outputs, rank]. ``down`` reads the layer's first
    inputs; ``up`` adds to its first outputs. ``kept`` counts the values of both that are not pruned.
    """

    rank: int
    inputs: int
    outputs: int
    make: Callable[[], tuple[Tensor, Tensor]]
    kept: Callable[[], int]

    @property
    def values(self) -> int:
        """Count the values of both matrices."""
        return self.rank * (self.inputs + self.outputs)


class Method:
    """The interface of a method. The default of each hook adds nothing.

    A method's modules may have state that is not a parameter, such as masks. Persistent buffers are stored,
    resumed, resharded and exported like parameters, in their own type. If a buffer is spread over
    tensor-parallel ranks, each rank holds its part and marks it with
    :func:`lsmoe_ds.parallel.compat.mark_tensor_parallel`.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ()  # names of what :meth:`measure` returns
    analyses: ClassVar[tuple[str, ...]] = ()  # the kinds that `lsmoe analyze KIND` accepts for its weights
    by_direction: ClassVar[bool] = False  # whether languages choose the parameters of the specific route
    adds_layers: ClassVar[bool] = False  # whether :meth:`merge` turns its modules into further layers
    reshapes: ClassVar[bool] = False  # whether :meth:`merge` changes sizes or names of the model's tensors
    adds_products: ClassVar[bool] = False  # whether :meth:`products` is all that it adds

    def __init__(self, section: Any, recipe: Recipe, topology: Topology) -> None:
        self.section, self.recipe, self.topology = section, recipe, topology
        self.languages = recipe.languages

    def owns(self, name: str) -> bool:
        """Tell whether the parameter with this global name belongs to this method."""
        return f"_{self.name}." in name

    def shared_modules(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that several sites share, with their names. Called before :meth:`install`."""
        return []

    def install(self, site: Site) -> None:
        """Add a module at a site, if the recipe's section asks for one there."""
        if self.section is not None and self.section.is_at(site):
            site.add(self.name, self.make(site))

    def make(self, site: Any) -> nn.Module:
        """Return the module for a site at which the recipe's section asks for one."""
        raise NotImplementedError

    def initial(self, name: str) -> Draw | None:
        """Return the function that initializes the parameter or buffer with this global name.

        None for parameters that belong to others, and for weights, biases and norms that are initialized like
        the model's own. A buffer for which this is None keeps the values that its module gave it.
        """
        return None

    def spread_along(self, name: str) -> int | None:
        """Return the dimension along which tensor-parallel ranks split the parameter with this global name.

        None for parameters that belong to others, and for those that every rank holds whole.
        """
        return None

    def check_merge(self, route: Route) -> None:
        """Raise UserError, with the section's reason, if no dense model computes the same as this route."""
        if self.section is not None and self.section.unmergeable:
            raise UserError(self.section.unmergeable)

    def merge(self, weights: Tensors, direction: Direction | None, route: Route) -> Tensors:
        """Merge this method's parameters into their layers; return the model's weights by global name."""
        own = [name for name in weights if self.owns(name)]
        entries = {name: weights.entries[name] for name in weights.keys() - set(own)}
        for at in dict.fromkeys(name.partition(f"_{self.name}.")[0] for name in own):
            entries |= self.merge_at(weights, at, direction, route)
        return Tensors(entries)

    def merge_at(
        self, weights: Tensors, at: str, direction: Direction | None, route: Route
    ) -> dict[str, LazyTensor]:
        """Return the tensors that replace those of the layer ``at`` when this method is merged into it.

        ``direction`` matters only for the specific route of a ``by_direction`` method.
        """
        raise NotImplementedError

    def products(self, weights: Tensors, direction: Direction | None, route: Route) -> dict[str, Product]:
        """Return the product that this method adds to each linear layer, by the layer's name.

        :meth:`merge` merges the same products.
        """
        raise NotImplementedError

    def adapters(self) -> Mapping[str, tuple[Direction, Route]]:
        """Return each adapter to export, by name: the direction and the route that select its products.

        Empty if each direction, or each of its languages, has one adapter (:attr:`chosen_by`).
        """
        return {}

    @property
    def chosen_by(self) -> set[str]:
        """Return which languages ("source", "target") choose the products of the specific route."""
        raise NotImplementedError

    def language_rows(self, name: str, width: int) -> dict[str, slice]:
        """Return the rows of a parameter [R, width] that belong to each language code and to "shared".

        When languages are added to a trained model, these rows are copied to their new places. Empty if no
        rows belong to a language.
        """
        return {}

    def holder_like(self, new: str, known: Collection[str], like: str | None) -> str | None:
        """Choose the holder in ``known`` (keys of :meth:`language_rows`) whose rows a ``new`` holder copies.

        ``like`` is the language that the user named as similar to the new ones. None if the new rows are
        initialized instead.
        """
        return None

    def begin(self, model: Any, dev: Callable[[int | None], Iterable[Batch]]) -> str | None:
        """Prepare this method on dev text, read by the model it is added to; return a sentence to print.

        Called once, before the first step of a training that starts from a model without this method.
        ``dev(limit)`` yields up to ``limit`` dev pairs of each direction (None: all). Each pair goes to one
        data rank; each batch has one direction; all ranks get equally many batches.
        """
        return None

    def before_step(self, model: nn.Module, number: int, steps: int) -> Mapping[nn.Parameter, Tensor] | None:
        """Prepare the model for the ``number``-th of ``steps`` training steps, counted from 1.

        May return masks of parameters (each of this rank's part). Where a mask is false, training sets the
        value and its optimizer state to 0. The value stays 0 as long as the method gives it no gradient.
        """
        return None

    def count(self, notes: Sequence[Any]) -> list[Tensor]:
        """Compute a micro-batch's part of the totals, as vectors without gradient."""
        return []

    def count_ahead(
        self, model: nn.Module, real: Mapping[str, Tensor], ids: SentenceIds
    ) -> list[Tensor] | None:
        """Compute the result of :meth:`count` without a forward pass; return None if that is impossible.

        ``ids`` belong to B sentences; ``real`` has their real positions [B, T] on each side.
        """
        return [] if type(self).count is Method.count else None

    def losses(self, notes: Sequence[Any], totals: list[Tensor], size: StepSize) -> dict[str, Tensor]:
        """Compute a micro-batch's part of each loss; the parts of all micro-batches of a step sum to it."""
        return {}

    def sums(self, notes: Sequence[Any]) -> dict[str, Tensor | float]:
        """Return further values of a micro-batch, by name, to be summed over the step.

        Prefer a tensor to a Python number if the number would require waiting for the device.
        """
        return {}

    def measure(self, sums: Mapping[str, float], totals: list[Tensor], size: StepSize) -> dict[str, float]:
        """Return the step's :attr:`metrics`.

        ``sums`` has the values of :meth:`sums` and :meth:`losses`, summed over the step.
        """
        return {}

    def why_not(self, kind: str, weights: Tensors) -> str | None:
        """Explain why an analysis (one of :attr:`analyses`) cannot run on these weights; None if it can."""
        return None

    def analyze(self, kind: str, weights: Tensors) -> Findings:
        """Run an analysis (one of :attr:`analyses`) on the whole model's ``weights``, by global name."""
        raise NotImplementedError


def direction_like(new: str, known: Collection[str], like: str | None) -> str | None:
    """Return the known direction whose parameters a new direction copies.

    That is the new direction with one of its languages replaced by ``like``; failing that, the first known
    one with the same target. None if there is none.
    """
    source, target = new.split("-")
    alike = (each for each in known if each.endswith(f"-{target}"))
    return next((each for each in (f"{source}-{like}", f"{like}-{target}", *alike) if each in known), None)

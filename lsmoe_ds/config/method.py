"""The sections by which a recipe turns methods on, and the registry that finds them.

``model.NAME`` in a recipe is the section of the method in the room ``lsmoe_ds/methods/NAME/``, or of a file
``NAME.py`` in one of the folders that the environment variable ``LSMOE_METHODS`` lists. Nothing else knows
which methods there are. No torch here: what a method costs is computed without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic_core import PydanticCustomError

from lsmoe_ds.config.section import Section
from lsmoe_ds.config.shapes import Count, MatrixProduct, Shape, SideName
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError

if TYPE_CHECKING:
    from lsmoe_ds.config.model import Model
    from lsmoe_ds.config.recipe import Recipe, Training

ROOMS = "lsmoe_ds.methods"
VARIABLE = "LSMOE_METHODS"
MISFIT = "misfit"  # the type of an error: a method does not fit its model
# Which of a method's parameters are counted: all; those of the languages; or those that all languages share.
Held = Literal["all", "specific", "shared"]


@dataclass(frozen=True)
class Chart:
    """A metric that the report draws over the steps, with the value that it aims at, if it has one."""

    title: str
    metric: str
    aim: float | None = None


class MethodSection(Section):
    """What a recipe says of one method, and what the method costs. Each default says that it adds nothing."""

    # The key in ``model``, and the name of the room or file.
    name: ClassVar[str]
    # A key that, if true, gives the model a second route, the shared one.
    shared_route: ClassVar[str | None] = None
    # Keys, such as "rank" or "prune.languages", of lists of language codes or mappings by them; "families.*"
    # are all lists of a mapping.
    by_language: ClassVar[tuple[str, ...]] = ()
    # Why no dense model computes the same; None if one does.
    unmergeable: ClassVar[str | None] = None
    # Whether it has parameters; some methods have only state that does not train.
    trains: ClassVar[bool] = True
    # Whether a model of transformers can have it.
    in_hosts: ClassVar[bool] = False
    # Whether what it must count over a whole step depends on hidden states.
    reads_states: ClassVar[bool] = False

    @property
    def needs_groups(self) -> bool:
        """Whether what it adds depends on the resource groups of languages (``data.groups``)."""
        return False

    @property
    def reads_dev(self) -> bool:
        """Whether it reads the dev set before the first step (:meth:`lsmoe_ds.methods.base.Method.begin`)."""
        return False

    @property
    def begins(self) -> bool:
        """Whether it is found out when a training starts from a model: none can be given it before."""
        return self.reads_dev

    @property
    def distills(self) -> bool:
        """Whether it trains a shared route beside the specific one."""
        return self.shared_route is not None and bool(getattr(self, self.shared_route))

    def check(self, model: Model) -> None:
        """Raise ValueError if the method does not fit the model."""

    def checked(self, model: Model) -> None:
        """Call :meth:`check`, and place the error that it raises at the method's own key."""
        try:
            self.check(model)
        except Exception as error:
            said = str(error)
            if not isinstance(error, ValueError):  # a fault of the method itself
                at = traceback.extract_tb(error.__traceback__)[-1]
                said = f"its check fails: {type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
            raise PydanticCustomError(MISFIT, "{said}", {"said": said, "inner": (self.name,)}) from error

    def check_languages(self, languages: Languages) -> None:
        """Raise ValueError if the method does not fit the recipe's languages."""

    def choosing(self, model: Model) -> Any:
        """Return by which languages parameters are chosen, by site: a trained model keeps it."""
        return None

    def stand_in(self, direction: Direction, languages: Languages) -> Direction | None:
        """Return the trained direction whose parameters one takes that was never trained.

        None if no parameters are those of a direction. Raises ValueError, with a sentence, if none fits.
        """
        return None

    def takes(self, route: str) -> bool:
        """Tell whether a route, beside specific and shared, is one that the method knows."""
        return False

    @property
    def own_routes(self) -> tuple[str, ...]:
        """Name the routes that :meth:`takes`, as a person would write them."""
        return ()

    def holdings(self, languages: Languages) -> Mapping[str, int]:
        """Return how many rows each language has in a parameter, in their order; nothing if none has any."""
        return {}

    def check_training(self, training: Training) -> None:
        """Raise ValueError if the method does not fit how the recipe trains."""

    def notices(self, recipe: Recipe) -> Iterator[str]:
        """Yield sentences on what the recipe of a training says that is allowed and seldom meant."""
        return iter(())

    def check_takes_over(self, trained: Any) -> None:
        """Raise UserError unless a model can start with the parameters of a ``trained`` section of this name,
        for a reason that can be told better than by their names and shapes.
        """

    def check_begin(self, recipe: Recipe) -> None:
        """Raise UserError if something is missing that a training reads before its first step."""

    def check_grown(self, before: Any, languages: Languages) -> None:
        """Raise UserError if a model of the section ``before`` and its ``languages`` cannot grow to this one.

        That :meth:`choosing` stays the same is checked for all methods.
        """

    def is_at(self, site: Shape) -> bool:
        """Tell whether the method adds a module at a site."""
        return False

    def build(self, recipe: Recipe, topology: Any) -> Any:
        """Return the :class:`lsmoe_ds.methods.base.Method` of a model of this recipe."""
        raise NotImplementedError

    def count(self, site: Any, languages: Languages, held: Held = "all") -> Count:
        """Count the parameters that it adds at a site where it :meth:`is_at`."""
        return Count()

    def count_served(self, site: Any) -> Count:
        """Count what the dense model of a direction has more, or less, at a site where it :meth:`is_at`."""
        return Count()

    @property
    def served_at_most(self) -> bool:
        """Whether only training tells how much smaller the dense model of a direction is."""
        return False

    def count_masks(self, site: Any, languages: Languages) -> Count:
        """Count the truth values of its masks, a byte of memory each, at a site where it :meth:`is_at`."""
        return Count()

    def count_side(self, side: SideName, model: Model, languages: Languages) -> Count:
        """Count the parameters that several sites of a side share."""
        return Count()

    def largest(self, model: Model, languages: Languages) -> int:
        """Count the values of its largest parameter, if that may be larger than the embedding."""
        return 0

    def products(self, site: Any) -> list[MatrixProduct]:
        """List the matrix products that it adds at a site for each token that the site reads."""
        return []

    def values(self, site: Any, tensor: int) -> int:
        """Count the values that a site stores of each token for the backward pass, on one of ``tensor``
        ranks.
        """
        return 0

    def figures(self, model: Model, languages: Languages) -> dict[str, int]:
        """Return further counts of parameters that a plan shows, by what they count."""
        return {}

    def describe(self) -> str:
        """Say in a few words what the model has by this method: "gates after each sublayer"."""
        return self.name

    def charts(self) -> list[Chart]:
        """Return what the report draws of it."""
        return []


@cache
def sections() -> Mapping[str, type[MethodSection]]:
    """Return the section of every method by name, in the order in which models install them.

    Raises UserError for a folder or a file of ``LSMOE_METHODS`` that holds no method.
    """
    own = Path(__file__).parent.parent / "methods"
    found = {
        path.parent.name: f"{ROOMS}.{path.parent.name}.settings" for path in sorted(own.glob("*/settings.py"))
    }
    kinds = {name: _only_section(importlib.import_module(module)) for name, module in found.items()}
    for folder in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        if not Path(folder).is_dir():
            raise UserError(f"{VARIABLE} lists {folder}, which is no folder")
        for path in sorted(Path(folder).glob("[!_]*.py")):
            if path.stem in kinds:
                raise UserError(f"{path}, of {VARIABLE}, cannot be a method: there is another '{path.stem}'")
            kinds[path.stem] = _only_section(_load(path))
    return kinds


def _load(path: Path) -> ModuleType:
    """Import a file as the module ``lsmoe_ds.methods.NAME``, by which its objects can be pickled."""
    name = f"{ROOMS}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    own = Path(__file__).parent.parent / "methods" / f"{path.stem}.py"
    if spec is None or spec.loader is None or own.exists():
        raise UserError(f"{path}, of {VARIABLE}, cannot be a method: lsmoe_ds has a module of this name")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"{path}, of {VARIABLE}, cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def _only_section(module: ModuleType) -> type[MethodSection]:
    """Return the one section that a module defines."""
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, MethodSection)
        and value.__module__ == module.__name__
    ]
    if len(kinds) != 1:
        where, wanted = (
            getattr(module, "__file__", module.__name__),
            "one subclass of MethodSection, with a name",
        )
        raise UserError(f"{where} defines {len(kinds)} sections of a recipe: a method has {wanted}")
    place = Path(str(module.__file__))
    wanted = place.parent.name if place.name == "settings.py" else place.stem
    if (name := getattr(kinds[0], "name", None)) != wanted:
        raise UserError(f"{place} defines the method {name!r}: its name must be that of the file, {wanted!r}")
    return kinds[0]


def shared_route_keys() -> list[str]:
    """Return the keys that give a model a shared route."""
    return ["moe.fuse_distillation"] + [
        f"model.{name}.{kind.shared_route}" for name, kind in sections().items() if kind.shared_route
    ]

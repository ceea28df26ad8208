"""The sections by which a recipe turns methods on, and the registry that finds them.

``model.NAME`` in a recipe is the section of the method in the package ``lsmoe_ds/methods/NAME/``, or in a
file ``NAME.py`` in a folder that the environment variable ``LSMOE_METHODS`` lists. No other code knows which
methods exist. No torch here: the costs of methods are computed without it.
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
# Which of a method's parameters are counted: all; those of single languages; or those that all share.
Held = Literal["all", "specific", "shared"]


@dataclass(frozen=True)
class Chart:
    """A metric that the report draws over the steps, with its target value, if it has one."""

    title: str
    metric: str
    aim: float | None = None


class MethodSection(Section):
    """The settings of one method in a recipe, and its costs. By default a method adds nothing."""

    # The key in ``model``, and the name of the package or file.
    name: ClassVar[str]
    # A key that, if true, gives the model a second route, the shared one.
    shared_route: ClassVar[str | None] = None
    # Keys whose values are lists of language codes, or mappings from them, such as "rank" or
    # "prune.languages". "families.*" means all lists in the mapping "families".
    by_language: ClassVar[tuple[str, ...]] = ()
    # Keys whose values are mappings from directions to directions.
    by_direction: ClassVar[tuple[str, ...]] = ()
    # Why no dense model computes the same; None if one does.
    unmergeable: ClassVar[str | None] = None
    # Whether it has parameters; some methods have only state that does not train.
    trains: ClassVar[bool] = True
    # Whether a model of transformers can have the method.
    in_hosts: ClassVar[bool] = False
    # Whether the totals that it needs of a whole step depend on hidden states.
    reads_states: ClassVar[bool] = False

    @property
    def needs_groups(self) -> bool:
        """Whether its parameters depend on the resource groups of languages (``data.groups``)."""
        return False

    @property
    def reads_dev(self) -> bool:
        """Whether it reads the dev set before the first step (:meth:`lsmoe_ds.methods.base.Method.begin`)."""
        return False

    @property
    def begins(self) -> bool:
        """Whether it is determined when training starts, so that growing a model cannot add it."""
        return self.reads_dev

    @property
    def distills(self) -> bool:
        """Whether it trains a shared route beside the specific one."""
        return self.shared_route is not None and bool(getattr(self, self.shared_route))

    def check(self, model: Model) -> None:
        """Raise ValueError if the method does not fit the model."""

    def checked(self, model: Model) -> None:
        """Call :meth:`check`, and turn its error into one about the method's own key."""
        try:
            self.check(model)
        except Exception as error:
            said = str(error)
            if not isinstance(error, ValueError):  # a bug of the method
                at = traceback.extract_tb(error.__traceback__)[-1]
                said = f"its check fails: {type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
            raise PydanticCustomError(MISFIT, "{said}", {"said": said, "inner": (self.name,)}) from error

    def check_languages(self, languages: Languages) -> None:
        """Raise ValueError if the method does not fit the recipe's languages."""

    def choosing(self, model: Model) -> Any:
        """Return how languages choose parameters at each site, which must not change in a trained model."""
        return None

    def stand_in(self, direction: Direction, languages: Languages) -> Direction | None:
        """Return the trained direction whose parameters an untrained ``direction`` uses.

        None if the method has no parameters of single directions. Raises ValueError if none fits.
        """
        return None

    def takes(self, route: str) -> bool:
        """Tell whether the method has this route, beside "specific" and "shared"."""
        return False

    @property
    def own_routes(self) -> tuple[str, ...]:
        """Return the names of the routes for which :meth:`takes` is true, for error messages."""
        return ()

    def holdings(self, languages: Languages) -> Mapping[str, int]:
        """Return how many rows of a parameter each language has, in their order; empty if there are none."""
        return {}

    def check_training(self, training: Training) -> None:
        """Raise ValueError if the method does not fit how the recipe trains."""

    def notices(self, recipe: Recipe) -> Iterator[str]:
        """Yield warnings about settings of a recipe that are allowed but rarely intended."""
        return iter(())

    def check_takes_over(self, trained: Any) -> None:
        """Raise UserError if a model cannot start with the parameters of the section ``trained`` of this
        name.

        Only needed where the error can be clearer than one about names and shapes of parameters.
        """

    def check_begin(self, recipe: Recipe) -> None:
        """Raise UserError if a file is missing that training reads before its first step."""

    def check_grown(self, before: Any, languages: Languages) -> None:
        """Raise UserError if a model with the section ``before`` and these ``languages`` cannot grow to this
        one.

        For all methods the caller checks that :meth:`choosing` stays the same.
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
        """Count the parameters that it adds to (or removes from) the dense model of a direction at a site."""
        return Count()

    @property
    def served_at_most(self) -> bool:
        """Whether training decides how much smaller the dense model of a direction gets."""
        return False

    def count_masks(self, site: Any, languages: Languages) -> Count:
        """Count the booleans of its masks, a byte of memory each, at a site where it :meth:`is_at`."""
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
        """Count the values per token that it stores at a site for the backward pass, on one of ``tensor``
        ranks.
        """
        return 0

    def figures(self, model: Model, languages: Languages) -> dict[str, int]:
        """Return further counts of parameters that a plan shows, by what they count."""
        return {}

    def describe(self) -> str:
        """Describe in a few words what the method adds to the model: "gates after each sublayer"."""
        return self.name

    def charts(self) -> list[Chart]:
        """Return the charts of its metrics for the report."""
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
    """Import a file as the module ``lsmoe_ds.methods.NAME``, so that its objects can be pickled."""
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

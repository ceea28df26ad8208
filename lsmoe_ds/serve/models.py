"""The models that a server was given: their directions, and how each is opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lsmoe_ds.checkpoint.stored import READABLE, Stored, find_model
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import check_convertible
from lsmoe_ds.inference.load import check_route
from lsmoe_ds.languages import normalize_code
from lsmoe_ds.notices import counted
from lsmoe_ds.serve.settings import Settings

Way = Literal["cut", "convert", "whole"]
LONGEST_CODE = 40  # of a language


@dataclass(frozen=True)
class Served:
    """A model, and the ``way`` to serve it.

    "cut": extract the sub-network of each direction. "convert": convert the whole model once (a dense model,
    for CTranslate2). "whole": load it unchanged.
    """

    name: str
    path: Path
    stored: Stored
    way: Way
    engine: str

    @property
    def directions(self) -> tuple[Direction, ...]:
        return self.stored.recipe.languages.directions

    def unit(self, direction: Direction) -> Direction | None:
        """Return the direction that one engine serves; None if one engine serves all directions."""
        return direction if self.way == "cut" else None

    def describe(self) -> str:
        """Describe in one line what is served, and how."""
        count = counted(len(self.directions), "direction")
        what = {
            "cut": f"the sub-network of each of {count} is extracted when it is first requested",
            "convert": f"{count} in one dense model, converted when it is first requested",
            "whole": f"{count} in one model, loaded when it is first requested",
        }
        return f"{self.name}, of {self.path}: {what[self.way]}; {self.engine}"


def find_served(paths: Sequence[Path], settings: Settings) -> list[Served]:
    """Find the models at these paths. Raises UserError for an unusable path or option."""
    found: list[Served] = []
    for path in paths:
        stored = find_model(path)
        own = stored.recipe.name
        names = {each.name for each in found}
        name = next(each for each in (own, *(f"{own}-{i}" for i in range(2, 10**6))) if each not in names)
        found.append(_served(name, path, stored, settings))
    if settings.quantization and not any(
        each.engine == "ctranslate2" and each.way != "whole" for each in found
    ):
        raise UserError("--quantization is for models that are converted to CTranslate2: there is none here")
    return found


def _served(name: str, path: Path, stored: Stored, settings: Settings) -> Served:
    recipe, kind = stored.recipe, stored.kind
    if recipe.model.task != "translate":
        raise UserError(f"{path} is a model whose task is to {recipe.model.task}: `lsmoe serve` translates")
    check_route(settings.route, recipe)
    has_library = importlib.util.find_spec("ctranslate2") is not None
    if kind == "ctranslate2":
        if settings.engine == "torch":
            raise UserError(f"{path} was converted to CTranslate2: leave --engine torch out, or give the run")
        return Served(name, path, stored, "whole", "ctranslate2")
    if kind not in READABLE:
        raise UserError(f"{path} was made by `lsmoe convert --as {kind}`, which is not served: give the run")
    if settings.engine == "ctranslate2":
        if not has_library:
            raise UserError("CTranslate2 is not installed: pip install ctranslate2")
        if recipe.model.huggingface is not None:
            raise UserError(
                f"{path} is a model of transformers, which CTranslate2 is not for: --engine torch"
            )
    fits = recipe.model.huggingface is None and has_library and settings.engine != "torch"
    engine = "ctranslate2" if fits else "torch"
    if recipe.model.huggingface is not None:
        return Served(name, path, stored, "whole", "torch")
    if stored.is_dense:
        return Served(name, path, stored, "convert" if fits else "whole", engine)
    refused = UserError(f"{path} has no directions")
    for direction in (None, recipe.languages.directions[0]):
        try:
            check_convertible(recipe, direction, settings.route)
        except UserError as error:
            refused = error
        else:
            return Served(name, path, stored, "cut" if direction else "convert", engine)
    if settings.engine == "ctranslate2":
        raise refused
    return Served(name, path, stored, "whole", "torch")


class Catalog:
    """The directions of several models. If two models have the same one, the model given first serves it."""

    def __init__(self, models: Iterable[Served]) -> None:
        self.models = {each.name: each for each in models}
        self._of: dict[Direction, Served] = {}
        for each in self.models.values():
            for direction in each.directions:
                self._of.setdefault(direction, each)
        self.targets: dict[str, list[str]] = {}
        for direction in sorted(self._of):
            self.targets.setdefault(direction.source, []).append(direction.target)
        self.codes = tuple(sorted({code for each in self._of for code in (each.source, each.target)}))
        self._by_meaning = {normalize_code(code): code for code in reversed(self.codes)}

    @property
    def directions(self) -> tuple[Direction, ...]:
        return tuple(self._of)

    def find(self, direction: Direction) -> Served | None:
        """Return the model that translates in a direction."""
        return self._of.get(direction)

    def own(self, text: str) -> str | None:
        """Return the models' own code for a language code of any convention, or None.

        Does not use :func:`lsmoe_ds.languages.find_code`, which caches every argument: this text comes from
        untrusted clients.
        """
        text = text.strip()
        if text in self.codes or len(text) > LONGEST_CODE or not text.isascii():
            return text if text in self.codes else None
        meaning = normalize_code.__wrapped__(text)
        if meaning not in self._by_meaning and meaning in ("no", "nb"):  # either stands for the other
            meaning = "nb" if meaning == "no" else "no"
        return self._by_meaning.get(meaning)

    def sources(self, target: str) -> list[str]:
        """Return the source languages of all directions into a target."""
        return [source for source, targets in self.targets.items() if target in targets]

"""What translates: torch, or CTranslate2."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from lsmoe_ds.checkpoint.stored import READABLE, find_model
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.beam_search import Hypothesis, Search
from lsmoe_ds.inference.ctranslate2 import CTranslate2
from lsmoe_ds.inference.load import Loaded, check_route, load, with_direction
from lsmoe_ds.languages import Direction, Languages, nearest
from lsmoe_ds.methods.context import Route
from lsmoe_ds.notices import listed, notice

ENGINES = ("torch", "ctranslate2")


class Engine(Protocol):
    """A model ready to translate; the fields are those of :class:`lsmoe_ds.inference.load.Loaded`."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def languages(self) -> Languages: ...
    @property
    def step(self) -> int: ...
    @property
    def home(self) -> Path: ...
    @property
    def route(self) -> Route: ...

    def search(self, sources: Sequence[Sequence[int]], direction: Direction, search: Search) -> list[Hypothesis]:
        """The best translation of each of B token sequences (without tag and EOS), which are one batch."""
        ...


def find_direction(engine: Engine, direction: Direction) -> Direction:
    """Return a direction as :func:`own_direction`. One that the model was not trained on (zero-shot) is said on standard error;
    of what a model has learned that was imported and not trained here, nothing is known.
    """
    own = own_direction(engine, direction)
    if own not in engine.languages.directions and engine.step:
        say_untrained([own])
    return own


def own_direction(engine: Engine, direction: Direction) -> Direction:
    """Return a direction in the codes of the engine's system.

    Raises UserError for languages that the system lacks, and for a zero-shot direction that the model cannot take.
    """
    languages = engine.languages
    own = Direction(languages.own(direction.source), languages.own(direction.target))
    if own in languages.directions or not isinstance(engine, Loaded):
        return languages.find(own)
    with_direction(engine.recipe, engine.kind, own)
    return own


def say_untrained(directions: Iterable[Direction]) -> None:
    """Say on standard error which directions a model is used for that it was not trained on."""
    notice(f"the model was not trained on {listed(map(str, directions))} (zero-shot)")


def load_engine(path: str | Path, route: str = "specific", engine: str | None = None, direction: Direction | None = None) -> Engine:
    """Loads whatever :func:`lsmoe_ds.checkpoint.stored.find_model` finds into the engine that it is for, or into ``engine``.

    For CTranslate2, a run or dense folder is converted on the way, for ``direction``. Raises UserError where a path, route,
    engine or conversion is not possible.
    """
    if engine is not None and engine not in ENGINES:
        raise UserError(f"'{engine}' is no engine{nearest(engine, ENGINES)}: choose {' or '.join(ENGINES)}")
    stored = find_model(path)
    if stored.kind == "ctranslate2" and engine != "torch":
        return CTranslate2.load(stored, check_route(route, stored.recipe))
    if engine != "ctranslate2" or stored.kind not in READABLE:
        return load(path, route=route)
    from lsmoe_ds.export.ctranslate2 import write_files  # what only converts, torch's engine does without
    from lsmoe_ds.export.subnetwork import extract_stored

    tensors, recipe, made = extract_stored(stored, direction, route)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), tensors, recipe, stored.vocabulary)
        return CTranslate2.open(Path(folder), recipe, stored.vocabulary, int(made["step"]), stored.home)

"""The engines that translate: torch and CTranslate2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from lsmoe_ds.checkpoint.stored import PROVENANCE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import read_json
from lsmoe_ds.inference.beam_search import Hypothesis, Search
from lsmoe_ds.inference.load import Loaded, known_direction
from lsmoe_ds.methods.context import Route
from lsmoe_ds.notices import listed, notice


class Ready(Protocol):
    """A model ready for its task; the fields are those of :class:`lsmoe_ds.inference.load.Loaded`."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def languages(self) -> Languages: ...


class Engine(Ready, Protocol):
    """A model ready to translate."""

    @property
    def step(self) -> int: ...
    @property
    def home(self) -> Path: ...
    @property
    def route(self) -> Route: ...

    def search(
        self, sources: Sequence[Sequence[int]], direction: Direction, search: Search
    ) -> list[list[Hypothesis]]:
        """Find the best translations of each of B token sequences (without tag and EOS), as one batch: at
        most ``search.n_best``, at least one, best first.
        """
        ...


def find_direction(engine: Engine, direction: Direction) -> Direction:
    """Return a direction as :func:`own_direction` does, and warn on standard error if the model was not
    trained on it (zero-shot). Nothing is known about the training of an imported model.
    """
    own = own_direction(engine, direction)
    if engine.step:  # of an imported model, it is not known
        warn_if_untrained(engine.recipe, engine.home, [own])
    return own


def warn_if_untrained(recipe: Recipe, home: Path, directions: Iterable[Direction]) -> None:
    """Warn on standard error about those of the directions on which the model in ``home`` was not trained."""
    # A converted folder lists the directions of its training, without those added by growing. A run trains
    # those of its recipe.
    training = recipe.training
    provenance = read_json(home / PROVENANCE) or {
        "trained": [str(each) for each in recipe.trained],
        "started_from": None if training.start_from is None else str(training.start_from),
    }
    trained, start, known = (
        provenance.get("trained"),
        provenance.get("started_from"),
        recipe.languages.directions,
    )
    if found := [
        each
        for each in directions
        if each not in known or (isinstance(trained, list) and str(each) not in trained)
    ]:
        say_untrained(found, start)


def own_direction(engine: Engine, direction: Direction) -> Direction:
    """Return a direction in the codes of the engine's system.

    Raises UserError for languages that the system lacks, and for a zero-shot direction that the model cannot
    translate.
    """
    languages = engine.languages
    if (task := engine.recipe.model.task) != "translate":
        raise UserError(f"the task of the model is to {task}: use `lsmoe label`")
    if not isinstance(engine, Loaded):
        return languages.find(Direction(languages.own(direction.source), languages.own(direction.target)))
    return known_direction(engine.recipe, engine.kind, direction)


def say_untrained(directions: Iterable[Direction], started_from: str | None = None) -> None:
    """Warn on standard error about directions on which a model was not trained; the model that it
    ``started_from`` may have been.
    """
    which = listed(each.label for each in directions)
    more = "(zero-shot)" if started_from is None else f"here; it started from {started_from}"
    notice(f"the model was not trained on {which} {more}")

"""The study file: a base recipe, and the changes that each member makes to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lsmoe_ds import shipped
from lsmoe_ds.config.file import read_mapping, validate
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.section import Positive, Section
from lsmoe_ds.convert.recipes import open_recipe
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import nearest

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
DIRECTIONS = "training.directions"
# What a member may not change, and why.
FIXED = {
    "name": "the members share the name of the base recipe and its prepared data",
    "training.steps": "the members take the same steps",
    "training.seed": "the study's 'seeds' say it",
    DIRECTIONS: "the members train on the same directions, or with 'each_direction' on each alone",
}


class Evaluate(Section):
    """The options of ``lsmoe evaluate``. ``directions`` selects the trained directions or all in the data."""

    directions: Literal["trained", "all"] = "trained"
    beam: Positive = 5
    length_penalty: float = 1.0
    split: Literal["test", "dev"] = "test"
    limit: Positive | None = None


class Distilled(Section):
    """How a member learns from the run of the member ``of`` (:class:`lsmoe_ds.distill.Distillation`)."""

    of: str
    level: Literal["sequence", "word", "both"] = "sequence"
    experts: Literal["used", "mean"] = "mean"
    limit: Positive | None = None
    beam: Positive = 5


class Member(Section):
    """A member of a study: ``set`` is merged into the base recipe, and each of ``routes`` is evaluated.

    A member that is not ``trained`` is the unchanged model of ``training.start_from``. With
    ``each_direction`` the member has one model for each direction, trained on that direction alone for so
    many steps. ``seeds`` selects from the study's seeds, by default all. With ``distill`` the member is
    another member's student.
    """

    trained: bool = True
    each_direction: Positive | None = None
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    distill: Distilled | None = None
    title: Annotated[str, Field(min_length=1)] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    routes: Annotated[tuple[str, ...], Field(min_length=1)] = ("specific",)

    @field_validator("title")
    @classmethod
    def _one_line(cls, value: str | None) -> str | None:
        return value if value is None else " ".join(value.split())

    @model_validator(mode="after")
    def _same_data_and_steps(self) -> Member:
        if len(self.routes) > len(set(self.routes)):
            raise ValueError("'routes' names a route twice")
        if self.each_direction is not None and not self.trained:
            raise ValueError("'each_direction' trains, but 'trained' is false: leave one out")
        if self.seeds is not None and not self.trained:
            raise ValueError("'seeds' is of a training, but 'trained' is false: leave one out")
        if self.seeds is not None and len(self.seeds) > len(set(self.seeds)):
            raise ValueError("'seeds' names a seed twice")
        if self.distill is not None and not self.trained:
            raise ValueError("'distill' is of a training, but 'trained' is false: leave one out")
        for key in _keys(self.set):
            if key in FIXED and key != DIRECTIONS:  # FIXED keys are the same in the whole study
                raise ValueError(f"'set' changes {key}, but {FIXED[key]}")
            if key == "data" or (key.startswith("data.") and key.split(".")[1] != "batch"):
                raise ValueError(
                    f"'set' changes {key}, but the members share their data: only data.batch may differ"
                )
        return self


class Settings(Section):
    """The study file. ``recipe`` is relative to the file; a run's ``training.seed`` is one of ``seeds``."""

    name: Name
    recipe: Path
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1,)
    baseline: str
    evaluate: Evaluate = Evaluate()
    members: Annotated[dict[Name, Member], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if len(self.seeds) > len(set(self.seeds)):
            raise ValueError("'seeds' names a seed twice")
        if self.baseline not in self.members:
            raise ValueError(
                f"'baseline' is {self.baseline}, which is no member{nearest(self.baseline, self.members)}: "
                f"the members are {', '.join(self.members)}"
            )
        for name, member in self.members.items():
            if wrong := [seed for seed in member.seeds or () if seed not in self.seeds]:
                raise ValueError(
                    f"'seeds' of member '{name}' names {wrong[0]}, which is not among those of the study: "
                    f"{', '.join(map(str, self.seeds))}"
                )
            if member.distill is not None:
                self._check_teacher(name, member.distill.of)
            # Members may train on different directions only if all directions are scored.
            if DIRECTIONS in _keys(member.set) and self.evaluate.directions == "trained":
                raise ValueError(
                    f"in member '{name}' 'set' changes {DIRECTIONS}, but {FIXED[DIRECTIONS]}; or let "
                    "'evaluate.directions' be all"
                )
        return self

    def _check_teacher(self, name: str, of: str) -> None:
        """Raise ValueError unless a member can learn from the member ``of`` with each of its seeds."""
        teacher = self.members.get(of)
        if teacher is None:
            raise ValueError(
                f"'distill.of' of member '{name}' is {of}, which is no member{nearest(of, self.members)}: "
                f"the members are {', '.join(self.members)}"
            )
        if teacher.distill is not None or teacher.each_direction is not None:
            raise ValueError(
                f"'distill.of' of member '{name}' is {of}, which is itself distilled or a model for each "
                "direction: name one model that is trained on all"
            )
        if lacking := [seed for seed in self.seeds_of(name) if seed not in self.seeds_of(of)]:
            raise ValueError(
                f"member '{name}' learns from {of}, which is not trained with seed {lacking[0]}: give it "
                "'seeds'"
            )

    def seeds_of(self, member: str) -> tuple[int, ...]:
        """Return the seeds of a member, in the study's order."""
        own = self.members[member].seeds
        return tuple(seed for seed in self.seeds if own is None or seed in own)


@dataclass(frozen=True)
class Study:
    """A study file with the recipe of each member; :meth:`recipe` sets the seed."""

    settings: Settings
    base: Path
    recipes: Mapping[str, Recipe]

    @property
    def steps(self) -> int:
        return self.recipes[self.settings.baseline].training.steps

    @property
    def prepared(self) -> Path:
        return self.recipes[self.settings.baseline].prepared

    def recipe(self, member: str, seed: int, alone: Direction | None = None) -> Recipe:
        """Return the whole recipe of one run; ``alone`` is its direction if each has its own model."""
        recipe = self.recipes[member]
        changes: dict[str, Any] = {"seed": seed}
        if alone is not None:
            steps = self.settings.members[member].each_direction
            changes |= {"directions": [str(alone)], "steps": steps}
        return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})

    def models(self, member: str) -> tuple[Direction | None, ...]:
        """List the directions for which a member has its own model; None means all."""
        if self.settings.members[member].each_direction is None:
            return (None,)
        return self.recipes[member].trained

    def scored(self, member: str) -> tuple[Direction, ...]:
        """List the directions in which a member is scored; directions without text are skipped later."""
        recipe = self.recipes[member]
        return (
            recipe.trained if self.settings.evaluate.directions == "trained" else recipe.languages.directions
        )

    def title(self, member: str, route: str) -> str:
        """Return the title of a row; it names the route if the member has several."""
        chosen = self.settings.members[member]
        return (chosen.title or member) + (f", {route}" if len(chosen.routes) > 1 else "")

    def rows(self) -> list[tuple[str, str]]:
        """Return (member, route) of each row of the tables."""
        return [(name, route) for name, member in self.settings.members.items() for route in member.routes]


def load_study(path: str | Path) -> Study:
    """Read a study and the recipe of every member. ``path`` may be the name of a study that is included.

    Raises UserError, which says where the error is and what is allowed.
    """
    path = shipped.choose("study", path)
    value, places = read_mapping(path, "study", Settings)
    settings = validate(Settings, value, path, places)
    base = path.parent / settings.recipe
    base = base if base.exists() else shipped.find("recipe", settings.recipe) or base
    open_recipe(base)  # first, so that its errors are not reported as a member's
    recipes = {}
    for name, member in settings.members.items():
        try:
            recipes[name] = open_recipe(base, changes=member.set, changed_by="'set'")
            if not member.trained and recipes[name].training.start_from is None:
                raise UserError("'trained' is false, but there is no training.start_from to evaluate")
        except UserError as error:
            raise UserError(f"member '{name}' of {path}: {error}") from None
    return Study(settings, base, recipes)


def _keys(value: Mapping[str, Any], at: str = "") -> list[str]:
    """Return the key, such as ``a.b``, of every value that is not a mapping or is an empty one."""
    found = []
    for key, child in value.items():
        here = f"{at}{key}"
        found += _keys(child, f"{here}.") if isinstance(child, Mapping) and child else [here]
    return found

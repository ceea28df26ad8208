"""Directions and tasks, and the numbers that identify them in everything language-specific.

A direction is written ``en-de``, after codes of :mod:`lsmoe_ds.languages`.
:mod:`lsmoe_ds.config.codes` reads directions that a user wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import (
    CODE,
    UNKNOWN,
    check_code,
    find_code,
    is_english,
    is_script,
    nearest,
    table,
    tag,
)

if TYPE_CHECKING:
    from torch import Tensor


def not_a_direction(text: str) -> str:
    """Return the error for a text that is not a direction of translation."""
    return f"'{text}' is not a direction: write source-target with two different codes, such as en-de"


@dataclass(frozen=True, order=True)
class Direction:
    """Translation from ``source`` into ``target``, or, for labelled text, a single language."""

    source: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Direction:
        """Parse the result of ``str``, which may be a single language (``de-de``).

        Raises UserError for other text.

        :func:`lsmoe_ds.config.codes.read_direction` reads what a user wrote.
        """
        parts = text.split("-")
        if len(parts) != 2 or not all(CODE.match(p) for p in parts):
            raise UserError(not_a_direction(text))
        return cls(*parts)

    @classmethod
    def parse_translation(cls, text: str) -> Direction:
        """Parse a direction between two languages. Raises UserError for anything else."""
        found = cls.parse(text)
        if found.alone:
            raise UserError(not_a_direction(text))
        return found

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"

    @property
    def alone(self) -> bool:
        """Tell whether this is a single language rather than a translation."""
        return self.source == self.target

    @property
    def label(self) -> str:
        """Return how tables name it: ``en-de``, or ``de`` for a single language."""
        return self.source if self.alone else str(self)

    @property
    def reverse(self) -> Direction:
        return Direction(self.target, self.source)

    @property
    def bitext(self) -> str:
        """Return the name of the parallel text of this direction and its reverse: the two codes in order,
        ``de-en``.
        """
        return "-".join(sorted((self.source, self.target)))


def english_centric(languages: Iterable[str]) -> list[Direction]:
    """Return both directions between English and each other language, in the order given."""
    others = [check_code(code) for code in dict.fromkeys(languages) if not is_english(code)]
    return [d for code in others for d in (Direction("en", code), Direction(code, "en"))]


GROUPS = ("high", "medium", "low", "very_low")  # resource groups of languages, richest first

TASKS = ("target", "source", "pair")


def task_language(task: str) -> str:
    """Return the language of a task: a language itself, or the language of a pair that is not English."""
    source, _, target = task.partition("-")
    return target if target and is_english(source) else source


def task_order(task: str) -> tuple[str, str, str, str]:
    """Return a sort key that groups the tasks of related languages: family, script, name.

    Static routing and expert groups follow this order, so it must never change for a trained model. Codes are
    therefore looked up as written, without normalization, and languages without a family are last, by code.
    """
    source, _, target = task.partition("-")
    code = target if target and source == "en" else source
    base, _, rest = code.partition("_")
    written = next((part for part in rest.split("_") if is_script(part)), "")
    entry = table().get(code) or table().get(base)
    if entry is None or not entry.family:
        return UNKNOWN, written, code, task
    name = entry.name if entry.code == code else f"{entry.name} ({rest.replace('_', ', ')})"
    return entry.family, written or entry.script, name, task


@dataclass(frozen=True)
class Languages:
    """The directions of one system, and the numbers of its languages, directions and tasks.

    The number of a language is its index in ``codes`` (sorted); that of a direction is its index in
    ``directions``.
    """

    directions: tuple[Direction, ...]
    groups: Mapping[str, str] = field(default_factory=dict, hash=False)  # resource group of each language

    @cached_property
    def codes(self) -> tuple[str, ...]:
        return tuple(sorted({code for d in self.directions for code in (d.source, d.target)}))

    def find(self, direction: Direction) -> Direction:
        """Return the same direction in the system's own codes. Raises UserError if there is none."""
        found = Direction(self.own(direction.source), self.own(direction.target))
        if found not in self.directions:
            if direction.alone and not self.directions[0].alone:
                raise UserError(not_a_direction(direction.source))
            known = ", ".join(each.label for each in self.directions)
            what = "language" if self.directions[0].alone else "direction"
            raise UserError(f"{what} {direction.label} is not in this system: it knows {known}")
        return found

    def own(self, code: str) -> str:
        """Return the system's own code for a language. Raises UserError if the system lacks the language."""
        found = find_code(code, self.codes)
        if found is None:
            raise UserError(
                f"language '{code}' is not in this system{nearest(code, self.codes)}: it knows "
                f"{', '.join(self.codes)}"
            )
        return found

    def id(self, code: str) -> int:
        """Return the number of a language; see :meth:`own`."""
        return self.codes.index(self.own(code))

    def direction_id(self, direction: Direction) -> int:
        """Return the number of a direction; see :meth:`find`."""
        return self.directions.index(self.find(direction))

    def tasks(self, kind: str) -> tuple[str, ...]:
        """Return the names of a task-routed layer's tasks: languages, or for ``kind`` "pair" directions."""
        return tuple(str(d) for d in self.directions) if kind == "pair" else self.codes

    def task_id(self, kind: str, direction: Direction) -> int:
        """Return the number of the task of ``direction``: an index into ``tasks(kind)``."""
        return (
            self.direction_id(direction)
            if kind == "pair"
            else self.id(direction.target if kind == "target" else direction.source)
        )

    def task_named(self, kind: str, name: str) -> int:
        """Return the number of a task by its name, a language or a direction. Raises UserError for others."""
        return self.direction_id(Direction.parse(name)) if kind == "pair" else self.id(name)

    def same_target(self, direction: Direction) -> Direction | None:
        """Return the first direction with the same target; None if there is none."""
        return next((each for each in self.directions if each.target == direction.target), None)

    def task_groups(self, kind: str, groups: int) -> tuple[int, ...]:
        """Return the expert group of each task, from 0.

        The tasks, in the order of their families, are split into ``groups`` parts of equal size, so that
        related languages can share experts.
        """
        names = self.tasks(kind)
        order = sorted(range(len(names)), key=lambda task: task_order(names[task]))
        place = {task: position for position, task in enumerate(order)}
        return tuple(place[task] * groups // len(names) for task in range(len(names)))

    @cached_property
    def tags(self) -> tuple[str, ...]:
        return tuple(tag(code) for code in self.codes)


@dataclass(frozen=True)
class SentenceIds:
    """Source language, target language and direction of each of B sentences, as numbers [B].

    Everything language-specific in the model depends on these.
    """

    source: Tensor
    target: Tensor
    direction: Tensor

    def task(self, kind: str) -> Tensor:
        """Return the task of each sentence [B]: indexes into ``Languages.tasks(kind)``."""
        return {"target": self.target, "source": self.source, "pair": self.direction}[kind]

    def select(self, index: Tensor) -> SentenceIds:
        """Return the ids of the sentences in ``index``, in that order."""
        return SentenceIds(self.source[index], self.target[index], self.direction[index])

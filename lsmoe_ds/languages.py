"""Language codes, tags, directions and tasks: the ids that everything language-specific is a function of.

A language code is an ISO 639 code with optional parts after underscores (``de``, ``zh_Hans``, ``sr_Latn``); a direction
is written ``en-de``. Codes from elsewhere (``zh-CN``, ``sr@latin``) are turned into ours by :func:`normalize_code`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lsmoe_ds.errors import UserError

CODE = re.compile(r"[a-z]{2,3}(_[A-Za-z0-9]+)*\Z")


def tag(code: str) -> str:
    """The piece that heads a source sentence and asks for translation into ``code``: ``<2de>``."""
    return f"<2{code}>"


def check_code(code: str) -> str:
    """Returns ``code``; raises UserError if it is not written as a language code."""
    if not CODE.match(code):
        raise UserError(f"'{code}' is not a language code: write an ISO 639 code such as de, pt_BR or zh_Hans")
    return code


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the valid choice closest to ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean '{found[0]}'?)" if found else ""


@dataclass(frozen=True, order=True)
class Direction:
    """Translation from ``source`` into ``target``."""

    source: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Direction:
        parts = text.split("-")
        if len(parts) != 2 or parts[0] == parts[1] or not all(CODE.match(p) for p in parts):
            raise UserError(f"'{text}' is not a direction: write source-target with two different codes, such as en-de")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"

    @property
    def reverse(self) -> Direction:
        return Direction(self.target, self.source)

    @property
    def bitext(self) -> str:
        """Name of the parallel text that serves this direction and its reverse: the two codes in order, ``de-en``."""
        return "-".join(sorted((self.source, self.target)))


def english_centric(languages: Iterable[str]) -> list[Direction]:
    """Both directions between English and each other language, in the order given."""
    others = [check_code(code) for code in dict.fromkeys(languages) if code != "en"]
    return [d for code in others for d in (Direction("en", code), Direction(code, "en"))]


TASKS = ("target", "pair")


@dataclass(frozen=True)
class Languages:
    """The directions of one system, and the numbering of its languages, directions and tasks.

    The number of a language is its place in ``codes`` (sorted), of a direction its place in ``directions``.
    """

    directions: tuple[Direction, ...]

    @cached_property
    def codes(self) -> tuple[str, ...]:
        return tuple(sorted({code for d in self.directions for code in (d.source, d.target)}))

    def id(self, code: str) -> int:
        if code not in self.codes:
            raise UserError(f"language '{code}' is not in this system{nearest(code, self.codes)}: it knows {', '.join(self.codes)}")
        return self.codes.index(code)

    def direction_id(self, direction: Direction) -> int:
        if direction not in self.directions:
            self.id(direction.source), self.id(direction.target)
            known = ", ".join(str(d) for d in self.directions)
            raise UserError(f"direction {direction} is not in this system: it knows {known}")
        return self.directions.index(direction)

    def tasks(self, kind: str) -> tuple[str, ...]:
        """Names of the tasks of a task-routed layer: target languages, or pairs (directions)."""
        return self.codes if kind == "target" else tuple(str(d) for d in self.directions)

    def task_id(self, kind: str, direction: Direction) -> int:
        """Number of the task that ``direction`` belongs to; a place in ``tasks(kind)``."""
        return self.id(direction.target) if kind == "target" else self.direction_id(direction)

    @cached_property
    def tags(self) -> tuple[str, ...]:
        return tuple(tag(code) for code in self.codes)


def parse_directions(texts: Sequence[str], languages: Languages) -> list[Direction]:
    """Directions named on a command line, each checked to be one of the system's."""
    directions = [Direction.parse(text.strip()) for text in texts if text.strip()]
    for direction in directions:
        languages.direction_id(direction)
    return directions

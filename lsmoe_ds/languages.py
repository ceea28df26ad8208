"""Language codes, tags, directions and tasks: the ids that everything language-specific is a function of.

A language code is an ISO 639 code with optional parts after underscores (``de``, ``zh_Hans``, ``sr_Latn``); a direction
is written ``en-de``. Codes from elsewhere (``zh-CN``, ``sr@latin``) are turned into ours by :func:`normalize_code`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lsmoe_ds.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# The first ids of every vocabulary, in the order of fairseq and M2M-100.
BOS, PAD, EOS, UNK = range(4)

CODE = re.compile(r"[a-z]{2,3}(_[A-Za-z0-9]+)*\Z")
TABLE = Path(__file__).with_name("languages.tsv")


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


@dataclass(frozen=True)
class Entry:
    """A row of ``languages.tsv``: our code, ISO 15924 script, family with branch, English name, codes used elsewhere."""

    code: str
    script: str
    family: str
    name: str
    aliases: tuple[str, ...]


@cache
def table() -> dict[str, Entry]:
    """The known languages, by our code."""
    rows = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]]
    return {r[0]: Entry(r[0], r[1], r[2], r[3], tuple(r[4].split(",")) if r[4] else ()) for r in rows}


@cache
def _by_any_code() -> dict[str, str]:
    """Lower-cased codes, ours and others', to ours; where both exist, ours wins (``als`` stands for no code of ours)."""
    others = {alias.lower(): entry.code for entry in table().values() for alias in entry.aliases}
    return others | {code.lower(): code for code in table()}


@cache
def normalize_code(code: str) -> str:
    """Our spelling of a code from elsewhere: ``deu_Latn`` and ``de-DE`` are ``de``, ``zh-CN`` is ``zh_Hans``, ``sr@latin`` is ``sr_Latn``.

    A code that is not known keeps its parts, written our way.
    """
    language, *parts = code.split(".")[0].replace("@", "_").replace("-", "_").split("_")
    parts = [{"latin": "Latn", "cyrillic": "Cyrl"}.get(p, p.title() if len(p) == 4 else p.upper() if len(p) == 2 else p) for p in parts]
    known = _by_any_code()
    whole = "_".join([language.lower(), *parts])
    if whole.lower() in known:
        return known[whole.lower()]
    base = known.get(language.lower(), language.lower())
    whole = "_".join([base, *parts])
    if whole.lower() in known:
        return known[whole.lower()]
    redundant = len(parts) == 1 and (parts[0] == script(base) or parts[0].lower() == base)
    return base if redundant else whole


def script(code: str) -> str | None:
    """ISO 15924 script that a language is written in (``Latn``), or None where it is not known."""
    for part in code.split("_")[1:]:
        if len(part) == 4 and part.isalpha() and part.istitle():
            return part
    entry = table().get(code) or table().get(code.split("_")[0])
    return entry.script if entry else None


def family(code: str) -> str:
    """Family and branch, ``Indo-European, Germanic``; sorting by it puts relatives side by side. ``Unknown`` where it is not known."""
    entry = table().get(code) or table().get(code.split("_")[0])
    return entry.family if entry else "Unknown"


def language_name(code: str) -> str:
    """English name of a language; of a variety the table lacks, with its parts (``Spanish (MX)``); of an unknown one, the code."""
    if code in table():
        return table()[code].name
    base, _, rest = code.partition("_")
    return f"{table()[base].name} ({rest.replace('_', ', ')})" if base in table() else code


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


TASKS = ("target", "source", "pair")


def task_language(task: str) -> str:
    """The language that marks a task: of a language itself, of a pair the one that is not English."""
    source, _, target = task.partition("-")
    return target if target and source == "en" else source


def task_order(task: str) -> tuple[str, str, str, str]:
    """Sorting by it puts the tasks of related languages side by side: family, script, name."""
    language = task_language(task)
    return family(language), script(language) or "", language_name(language), task


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
        """Names of the tasks of a task-routed layer: languages (as targets or sources), or pairs (directions)."""
        return tuple(str(d) for d in self.directions) if kind == "pair" else self.codes

    def task_id(self, kind: str, direction: Direction) -> int:
        """Number of the task that ``direction`` belongs to; a place in ``tasks(kind)``."""
        return self.direction_id(direction) if kind == "pair" else self.id(direction.target if kind == "target" else direction.source)

    def task_groups(self, kind: str, groups: int) -> tuple[int, ...]:
        """Group of experts that each task belongs to, from 0: in the order of their families the tasks are cut into
        ``groups`` parts of equal size, so that relatives can share experts."""
        names = self.tasks(kind)
        order = sorted(range(len(names)), key=lambda task: task_order(names[task]))
        place = {task: position for position, task in enumerate(order)}
        return tuple(place[task] * groups // len(names) for task in range(len(names)))

    @cached_property
    def tags(self) -> tuple[str, ...]:
        return tuple(tag(code) for code in self.codes)


@dataclass(frozen=True)
class SentenceIds:
    """Source language, target language and direction of each of the B sentences of a batch, as numbers [B].

    Everything language-specific in the model is a function of these.
    """

    source: Tensor
    target: Tensor
    direction: Tensor

    def task(self, kind: str) -> Tensor:
        """Task of each sentence [B]: places in ``Languages.tasks(kind)``."""
        return {"target": self.target, "source": self.source, "pair": self.direction}[kind]

    def select(self, index: Tensor) -> SentenceIds:
        """The ids of the sentences ``index`` names, in that order."""
        return SentenceIds(self.source[index], self.target[index], self.direction[index])


def parse_directions(texts: Sequence[str], languages: Languages) -> list[Direction]:
    """Directions named on a command line, each checked to be one of the system's."""
    directions = [Direction.parse(text.strip()) for text in texts if text.strip()]
    for direction in directions:
        languages.direction_id(direction)
    return directions

"""Language codes, tags, directions and tasks, on whose ids everything language-specific depends.

A language code is an ISO 639 code with optional parts after underscores (``de``, ``zh_Hans``, ``sr_Latn``); a
direction is written ``en-de``. :func:`normalize_code` maps codes of other conventions to those of
languages.tsv. :mod:`lsmoe_ds.config.codes` reads codes that a user wrote, and reports what it has replaced.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lsmoe_ds.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# The first ids of every vocabulary, in the order of fairseq and M2M-100.
BOS, PAD, EOS, UNK = range(4)

CODE = re.compile(r"([a-z]{2,3}|x(?=_))(_[A-Za-z0-9]+)*\Z")
TABLE = Path(__file__).with_name("languages.tsv")
SCRIPTS = {
    "latin": "Latn",
    "cyrillic": "Cyrl",
    "arabic": "Arab",
    "devanagari": "Deva",
}  # as locales spell them (sr@latin)
NO_REGION = ("XX", "ZZ")  # "no region" in mBART-50 and in CLDR
UNKNOWN = "Unknown"  # family


def tag(code: str) -> str:
    """Return the tag of a language, which no text can spell: ``<2de>``."""
    return f"<2{code}>"


def check_code(code: str) -> str:
    """Return ``code``; raise UserError if it is not written as a language code."""
    if not CODE.match(code):
        raise UserError(not_a_code(code))
    return code


def not_a_code(text: str) -> str:
    """Return the sentence that rejects a text as a language code; it suggests the code of a similar name."""
    return (
        f"'{text}' is not a language code{_named(text)}: write an ISO 639 code such as de, pt_BR or zh_Hans"
    )


def not_a_direction(text: str) -> str:
    """Return the sentence that rejects a text as a direction of translation."""
    return f"'{text}' is not a direction: write source-target with two different codes, such as en-de"


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the valid choice closest to ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean '{found[0]}'?)" if found else ""


def _named(word: str) -> str:
    """Return `` (did you mean 'de', German?)`` for a word similar to a language's name, or nothing."""
    names = _by_name()
    found = difflib.get_close_matches(word.casefold(), list(names), n=1, cutoff=0.75)
    return f" (did you mean '{names[found[0]].code}', {names[found[0]].name}?)" if found else ""


@dataclass(frozen=True)
class LanguageEntry:
    """Hold a row of languages.tsv.

    The columns are code, ISO 15924 script, main region, family with branch, English name, names in the
    language itself, and codes used elsewhere. Region, family and own names are empty if they are not known.
    """

    code: str
    script: str
    region: str
    family: str
    name: str
    own_names: tuple[str, ...]
    aliases: tuple[str, ...]


@cache
def table() -> dict[str, LanguageEntry]:
    """Return the known languages by code, those with a family first."""
    entries = []
    for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]:
        code, script, region, family, name, *lists = line.split("\t")
        own_names, aliases = (tuple(filter(None, names.split(","))) for names in lists)
        entries.append(LanguageEntry(code, script, region, family, name, own_names, aliases))
    return {entry.code: entry for entry in sorted(entries, key=lambda entry: not entry.family)}


@cache
def _by_any_code() -> dict[str, str]:
    """Map lower-case codes, the table's own and aliases, to the table's codes; own codes take precedence."""
    others = {alias.lower(): entry.code for entry in table().values() for alias in entry.aliases}
    return others | {code.lower(): code for code in table()}


@cache
def _by_name() -> dict[str, LanguageEntry]:
    """Map case-folded names of languages to rows of the table.

    An English name takes precedence over a language's own name, and that over an English name without the
    part in parentheses (``Chinese`` for ``Chinese (Simplified)``).
    """
    entries = table().values()
    names = [(entry.name, entry) for entry in entries]
    names += [(name, entry) for entry in entries for name in entry.own_names]
    names += [(entry.name.split(" (")[0], entry) for entry in entries]
    return {name.casefold(): entry for name, entry in reversed(names)}


@cache
def normalize_code(code: str) -> str:
    """Return the table's code for a code of another convention, or else the code in the usual spelling.

    ``deu_Latn`` and ``de-DE`` become ``de``, ``zh-CN`` becomes ``zh_Hans``, ``sr@latin`` becomes ``sr_Latn``
    and ``es-MX`` becomes ``es_MX``. A language's default script and region are left out.
    """
    subtags = code.split(".")[0].replace("@", "_").replace("-", "_").strip("_").split("_")
    (language, *parts), known = _usual_spelling(subtags), _by_any_code()
    if (whole := "_".join([language, *parts]).lower()) in known:
        return known[whole]
    default = known.get(language, language)  # the code of the language alone: zh_Hans for zho
    stem = default.split("_")[0]
    if (whole := "_".join([stem, *parts]).lower()) in known:
        return known[whole]
    if parts and _is_script(parts[0]):
        chosen = parts.pop(0)
        if chosen != _script_of(default):
            default = known.get(f"{stem}_{chosen}".lower(), f"{stem}_{chosen}")
        if (whole := "_".join([default, *parts]).lower()) in known:
            return known[whole]
    if parts and _is_region(parts[0]) and _adds_nothing(parts[0], default):
        parts.pop(0)
    return "_".join([default, *parts])


def _usual_spelling(subtags: list[str]) -> list[str]:
    """Return ``zh_Hant_TW`` for ``ZH_hant_tw``; parts after a single letter (``x_mine``) in lower case."""
    found: list[str] = []
    for part in (subtag.lower() for subtag in subtags):
        if not found or any(len(before) == 1 for before in found):
            found.append(part)
        elif part != "euro":  # of de_DE@euro
            found.append(
                SCRIPTS.get(part)
                or (
                    part.title()
                    if len(part) == 4 and part.isalpha()
                    else part.upper()
                    if len(part) == 2
                    else part
                )
            )
    return found


def _is_script(part: str) -> bool:
    return len(part) == 4 and part.isalpha() and part.istitle()


def _is_region(part: str) -> bool:
    return len(part) == 2 or (len(part) == 3 and part.isdigit())


def _adds_nothing(region: str, code: str) -> bool:
    """Tell whether a region is the language's default one (``de_DE``, ``ja_JP``, ``zh_Hans_CN``).

    Every region of English counts as default.
    """
    language, entry = code.split("_")[0], table().get(code)
    if region in NO_REGION or language == "en" or region.lower() == code:
        return True
    return entry is not None and (
        region == entry.region or _by_any_code().get(f"{language}_{region}".lower()) == code
    )


def _entry(code: str) -> LanguageEntry | None:
    """Return the row of a normalized code, or of the language of which it is a variety."""
    while code not in table() and "_" in code:
        code = code.rpartition("_")[0]
    return table().get(code)


def _script_of(code: str) -> str | None:
    """Return the script of a normalized code."""
    entry = _entry(code)
    return next((part for part in code.split("_")[1:] if _is_script(part)), entry.script if entry else None)


def script(code: str) -> str | None:
    """Return the ISO 15924 script of a language (``Latn``), or None if it is not known."""
    return _script_of(normalize_code(code))


def family(code: str) -> str:
    """Return family and branch, ``Indo-European, Germanic``; ``Unknown`` if they are not known.

    Sorting by it groups related languages.
    """
    entry = _entry(normalize_code(code))
    return (entry.family if entry else "") or UNKNOWN


def language_name(code: str) -> str:
    """Return the English name of a language.

    A variety that is not in the table has its parts in parentheses (``Spanish (MX)``). For an unknown
    language the result is the code.
    """
    normal = normalize_code(code)
    entry = _entry(normal)
    if entry is None:
        return code
    rest = normal.removeprefix(entry.code).strip("_")
    return f"{entry.name} ({rest.replace('_', ', ')})" if rest else entry.name


def is_known(code: str) -> bool:
    """Tell whether the table has a language, or the language of which the code is a variety."""
    return _entry(normalize_code(code)) is not None


def is_english(code: str) -> bool:
    """Tell whether a code of any convention means English."""
    return normalize_code(code) == "en"


def same_language(code: str, other: str) -> bool:
    """Tell whether two codes of any conventions mean the same language or variety."""
    return code == other or normalize_code(code) == normalize_code(other)


def stands_in(code: str, other: str) -> bool:
    """Tell whether text of one code passes for the other: Norwegian, and Bokmål, as most of it is."""
    return {normalize_code(code), normalize_code(other)} == {"no", "nb"}


def find_code(code: str, codes: Iterable[str]) -> str | None:
    """Return the closest of ``codes`` that means the same as ``code`` or stands in for it, or None."""
    codes = list(codes)
    alike = [code] if code in codes else [other for other in codes if same_language(code, other)]
    return next(iter(alike or [other for other in codes if stands_in(code, other)]), None)


@dataclass(frozen=True, order=True)
class Direction:
    """Translation from ``source`` into ``target``, or one language alone, for text that is not translated."""

    source: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Direction:
        """Parse the result of ``str``, which may be one language alone (``de-de``).

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
        """Tell whether this is one language rather than a translation between two."""
        return self.source == self.target

    @property
    def label(self) -> str:
        """Return how tables name it: ``en-de``, or ``de`` for one language alone."""
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


GROUPS = ("high", "medium", "low", "very_low")  # resource groups of languages, from rich to poor

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
    written = next((part for part in rest.split("_") if _is_script(part)), "")
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

"""Language codes, tags, directions and tasks: the ids that everything language-specific is a function of.

A language code is an ISO 639 code with optional parts after underscores (``de``, ``zh_Hans``, ``sr_Latn``); a direction
is written ``en-de``. :func:`normalize_code` gives the code of languages.tsv for codes of other conventions; codes that a person
wrote are read by :mod:`lsmoe_ds.config.codes`, which also says so.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
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
SCRIPTS = {"latin": "Latn", "cyrillic": "Cyrl", "arabic": "Arab", "devanagari": "Deva"}  # as locales spell them (sr@latin)
NO_REGION = ("XX", "ZZ")  # as mBART-50 and CLDR write that there is none
UNKNOWN = "Unknown"  # family


def tag(code: str) -> str:
    """Return the piece that stands for a language before a sentence: ``<2de>``."""
    return f"<2{code}>"


def check_code(code: str) -> str:
    """Return ``code``; raise UserError if it is not written as a language code."""
    if not CODE.match(code):
        raise UserError(not_a_code(code))
    return code


def not_a_code(text: str) -> str:
    """Return the sentence that refuses a text as a language code, with the code of the language that it may name."""
    return f"'{text}' is not a language code{_named(text)}: write an ISO 639 code such as de, pt_BR or zh_Hans"


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the valid choice closest to ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean '{found[0]}'?)" if found else ""


def _named(word: str) -> str:
    """Return `` (did you mean 'de', German?)`` for a word that is like the name of a language, or an empty
    string.
    """
    names = _by_name()
    found = difflib.get_close_matches(word.casefold(), list(names), n=1, cutoff=0.75)
    return f" (did you mean '{names[found[0]].code}', {names[found[0]].name}?)" if found else ""


@dataclass(frozen=True)
class Entry:
    """Hold a row of languages.tsv: code, ISO 15924 script, main region, family with branch, English name, names
    in the language itself, codes used elsewhere.

    Region, family and own names are empty where they are not known.
    """

    code: str
    script: str
    region: str
    family: str
    name: str
    own_names: tuple[str, ...]
    aliases: tuple[str, ...]


@cache
def table() -> dict[str, Entry]:
    """Return the known languages by code, those with a family first."""
    entries = []
    for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]:
        code, script, region, family, name, *lists = line.split("\t")
        own_names, aliases = (tuple(filter(None, names.split(","))) for names in lists)
        entries.append(Entry(code, script, region, family, name, own_names, aliases))
    return {entry.code: entry for entry in sorted(entries, key=lambda entry: not entry.family)}


@cache
def _by_any_code() -> dict[str, str]:
    """Map codes in lower case, the table's and others', to the table's; where both exist, the table's wins."""
    others = {alias.lower(): entry.code for entry in table().values() for alias in entry.aliases}
    return others | {code.lower(): code for code in table()}


@cache
def _by_name() -> dict[str, Entry]:
    """Map names of languages, without case, to rows of the table.

    An English name comes before an own one, and this before one without its addition (``Chinese`` of
    ``Chinese (Simplified)``).
    """
    entries = table().values()
    names = [(entry.name, entry) for entry in entries]
    names += [(name, entry) for entry in entries for name in entry.own_names]
    names += [(entry.name.split(" (")[0], entry) for entry in entries]
    return {name.casefold(): entry for name, entry in reversed(names)}


@cache
def normalize_code(code: str) -> str:
    """Return the table's code for one of another convention, or the code with its parts in the usual spelling.

    ``deu_Latn`` and ``de-DE`` are ``de``, ``zh-CN`` is ``zh_Hans``, ``sr@latin`` is ``sr_Latn``, ``es-MX`` is ``es_MX``. The script and the
    region that a language has by default are left out.
    """
    subtags = code.split(".")[0].replace("@", "_").replace("-", "_").strip("_").split("_")
    (language, *parts), known = _usual_spelling(subtags), _by_any_code()
    if (whole := "_".join([language, *parts]).lower()) in known:
        return known[whole]
    default = known.get(language, language)  # what the language alone is: zh_Hans for zho
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
    """Return ``zh_Hant_TW`` for ``ZH_hant_tw``; what follows a single letter (``x_mine``) is private and in lower case."""
    found: list[str] = []
    for part in (subtag.lower() for subtag in subtags):
        if not found or any(len(before) == 1 for before in found):
            found.append(part)
        elif part != "euro":  # of de_DE@euro
            found.append(
                SCRIPTS.get(part) or (part.title() if len(part) == 4 and part.isalpha() else part.upper() if len(part) == 2 else part)
            )
    return found


def _is_script(part: str) -> bool:
    return len(part) == 4 and part.isalpha() and part.istitle()


def _is_region(part: str) -> bool:
    return len(part) == 2 or (len(part) == 3 and part.isdigit())


def _adds_nothing(region: str, code: str) -> bool:
    """Tell whether a region is the language's own (``de_DE``, ``ja_JP``, ``zh_Hans_CN``). English has no varieties here."""
    language, entry = code.split("_")[0], table().get(code)
    if region in NO_REGION or language == "en" or region.lower() == code:
        return True
    return entry is not None and (region == entry.region or _by_any_code().get(f"{language}_{region}".lower()) == code)


def _entry(code: str) -> Entry | None:
    """Return the row of a normalized code, or of the language that it is a variety of."""
    while code not in table() and "_" in code:
        code = code.rpartition("_")[0]
    return table().get(code)


def _script_of(code: str) -> str | None:
    """Return the script of a normalized code."""
    entry = _entry(code)
    return next((part for part in code.split("_")[1:] if _is_script(part)), entry.script if entry else None)


def script(code: str) -> str | None:
    """Return the ISO 15924 script that a language is written in (``Latn``), or None where it is not known."""
    return _script_of(normalize_code(code))


def family(code: str) -> str:
    """Return family and branch, ``Indo-European, Germanic``; ``Unknown`` where they are not known.

    Sorted by it, relatives stand side by side.
    """
    entry = _entry(normalize_code(code))
    return (entry.family if entry else "") or UNKNOWN


def language_name(code: str) -> str:
    """Return the English name: of a variety that the table lacks, with its parts (``Spanish (MX)``); of an unknown language, the code."""
    normal = normalize_code(code)
    entry = _entry(normal)
    if entry is None:
        return code
    rest = normal.removeprefix(entry.code).strip("_")
    return f"{entry.name} ({rest.replace('_', ', ')})" if rest else entry.name


def is_known(code: str) -> bool:
    """Tell whether the table has a language, so that it has a name and a script."""
    return _entry(normalize_code(code)) is not None


def is_english(code: str) -> bool:
    """Tell whether a code of any convention means English."""
    return normalize_code(code) == "en"


def same_language(code: str, other: str) -> bool:
    """Tell whether two codes of any conventions mean the same language or variety."""
    return code == other or normalize_code(code) == normalize_code(other)


def stands_in(code: str, other: str) -> bool:
    """Tell whether two codes are different but text of one passes for the other: Norwegian, and Bokmål as most of it is."""
    return {normalize_code(code), normalize_code(other)} == {"no", "nb"}


def find_code(code: str, codes: Iterable[str]) -> str | None:
    """Return the one of ``codes`` that means the same as ``code`` or stands in for it, the closest; None if there is none."""
    codes = list(codes)
    alike = [code] if code in codes else [other for other in codes if same_language(code, other)]
    return next(iter(alike or [other for other in codes if stands_in(code, other)]), None)


@dataclass(frozen=True, order=True)
class Direction:
    """Translation from ``source`` into ``target``."""

    source: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Direction:
        """Return the direction that ``str`` wrote. What a person wrote is read by :func:`lsmoe_ds.config.codes.read_direction`."""
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
        """Return the name of the parallel text of this direction and its reverse: the two codes in order, ``de-en``."""
        return "-".join(sorted((self.source, self.target)))


def english_centric(languages: Iterable[str]) -> list[Direction]:
    """Return both directions between English and each other language, in the order given."""
    others = [check_code(code) for code in dict.fromkeys(languages) if not is_english(code)]
    return [d for code in others for d in (Direction("en", code), Direction(code, "en"))]


TASKS = ("target", "source", "pair")


def task_language(task: str) -> str:
    """Return the language that marks a task: of a language itself, of a pair the one that is not English."""
    source, _, target = task.partition("-")
    return target if target and is_english(source) else source


def task_order(task: str) -> tuple[str, str, str, str]:
    """Return a sorting key that puts the tasks of related languages side by side: family, script, name.

    Static routing and groups of experts follow this order, so it must never change for a trained model. Codes are therefore
    looked up as they are written, not as what they mean, and languages without a family stay at the end, by code.
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
    """The directions of one system, and the numbering of its languages, directions and tasks.

    The number of a language is its place in ``codes`` (sorted), of a direction its place in ``directions``.
    """

    directions: tuple[Direction, ...]

    @cached_property
    def codes(self) -> tuple[str, ...]:
        return tuple(sorted({code for d in self.directions for code in (d.source, d.target)}))

    def find(self, direction: Direction) -> Direction:
        """Return the system's direction that means the same, in the system's own codes. Raises UserError if there is none."""
        found = Direction(self.own(direction.source), self.own(direction.target))
        if found not in self.directions:
            known = ", ".join(str(d) for d in self.directions)
            raise UserError(f"direction {direction} is not in this system: it knows {known}")
        return found

    def own(self, code: str) -> str:
        """Return the system's own code of a language, by any code for it. Raises UserError for a language that the system lacks."""
        found = find_code(code, self.codes)
        if found is None:
            raise UserError(f"language '{code}' is not in this system{nearest(code, self.codes)}: it knows {', '.join(self.codes)}")
        return found

    def id(self, code: str) -> int:
        """Return the number of a language; see :meth:`own`."""
        return self.codes.index(self.own(code))

    def direction_id(self, direction: Direction) -> int:
        """Return the number of a direction; see :meth:`find`."""
        return self.directions.index(self.find(direction))

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

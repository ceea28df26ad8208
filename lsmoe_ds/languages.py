"""Language codes and their tags, and the table of known languages.

A language code is an ISO 639 code with optional parts after underscores (``de``, ``zh_Hans``, ``sr_Latn``).
:func:`normalize_code` maps codes of other conventions to those of languages.tsv.
:mod:`lsmoe_ds.config.codes` reads codes that a user wrote, and reports what it has replaced.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lsmoe_ds.errors import UserError

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
    """Return the error for a text that is not a language code; it suggests the code of a similar name."""
    return (
        f"'{text}' is not a language code{_named(text)}: write an ISO 639 code such as de, pt_BR or zh_Hans"
    )


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
    default = known.get(language, language)  # the code of the bare language: zh_Hans for zho
    stem = default.split("_")[0]
    if (whole := "_".join([stem, *parts]).lower()) in known:
        return known[whole]
    if parts and is_script(parts[0]):
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


def is_script(part: str) -> bool:
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
    """Return the row of a normalized code, or else of the language that it is a variety of."""
    while code not in table() and "_" in code:
        code = code.rpartition("_")[0]
    return table().get(code)


def _script_of(code: str) -> str | None:
    """Return the script of a normalized code."""
    entry = _entry(code)
    return next((part for part in code.split("_")[1:] if is_script(part)), entry.script if entry else None)


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
    """Tell whether the table has a language, or the language that the code is a variety of."""
    return _entry(normalize_code(code)) is not None


def is_english(code: str) -> bool:
    """Tell whether a code of any convention means English."""
    return normalize_code(code) == "en"


def same_language(code: str, other: str) -> bool:
    """Tell whether two codes of any conventions mean the same language or variety."""
    return code == other or normalize_code(code) == normalize_code(other)


def stands_in(code: str, other: str) -> bool:
    """Tell whether one code can replace the other: Norwegian and Bokmål, because most Norwegian is Bokmål."""
    return {normalize_code(code), normalize_code(other)} == {"no", "nb"}


def find_code(code: str, codes: Iterable[str]) -> str | None:
    """Return the closest of ``codes`` that means the same as ``code`` or stands in for it, or None."""
    codes = list(codes)
    alike = [code] if code in codes else [other for other in codes if same_language(code, other)]
    return next(iter(alike or [other for other in codes if stands_in(code, other)]), None)

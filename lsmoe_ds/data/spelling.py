"""Match the languages of a corpus, as its files, folders or columns spell them: ``a.deu_Latn`` is ``de``."""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import (
    CODE,
    find_code,
    is_known,
    language_name,
    normalize_code,
    same_language,
    stands_in,
)
from lsmoe_ds.notices import listed, notice

T = TypeVar("T", bound=Path | int | str)
Pair = tuple[str, str]
Spellings = tuple[str, ...]  # of one language, or of both of a bitext


@dataclass(frozen=True)
class Half:
    """A corpus's file for one side of a bitext, in a split, and the language whose file is missing."""

    split: str
    bitext: str
    file: str
    lacking: str


class Wanted:
    """The bitexts wanted from one corpus, and the files, folders or columns chosen for their languages.

    ``given`` are the codes that the recipe names as the corpus's ``source`` and ``target``. Among spellings
    of one language these come first, then the recipe's own code, then the spelling with the fewest parts.
    """

    def __init__(self, corpus: str, bitexts: Mapping[str, Pair], given: Iterable[str | None] = ()) -> None:
        self.corpus, self.bitexts, self.given = corpus, bitexts, {code for code in given if code}
        self.met: dict[str, str] = {}  # spellings that the corpus has, with a description of the place
        self._read: dict[str, str] = {}  # by spelling, the code as which it is read
        self.lacking: list[Half] = []  # certainly a fault
        self.perhaps_lacking: list[Half] = []  # a fault if the corpus has these bitexts only in other splits
        self._served: dict[tuple[Spellings, Path | int | str], Spellings] = {}

    def items(self) -> ItemsView[str, Pair]:
        """Return the bitexts and their languages."""
        return self.bitexts.items()

    def choose(self, found: Iterable[tuple[str, T]], code: str) -> T | None:
        """Return the best place for the language ``code`` of ``found`` [(spelling, place)], or None.

        Raises UserError if two of them are equally good, and if one would serve two codes of a recipe.
        """
        return self.choose_all([((spelling,), place) for spelling, place in found], (code,))

    def choose_all(self, found: Iterable[tuple[Spellings, T]], codes: Spellings) -> T | None:
        """Return the place of the best of ``found`` for all the languages ``codes``; see :meth:`choose`."""
        found = list(found)
        for spellings, place in found:
            self.met |= dict.fromkeys(spellings, _describe(place, spellings))
        alike = _all_by(same_language, found, codes) or _all_by(stands_in, found, codes)
        if not alike:
            return None
        alike.sort(key=lambda each: self._rank(each[0], codes))
        best, *others = alike
        names, meaning = [_describe(place, spellings) for spellings, place in alike], "-".join(codes)
        if others and self._rank(others[0][0], codes) == self._rank(best[0], codes):
            raise UserError(
                f"corpus {self.corpus}: both {names[0]} and {names[1]} are {meaning}: remove one of them, or "
                "name one as 'source' or 'target' of the corpus"
            )
        if (before := self._served.setdefault(best, codes)) != codes:
            raise UserError(
                f"corpus {self.corpus}: {names[0]} is read as {'-'.join(before)} and as {meaning}: write one "
                "of these codes"
            )
        for name in names[1:]:
            notice(
                f"corpus {self.corpus}: {meaning} is read from {names[0]}, not from {name}, which means the "
                "same; to choose, name one as 'source' or 'target' of the corpus"
            )
        self._read |= {
            spelling: code for spelling, code in zip(best[0], codes, strict=True) if spelling != code
        }
        return best[1]

    def _rank(self, spellings: Spellings, codes: Spellings) -> int:
        """Sum the ranks of spellings: 0 if the recipe names it, 1 if it is a code, 2 or more by its parts."""
        ranks = {spelling: 2 + spelling.count("_") + spelling.count("-") for spelling in spellings}
        ranks |= dict.fromkeys(set(spellings) & set(codes), 1) | dict.fromkeys(set(spellings) & self.given, 0)
        return sum(ranks[spelling] for spelling in spellings)

    def restrict(self) -> None:
        """Keep only the bitexts with the languages that the recipe names for this corpus."""
        self.bitexts = {
            bitext: pair
            for bitext, pair in self.bitexts.items()
            if all(any(same_language(code, member) for member in pair) for code in self.given)
        }

    def note_halves(
        self, halves: Sequence[Half], complete: bool, name: str, spellings: Sequence[str]
    ) -> None:
        """Record that files, in the languages ``spellings``, lack one side of some bitexts.

        ``name`` is the common part of their names. This is a fault if all files are in the recipe's languages
        and serve no bitext (are not ``complete``). Otherwise it is possibly a fault, unless ``name`` contains
        a code: then the files belong to another pair.
        """
        recipes = {code for pair in self.bitexts.values() for code in pair}
        if not complete and all(
            find_code(code, recipes) or not is_known(normalize_code(code)) for code in spellings
        ):
            self.lacking += halves
        elif not set(spellings) & set(re.split(r"[^A-Za-z0-9]+", name)):
            self.perhaps_lacking += halves

    @property
    def read_as(self) -> dict[str, str]:
        """Map the spellings that were read as other codes to these codes."""
        return self._read

    @property
    def unserved(self) -> list[str]:
        """List the languages for which nothing was chosen."""
        served = {code for codes in self._served.values() for code in codes}
        return [
            code
            for code in dict.fromkeys(code for pair in self.bitexts.values() for code in pair)
            if code not in served
        ]

    def relatives(self, code: str) -> list[tuple[str, str]]:
        """List (code, description) of unused text in other varieties of a language (``pt`` for ``pt_BR``)."""
        own = normalize_code(code)
        used = {spelling for spellings, _ in self._served for spelling in spellings}
        found = []
        for spelling, place in self.met.items():
            other = normalize_code(spelling)
            related = CODE.match(other) and other.split("_")[0] == own.split("_")[0] and other != own
            if related and is_known(other) and spelling not in used:
                found.append((other, f"{other} ({language_name(other)}, {place})"))
        return found


def say_spellings(corpora: Iterable[Wanted]) -> None:
    """Report in one line on standard error which spellings of the corpora were read as other codes."""
    said = [
        f"corpus {each.corpus}: "
        f"{listed(f'{spelling} is read as {code}' for spelling, code in each.read_as.items())}"
        for each in corpora
        if each.read_as
    ]
    if said:
        notice(listed(said, between="; "))


def _all_by(
    alike: Callable[[str, str], bool], found: Iterable[tuple[Spellings, T]], codes: Spellings
) -> list[tuple[Spellings, T]]:
    """Return those of ``found`` whose spellings mean the codes or are ``alike``."""
    wanted = [(each, list(zip(each[0], codes, strict=True))) for each in found]
    return [each for each, pairs in wanted if all(same_language(*pair) or alike(*pair) for pair in pairs)]


def _describe(place: Path | int | str, spellings: Spellings) -> str:
    """Name a file, a column of a table, or a member of a file in messages."""
    if isinstance(place, Path):
        return place.name
    return place if isinstance(place, str) else f"column {place + 1} ({spellings[0]})"

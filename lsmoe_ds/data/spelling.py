"""The languages of a corpus, as its files, folders or columns spell them: ``a.deu_Latn`` serves ``de``."""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import CODE, find_code, is_known, language_name, normalize_code, same_language, stands_in
from lsmoe_ds.notices import listed, notice

T = TypeVar("T", bound=Path | int)
Pair = tuple[str, str]
Spellings = tuple[str, ...]  # of one language, or of both of a bitext


@dataclass(frozen=True)
class Half:
    """Name a file that a corpus has for one side of a bitext, in a split, and the language of the other side,
    which it lacks.
    """

    split: str
    bitext: str
    file: str
    lacking: str


class Wanted:
    """The bitexts that are looked for in one corpus, and which of its files, folders or columns were chosen for their languages.

    ``given`` are the codes that the recipe names as the corpus's ``source`` and ``target``: of two spellings of one language these
    are preferred, then the recipe's own, then the one with the fewest parts.
    """

    def __init__(self, corpus: str, bitexts: Mapping[str, Pair], given: Iterable[str | None] = ()) -> None:
        self.corpus, self.bitexts, self.given = corpus, bitexts, {code for code in given if code}
        self.met: dict[str, str] = {}  # what the corpus has, by its spelling, and where
        self._read: dict[str, str] = {}  # what it is read as
        self.lacking: list[Half] = []  # surely
        self.perhaps_lacking: list[Half] = []  # if the corpus serves these bitexts in other splits only
        self._served: dict[tuple[Spellings, Path | int], Spellings] = {}

    def items(self) -> ItemsView[str, Pair]:
        """Return the bitexts and their languages."""
        return self.bitexts.items()

    def choose(self, found: Iterable[tuple[str, T]], code: str) -> T | None:
        """Return the one of ``found``, pairs of spelling and place, that is in the language ``code``, or None.

        Raises UserError where two of them are as good, and where one would serve two codes of a recipe.
        """
        return self.choose_all([((spelling,), place) for spelling, place in found], (code,))

    def choose_all(self, found: Iterable[tuple[Spellings, T]], codes: Spellings) -> T | None:
        """Return the one of ``found`` that is in all the languages ``codes``; see :meth:`choose`."""
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
                f"corpus {self.corpus}: both {names[0]} and {names[1]} are {meaning}: remove one of them, or name one as 'source' or "
                "'target' of the corpus"
            )
        if (before := self._served.setdefault(best, codes)) != codes:
            raise UserError(f"corpus {self.corpus}: {names[0]} is read as {'-'.join(before)} and as {meaning}: write one of these codes")
        for name in names[1:]:
            notice(
                f"corpus {self.corpus}: {meaning} is read from {names[0]}, not from {name}, which means the same; to choose, name one as "
                "'source' or 'target' of the corpus"
            )
        self._read |= {spelling: code for spelling, code in zip(best[0], codes, strict=True) if spelling != code}
        return best[1]

    def _rank(self, spellings: Spellings, codes: Spellings) -> int:
        """Return how far spellings are from codes: 0 for those that the recipe names for this corpus, the more the longer they are."""
        ranks = {spelling: 2 + spelling.count("_") + spelling.count("-") for spelling in spellings}
        ranks |= dict.fromkeys(set(spellings) & set(codes), 1) | dict.fromkeys(set(spellings) & self.given, 0)
        return sum(ranks[spelling] for spelling in spellings)

    def restrict(self) -> None:
        """Leave only the bitexts that have the languages which the recipe names for this corpus."""
        self.bitexts = {
            bitext: pair
            for bitext, pair in self.bitexts.items()
            if all(any(same_language(code, member) for member in pair) for code in self.given)
        }

    def note_halves(self, halves: Sequence[Half], complete: bool, name: str, spellings: Sequence[str]) -> None:
        """Note that files, found under a common name and in these languages, have one side of some bitexts only.

        That is a fault where they are of the recipe's languages alone and serve no bitext (are not
        ``complete``). Else it may be one, unless their name has their codes, so that they are those of
        another pair.
        """
        recipes = {code for pair in self.bitexts.values() for code in pair}
        if not complete and all(find_code(code, recipes) or not is_known(normalize_code(code)) for code in spellings):
            self.lacking += halves
        elif not set(spellings) & set(re.split(r"[^A-Za-z0-9]+", name)):
            self.perhaps_lacking += halves

    @property
    def read_as(self) -> dict[str, str]:
        """Map the spellings that were read as other codes to these."""
        return self._read

    @property
    def unserved(self) -> list[str]:
        """List the languages for which nothing was chosen."""
        served = {code for codes in self._served.values() for code in codes}
        return [code for code in dict.fromkeys(code for pair in self.bitexts.values() for code in pair) if code not in served]

    def relatives(self, code: str) -> list[tuple[str, str]]:
        """List what the corpus has, for no code of the recipe, in other varieties of a language (``pt`` for
        ``pt_BR``): their codes, and descriptions.
        """
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
    """Say on standard error which spellings of the corpora were read as other codes, in one line."""
    said = [
        f"corpus {each.corpus}: {listed(f'{spelling} is read as {code}' for spelling, code in each.read_as.items())}"
        for each in corpora
        if each.read_as
    ]
    if said:
        notice(listed(said, between="; "))


def _all_by(alike: Callable[[str, str], bool], found: Iterable[tuple[Spellings, T]], codes: Spellings) -> list[tuple[Spellings, T]]:
    """Return those of ``found`` whose spellings are the codes or ``alike``."""
    wanted = [(each, list(zip(each[0], codes, strict=True))) for each in found]
    return [each for each, pairs in wanted if all(same_language(*pair) or alike(*pair) for pair in pairs)]


def _describe(place: Path | int, spellings: Spellings) -> str:
    return place.name if isinstance(place, Path) else f"column {place + 1} ({spellings[0]})"

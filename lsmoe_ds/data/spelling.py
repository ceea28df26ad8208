"""The languages of a corpus, as its files, folders or columns spell them: ``a.deu_Latn`` serves ``de``."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import CODE, is_known, language_name, normalize_code, same_language, stands_in
from lsmoe_ds.notices import notice

T = TypeVar("T", bound=Path | int)
Pair = tuple[str, str]
Spellings = tuple[str, ...]  # of one language, or of both of a bitext
MOST_SAID = 8  # codes of one corpus


class Wanted:
    """The bitexts that are looked for in one corpus, and which of its files, folders or columns were chosen for their languages.

    ``given`` are the codes that the recipe names as the corpus's ``source`` and ``target``: of two spellings of one language these
    are preferred, then the recipe's own, then the one with the fewest parts.
    """

    def __init__(self, corpus: str, bitexts: Mapping[str, Pair], given: Iterable[str | None] = ()) -> None:
        self.corpus, self.bitexts, self.given = corpus, bitexts, {code for code in given if code}
        self.met: dict[str, str] = {}  # what the corpus has, by its spelling, and where
        self._read: dict[str, str] = {}  # what it is read as
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

    def say(self) -> None:
        """Say on standard error which spellings were read as other codes, in one line."""
        said = [f"{spelling} is read as {code}" for spelling, code in self._read.items()]
        if said:
            more = f" and {len(said) - MOST_SAID} more (docs/languages.md)" if len(said) > MOST_SAID else ""
            notice(f"corpus {self.corpus}: {', '.join(said[:MOST_SAID])}{more}")

    def relatives(self, code: str) -> list[str]:
        """Describe what the corpus has in other varieties of a language (``pt`` for ``pt_BR``), and the code to write for it."""
        own = normalize_code(code)
        found = []
        for spelling, place in self.met.items():
            other = normalize_code(spelling)
            if CODE.match(other) and is_known(other) and other != own and other.split("_")[0] == own.split("_")[0]:
                found.append(f"corpus {self.corpus} has {other} ({language_name(other)}, {place}): write {other}")
        return found


def _all_by(alike: Callable[[str, str], bool], found: Iterable[tuple[Spellings, T]], codes: Spellings) -> list[tuple[Spellings, T]]:
    """Return those of ``found`` whose spellings are the codes or ``alike``."""
    wanted = [(each, list(zip(each[0], codes, strict=True))) for each in found]
    return [each for each, pairs in wanted if all(same_language(*pair) or alike(*pair) for pair in pairs)]


def _describe(place: Path | int, spellings: Spellings) -> str:
    return place.name if isinstance(place, Path) else f"column {place + 1} ({spellings[0]})"

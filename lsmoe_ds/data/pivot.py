"""Join bitexts of one corpus by their sentences in a pivot language: de-fr from de-en and en-fr.

Two sentences are paired if they translate the same pivot sentence, as cleaned. If it has several
translations into a language, the first is used. Pairs that cleaning drops are not joined.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.config.data import Cleaning, Data
from lsmoe_ds.data.cleaning import PairFilter, clean_text, hash64
from lsmoe_ds.data.formats import Search, search
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.directions import Direction
from lsmoe_ds.notices import notice

Leg = tuple[TextPart, ...]


@dataclass(frozen=True)
class Translations:
    """Hold the N distinct pivot sentences of a leg, and where their translations are in a file.

    ``keys`` [N] are sorted hashes of the pivot sentences; ``starts`` and ``ends`` [N] are byte offsets of the
    translations.
    """

    file: Path
    keys: NDArray[np.uint64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass
class Joins:
    """Read each leg (a corpus's text for a bitext with the pivot language) once, and write it to ``folder``.

    Memory holds 24 bytes for each translation. ``counts`` has the number of joined pairs by corpus and
    bitext.
    """

    pivot: str
    cleaning: Cleaning
    folder: Path
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _read: dict[Leg, Translations] = field(default_factory=dict)

    def of(self, leg: Leg, tell: Callable[[str], None]) -> Translations:
        """Return the translations of a leg."""
        if leg not in self._read:
            self._read[leg] = self._write(leg, tell)
        return self._read[leg]

    def _write(self, leg: Leg, tell: Callable[[str], None]) -> Translations:
        codes = leg[0].bitext.split("-")
        side = codes.index(self.pivot)
        rules = PairFilter(self.cleaning, self.pivot, codes[1 - side])
        self.folder.mkdir(parents=True, exist_ok=True)
        path, keys, ends = self.folder / f"{len(self._read)}.txt", array("Q"), array("q", [0])
        with path.open("wb") as file:
            for part in leg:
                for pair in part.pairs(tell):
                    sentence, translation = clean_text(pair[side]), clean_text(pair[1 - side])
                    if rules.rule_against(sentence, translation) is None:
                        keys.append(hash64(sentence))
                        ends.append(ends[-1] + file.write(translation.encode()))
        distinct, first = np.unique(np.array(keys), return_index=True)
        places = np.array(ends)
        return Translations(path, distinct, places[first], places[first + 1])


@dataclass(frozen=True)
class JoinedPart(TextPart):
    """The text that a corpus has for a bitext through the pivot language."""

    legs: tuple[Leg, ...] = ()
    joins: Joins | None = field(default=None, compare=False, repr=False)

    def pairs(self, tell: Callable[[str], None] = notice) -> Iterator[tuple[str, str]]:
        """Yield the joined pairs, cleaned, in the order of the first language's text."""
        assert self.joins is not None
        first, second = (self.joins.of(leg, tell) for leg in self.legs)
        _, left, right = np.intersect1d(first.keys, second.keys, assume_unique=True, return_indices=True)
        order = np.argsort(first.starts[left], kind="stable")
        self.joins.counts[self.corpus, self.bitext] = len(order)
        with first.file.open("rb") as one, second.file.open("rb") as other:
            for i, j in zip(left[order], right[order], strict=True):
                texts = []
                for file, own, at in ((one, first, i), (other, second, j)):
                    file.seek(own.starts[at])
                    texts.append(file.read(own.ends[at] - own.starts[at]).decode())
                yield texts[0], texts[1]


def search_and_join(data: Data, bitexts: Sequence[str], folder: Path) -> tuple[list[Search], Joins | None]:
    """Find everything that the corpora have for the bitexts, and with ``data.pivot`` what can be joined.

    A corpus with training text of its own for a bitext is not joined for it. :class:`Joins` writes the
    translations of legs to ``folder``.
    """
    found = search(data.corpora, data.directory, bitexts)
    if data.pivot is None:
        return found, None
    joins = Joins(data.pivot, data.cleaning, folder)
    legs = {
        bitext: [Direction(code, data.pivot).bitext for code in bitext.split("-")]
        for bitext in bitexts
        if data.pivot not in bitext.split("-")
    }
    others = sorted({leg for pair in legs.values() for leg in pair} - set(bitexts))
    more = search(data.corpora, data.directory, others) if others else []
    for number, each in enumerate(found):
        train: dict[str, Leg] = {}
        for part in (*each.parts, *(more[number].parts if more else ())):
            if part.split == "train" and part.way is None:
                train[part.bitext] = (*train.get(part.bitext, ()), part)
        for bitext, pair in legs.items():
            if bitext not in train and all(leg in train for leg in pair):
                both = tuple(train[leg] for leg in pair)
                files = tuple(dict.fromkeys(file for leg in both for part in leg for file in part.files))
                each.parts.append(
                    JoinedPart(each.wanted.corpus, bitext, "train", files, "joined", legs=both, joins=joins)
                )
    return found, joins

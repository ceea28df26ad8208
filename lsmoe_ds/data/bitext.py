"""One bitext on its way through preparing: cleaned pairs on disk, with keys, and what becomes of each pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.config import Cleaning
from lsmoe_ds.data.cleaning import PairFilter, clean_text, hash64, near_duplicate_form
from lsmoe_ds.data.formats import Part
from lsmoe_ds.data.held_out import HELD_OUT, Keys
from lsmoe_ds.data.workers import Workers, chunks
from lsmoe_ds.languages import is_english

CHUNK = 10_000
TRAIN, DEV, TEST, DROPPED = range(4)
Pair = tuple[str, str]


def key(code: str, text: str) -> int:
    """What near-duplicates in one language have in common, as 64 bits."""
    return hash64(code, near_duplicate_form(text))


@dataclass
class Cleaned:
    """What :func:`_clean_chunk` returns: the pairs that are left, their hashes and keys, and what was dropped by which rule."""

    pairs: list[Pair]
    hashes: Keys
    keys: tuple[Keys, Keys]
    dropped: Counter[str]


def _clean_chunk(pairs: list[Pair], codes: Pair, settings: Cleaning, pivot: int, both: bool) -> Cleaned:
    rules = PairFilter(settings, codes[pivot], codes[1 - pivot])
    kept: list[Pair] = []
    dropped: Counter[str] = Counter()
    for raw in pairs:
        pair = (clean_text(raw[0]), clean_text(raw[1]))
        rule = rules.rule_against(pair[pivot], pair[1 - pivot])
        if rule:
            dropped[rule] += 1
        else:
            kept.append(pair)
    hashes = np.fromiter((hash64(*pair) for pair in kept), dtype=np.uint64, count=len(kept))
    keys = [np.empty(0, dtype=np.uint64)] * 2
    for side in (0, 1) if both else (pivot,):
        keys[side] = np.fromiter((key(codes[side], pair[side]) for pair in kept), dtype=np.uint64, count=len(kept))
    return Cleaned(kept, hashes, (keys[0], keys[1]), dropped)


@dataclass
class Bitext:
    """The text of two languages. ``pivot`` is the side that is held out by: English, or the first.

    In ``folder`` lie ``pairs.tsv`` (cleaned), ``key0.npy`` and ``key1.npy`` (keys of its sides, empty if not asked for), ``distinct.npy``
    (of the pivot side) and ``fate.npy``: TRAIN, DEV, TEST or DROPPED for each pair. ``own`` are sets that a corpus brought along,
    ``also_out`` pairs of further such sets, kept out of training only.
    """

    name: str
    folder: Path
    own: dict[str, list[Pair]] = field(default_factory=dict)
    also_out: list[Pair] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def codes(self) -> Pair:
        first, second = self.name.split("-")
        return first, second

    @property
    def pivot(self) -> int:
        return 1 if is_english(self.codes[1]) else 0

    @property
    def english(self) -> bool:
        return any(map(is_english, self.codes))

    def clean(self, parts: Sequence[Part], settings: Cleaning, both: bool, workers: Workers) -> Iterator[int]:
        """Cleans the training text and drops exact copies of pairs; yields the pairs read, for a progress bar.

        In memory: some chunks of pairs, and 40 bytes for each cleaned pair of this bitext.
        """
        self.folder.mkdir(parents=True)
        hashes: list[Keys] = []
        keys: tuple[list[Keys], list[Keys]] = ([], [])
        work = partial(_clean_chunk, codes=self.codes, settings=settings, pivot=self.pivot, both=both)
        with (self.folder / "pairs.tsv").open("w", encoding="utf-8", newline="\n") as file:
            for done in workers.map(work, chunks((pair for part in parts for pair in part.pairs()), CHUNK)):
                file.writelines(f"{first}\t{second}\n" for first, second in done.pairs)
                hashes.append(done.hashes)
                for side in (0, 1):
                    keys[side].append(done.keys[side])
                read = len(done.pairs) + done.dropped.total()
                self.counts += done.dropped + Counter(read=read)
                yield read
        fate = np.full(sum(map(len, hashes)), DROPPED, dtype=np.uint8)
        _, first = np.unique(_join(hashes), return_index=True)
        fate[first] = TRAIN
        self.counts["duplicate"] = len(fate) - len(first)
        np.save(self.folder / "fate.npy", fate)
        for side in (0, 1):
            np.save(self.folder / f"key{side}.npy", _join(keys[side]))
        np.save(self.folder / "distinct.npy", np.unique(_join(keys[self.pivot])[fate == TRAIN]))

    def load(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.folder / f"{name}.npy")
        return array

    def distinct(self) -> Keys:
        """Sorted distinct keys of the pivot side, memory-mapped."""
        return np.asarray(np.load(self.folder / "distinct.npy", mmap_mode="r"))

    def decide(self, chosen: dict[str, Keys]) -> dict[str, Keys]:
        """Gives the first pair of each chosen key to its set; returns the keys that are thereby held out, by language."""
        fate, keys = self.load("fate"), (self.load("key0"), self.load("key1"))
        for split, value in zip(HELD_OUT, (DEV, TEST), strict=True):
            candidates = np.flatnonzero((fate == TRAIN) & np.isin(keys[self.pivot], chosen[split]))
            _, first = np.unique(keys[self.pivot][candidates], return_index=True)
            fate[candidates[first]] = value
        np.save(self.folder / "fate.npy", fate)
        return {self.codes[side]: np.unique(keys[side][(fate == DEV) | (fate == TEST)]) for side in self._held_sides()}

    def published_keys(self) -> dict[str, Keys]:
        """Keys by language of the sets that corpora brought along."""
        pairs = [pair for own in (*self.own.values(), self.also_out) for pair in own]
        return {
            self.codes[s]: np.array([key(self.codes[s], clean_text(pair[s])) for pair in pairs], dtype=np.uint64)
            for s in self._held_sides()
        }

    def _held_sides(self) -> tuple[int, ...]:
        """Of a bitext with English only that side is held out of training, of another both."""
        return (self.pivot,) if self.english else (0, 1)

    def leave_out(self, held: dict[str, Keys]) -> None:
        """Drops training pairs of which a side is held out; ``held`` are the held-out keys by language."""
        fate = self.load("fate")
        train = fate == TRAIN
        for side in (0, 1):
            keys, out = self.load(f"key{side}"), held.get(self.codes[side])
            if out is not None and len(out) and len(keys):
                fate[train & np.isin(keys, out)] = DROPPED
        self.counts["held out"] = int(train.sum() - (fate == TRAIN).sum())
        np.save(self.folder / "fate.npy", fate)

    def size(self, split: str) -> int:
        if split in self.own:
            return len(self.own[split])
        return int((self.load("fate") == FATES[split]).sum())

    def pairs(self, split: str) -> Iterator[Pair]:
        """Pairs of a split, raw where a corpus brought the set along, else cleaned."""
        if split in self.own:
            yield from self.own[split]
            return
        with (self.folder / "pairs.tsv").open(encoding="utf-8", newline="\n") as file:
            for line, fate in zip(file, self.load("fate"), strict=True):
                if fate == FATES[split]:
                    first, _, second = line.rstrip("\n").partition("\t")
                    yield first, second


FATES = {"train": TRAIN, "dev": DEV, "test": TEST}


def _join(arrays: Iterable[Keys]) -> Keys:
    return np.concatenate([np.empty(0, dtype=np.uint64), *arrays])

"""Prepare one bitext: write cleaned pairs and their keys to disk, and decide the fate of each pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.config.data import Cleaning
from lsmoe_ds.data.cleaning import PairFilter, clean_text, hash64, near_duplicate_form
from lsmoe_ds.data.held_out import HELD_OUT, Claims, Keys, contains, mixed, other, published
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.data.workers import Workers, chunks
from lsmoe_ds.languages import is_english

CHUNK = 10_000
# A sentence in more than RARE pairs, and in more than one of every COMMON pairs of its bitext ("Yes."), is
# not chosen: training would lose all these pairs.
RARE, COMMON = 5, 100
TRAIN, DEV, TEST, DROPPED = range(4)
LATER = ("held out", "beyond max_pairs")  # counts of pairs that are dropped after cleaning
Pair = tuple[str, str]
Places = NDArray[np.int64]


def key(text: str) -> int:
    """Return a 64-bit key that near-duplicates share."""
    return hash64(near_duplicate_form(text))


@dataclass
class Cleaned:
    """Hold a cleaned chunk: its pairs, their hashes and keys, and how many pairs each rule dropped."""

    pairs: list[Pair]
    hashes: Keys
    keys: tuple[Keys, Keys]
    dropped: Counter[str]


def _clean_chunk(pairs: list[Pair], codes: Pair, settings: Cleaning, pivot: int) -> Cleaned:
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
    first, second = (
        np.fromiter((key(pair[side]) for pair in kept), dtype=np.uint64, count=len(kept)) for side in (0, 1)
    )
    return Cleaned(kept, hashes, (first, second), dropped)


@dataclass
class Bitext:
    """Hold the text of two languages during preparation.

    ``pivot`` is the side by which sentences are chosen to be held out: English, or the first. ``folder`` has
    ``pairs.tsv`` (cleaned), ``key0.npy`` and ``key1.npy`` (keys of its sides), ``common.npy`` (keys of
    sentences in too many pairs to be held out by choice), ``candidates.npy`` (see :meth:`candidates`) and
    ``fate.npy``: TRAIN, DEV, TEST or DROPPED for each pair.

    ``own`` are dev and test sets from a corpus; ``also_out`` are pairs of further such sets, only kept out of
    training. ``spans`` are the cleaned pairs of each corpus: (corpus, first, end). ``empty`` are the parts
    without a line, and ``remarks`` describe faults of files.
    """

    name: str
    folder: Path
    own: dict[str, list[Pair]] = field(default_factory=dict)
    also_out: dict[str, list[Pair]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    empty: list[TextPart] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

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

    def clean(self, parts: Sequence[TextPart], settings: Cleaning, workers: Workers) -> Iterator[int]:
        """Clean the training text and drop exact copies of pairs.

        Yields the numbers of pairs read, for a progress bar. Memory holds some chunks of pairs, and 40 bytes
        for each cleaned pair of this bitext.
        """
        self.folder.mkdir(parents=True)
        hashes: list[Keys] = []
        keys: tuple[list[Keys], list[Keys]] = ([], [])
        work = partial(_clean_chunk, codes=self.codes, settings=settings, pivot=self.pivot)
        end = 0
        with (self.folder / "pairs.tsv").open("w", encoding="utf-8", newline="\n") as file:
            for part in parts:
                start, before = end, self.counts["read"]
                for done in workers.map(work, chunks(part.pairs(self.remarks.append), CHUNK)):
                    file.writelines(f"{first}\t{second}\n" for first, second in done.pairs)
                    hashes.append(done.hashes)
                    for side in (0, 1):
                        keys[side].append(done.keys[side])
                    end += len(done.pairs)
                    read = len(done.pairs) + done.dropped.total()
                    self.counts += done.dropped + Counter(read=read)
                    yield read
                self.spans.append((part.corpus, start, end))
                if self.counts["read"] == before:
                    self.empty.append(part)
        fate = np.full(end, DROPPED, dtype=np.uint8)
        _, first = np.unique(_join(hashes), return_index=True)
        fate[first] = TRAIN
        self.counts["duplicate"] = len(fate) - len(first)
        np.save(self.folder / "fate.npy", fate)
        self._save_keys((_join(keys[0]), _join(keys[1])), fate)

    def _save_keys(self, keys: tuple[Keys, Keys], fate: NDArray[np.uint8]) -> None:
        most = max(RARE, int((fate == TRAIN).sum()) // COMMON)
        common = []
        for side in (0, 1):
            np.save(self.folder / f"key{side}.npy", keys[side])
            distinct, counts = np.unique(keys[side][fate == TRAIN], return_counts=True)
            common.append(distinct[counts > most])
        np.save(self.folder / "common.npy", np.unique(np.concatenate(common)))

    def load(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.folder / f"{name}.npy")
        return array

    def candidates(self, claims: Claims) -> Keys:
        """Return the sorted distinct keys of the pivot side that may be chosen, memory-mapped.

        They are of pairs of which no side is common or claimed already.
        """
        common, bad = self.load("common"), self.load("fate") != TRAIN
        for side in (0, 1):
            keys = self.load(f"key{side}")
            bad |= claims.has(keys) | contains(common, keys)
        np.save(self.folder / "candidates.npy", np.unique(self.load(f"key{self.pivot}")[~bad]))
        return np.asarray(np.load(self.folder / "candidates.npy", mmap_mode="r"))

    def claim_published(self, claims: Claims) -> None:
        """Claim both sides of the dev and test sets that corpora provide."""
        for split in HELD_OUT:
            pairs = self.own.get(split, []) + self.also_out.get(split, [])
            keys = [key(clean_text(text)) for pair in pairs for text in pair]
            claims.add(published(split), np.array(keys, dtype=np.uint64))

    def adopt(self, quotas: dict[str, int], claims: Claims, seed: int) -> dict[str, int]:
        """Hold out first what other bitexts hold out already; return the rest of the quotas.

        Training has lost these pairs anyway. Pairs of which both sides are in the dev (or test) set of other
        bitexts come first, then pairs of which one side is.
        """
        left = dict(quotas)
        for split in HELD_OUT:
            if not left[split] or not claims.count(split):
                continue
            fate, keys = self.load("fate"), (self.load("key0"), self.load("key1"))
            claimed = [claims.has(each, split) for each in keys]
            pairs = np.flatnonzero((fate == TRAIN) & (claimed[0] | claimed[1]))
            pairs = self._rarest(self._free(pairs, keys, claims, split), keys)
            order = np.lexsort((mixed(keys[self.pivot][pairs], seed), ~(claimed[0] & claimed[1])[pairs]))
            taken = pairs[order[: left[split]]]
            self._give(taken, split, fate, keys, claims)
            left[split] -= len(taken)
        return left

    def decide(self, chosen: dict[str, Keys], claims: Claims) -> None:
        """Put one pair of each chosen key into its set, and claim both sides of the pair.

        A pair of which a side is in the other set is left out, so that no sentence is in both.
        """
        fate, keys = self.load("fate"), (self.load("key0"), self.load("key1"))
        for split in HELD_OUT:
            pairs = np.flatnonzero((fate == TRAIN) & contains(chosen[split], keys[self.pivot]))
            self._give(self._rarest(self._free(pairs, keys, claims, split), keys), split, fate, keys, claims)

    def _free(self, pairs: Places, keys: tuple[Keys, Keys], claims: Claims, split: str) -> Places:
        """Keep the pairs of which no side is in the other set, or published, or common."""
        taken, common = (other(split), *map(published, HELD_OUT)), self.load("common")
        bad = [claims.has(each[pairs], *taken) | contains(common, each[pairs]) for each in keys]
        return pairs[~(bad[0] | bad[1])]

    def _rarest(self, pairs: Places, keys: tuple[Keys, Keys]) -> Places:
        """Keep one pair of each pivot key: the one whose other side is in the fewest pairs.

        Training loses all pairs of that other side.
        """
        second = keys[1 - self.pivot]
        wanted = np.unique(second[pairs])
        distinct, counts = np.unique(second[contains(wanted, second)], return_counts=True)
        times = counts[np.searchsorted(distinct, second[pairs])]
        order = pairs[np.lexsort((pairs, times))]
        _, first = np.unique(keys[self.pivot][order], return_index=True)
        return np.asarray(order[first])

    def _give(
        self, pairs: Places, split: str, fate: NDArray[np.uint8], keys: tuple[Keys, Keys], claims: Claims
    ) -> None:
        fate[pairs] = FATES[split]
        claims.add(split, keys[0][pairs], keys[1][pairs])
        np.save(self.folder / "fate.npy", fate)

    def leave_out(self, claims: Claims) -> None:
        """Drop the training pairs of which a side is held out in any bitext."""
        fate = self.load("fate")
        train = fate == TRAIN
        for side in (0, 1):
            fate[train & claims.has(self.load(f"key{side}"))] = DROPPED
        self.counts["held out"] = int(train.sum() - (fate == TRAIN).sum())
        np.save(self.folder / "fate.npy", fate)

    def cap(self, most: int, seed: int) -> None:
        """Keep at most so many training pairs: those whose pivot sentences come first in a random order.

        Bitexts of the same pivot language keep the same sentences, as far as they have them.
        """
        fate = self.load("fate")
        train = np.flatnonzero(fate == TRAIN)
        order = np.argsort(mixed(self.load(f"key{self.pivot}")[train], seed), kind="stable")
        fate[train[order[most:]]] = DROPPED
        self.counts["beyond max_pairs"] = max(0, len(train) - most)
        np.save(self.folder / "fate.npy", fate)

    def kept_of(self, corpus: str) -> int:
        """Count the pairs of a corpus that were not dropped."""
        fate = self.load("fate")
        return sum(
            int((fate[start:end] != DROPPED).sum()) for name, start, end in self.spans if name == corpus
        )

    def size(self, split: str) -> int:
        if split in self.own:
            return len(self.own[split])
        return int((self.load("fate") == FATES[split]).sum())

    def pairs(self, split: str) -> Iterator[Pair]:
        """Yield the pairs of a split: unchanged if a corpus provides the set, otherwise cleaned."""
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

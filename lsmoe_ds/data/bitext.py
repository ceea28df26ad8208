"""Prepare one bitext: join cleaned shards, and decide the fate of each pair: train, dev, test or dropped.

Nothing in memory grows with the bitext: keys are compared in ranges of values, and fates are read and written
shard by shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np

from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.data.fates import DROPPED, FATES, TRAIN, Fate, read_fates, write_fates
from lsmoe_ds.data.held_out import HELD_OUT, Claims, mixed, other, published
from lsmoe_ds.data.keys import Keys, Places, inside, open_sorted, ranges, spans_of
from lsmoe_ds.data.pieces import Chosen, Piece
from lsmoe_ds.data.shards import Pair, key, read_pair
from lsmoe_ds.data.shuffling import permute
from lsmoe_ds.data.stages import Record
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.data.tokens import ArrayFile
from lsmoe_ds.languages import is_english

# A sentence ("Yes.") in more than RARE pairs, and in more than one of every COMMON pairs of its bitext, is
# never chosen to be held out: training would lose all these pairs.
RARE, COMMON = 5, 100
LATER = ("held out", "beyond max_pairs", "not translated")  # counts of pairs that are dropped after cleaning
DIGIT = 16  # bits of the random numbers that are counted at a time, see `_last`


@dataclass
class Bitext:
    """Hold the text of two languages during preparation.

    ``pivot`` is the side by which sentences are chosen to be held out: English, or the first. ``pieces`` are
    the cleaned shards, in order. ``folder`` has ``fate``, a byte for each pair: TRAIN, DEV, TEST or DROPPED,
    and ``candidates.npy`` (see :meth:`candidates`). ``common`` are the keys of sentences in too many pairs to
    be held out by choice.

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
    pieces: list[Piece] = field(default_factory=list)
    common: Keys = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

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

    @property
    def end(self) -> int:
        """The number of cleaned pairs, copies included."""
        return self.pieces[-1].start + self.pieces[-1].count if self.pieces else 0

    @property
    def fates(self) -> Path:
        return self.folder / "fate"

    def fate(self, piece: Piece) -> Fate:
        return read_fates(self.fates, piece.start, piece.count)

    def set_fate(self, piece: Piece, fate: Fate) -> None:
        write_fates(self.fates, piece.start, fate)

    # --- cleaning

    def add(self, part: TextPart, shards: Iterable[tuple[Path, Record]]) -> None:
        """Add the cleaned shards of a part: the folder and the record of each."""
        start, before, seen = self.end, self.counts["read"], Counter[str]()
        for folder, record in shards:
            self.pieces.append(Piece(folder, self.end, record["pairs"], part.way))
            self.counts += Counter(record["counts"])
            seen += Counter(record["seen"])
        self.spans.append((part.corpus, start, self.end))
        if self.counts["read"] == before:
            self.empty.append(part)
        if part.reader == "table" and (remark := part.remark(seen)):
            self.remarks.append(remark)

    def drop_copies(self) -> None:
        """Drop exact copies of pairs, and find the sentences that are in many of those that are left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.fates.open("wb") as file:
            for piece in self.pieces:
                file.write(np.full(piece.count, TRAIN, dtype=np.uint8).tobytes())
        copies, dropped = [], 0
        for number, (low, high) in enumerate(ranges(self.end)):
            hashes, places = self._within("pair", low, high)
            order = np.argsort(hashes, kind="stable")  # stable: the first of equal pairs stays first
            again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
            path = self.folder / f"copies{number}.npy"
            np.save(path, np.sort(places[order[again]]))
            copies.append(path)
            dropped += len(again)
        for piece in self.pieces:
            fate = np.full(piece.count, TRAIN, dtype=np.uint8)
            for path in copies:
                found = np.load(path, mmap_mode="r")
                first, last = np.searchsorted(found, [piece.start, piece.start + piece.count])
                fate[found[first:last] - piece.start] = DROPPED
            self.set_fate(piece, fate)
        for path in copies:
            path.unlink()
        self.counts["duplicate"] = dropped
        self._find_common()

    def _within(
        self, name: str, low: np.uint64, high: np.uint64, only: int | None = None
    ) -> tuple[Keys, Places]:
        """Return the keys of a kind within a range of values, and the numbers of their pairs, by shard.

        ``only`` restricts them to pairs of that fate.
        """
        found, places = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
        for piece in self.pieces:
            keys, order = open_sorted(piece.folder / name)
            where = inside(keys, low, high)
            own, at = np.array(keys[where]), np.array(order[where])
            if only is not None:
                kept = self.fate(piece)[at] == only
                own, at = own[kept], at[kept]
            found.append(own)
            places.append(piece.start + at.astype(np.int64))
        return np.concatenate(found), np.concatenate(places)

    def _find_common(self) -> None:
        most = max(RARE, self.size("train") // COMMON)
        common = [np.empty(0, dtype=np.uint64)]
        for side in (0, 1):
            for low, high in ranges(self.end):
                keys, _ = self._within(f"key{side}", low, high, only=TRAIN)
                distinct, counts = np.unique(keys, return_counts=True)
                common.append(distinct[counts > most])
        self.common = np.unique(np.concatenate(common))

    # --- holding out

    def candidates(self, claims: Claims) -> Keys:
        """Return the sorted distinct keys of the pivot side that may be chosen, memory-mapped.

        A pair has such a key if neither side is common or already claimed, and if no model has translated it.
        """
        bad = np.union1d(claims.keys(), self.common)
        path = self.folder / "free"
        with path.open("wb") as file:
            for piece in self.pieces:
                free = (self.fate(piece) == TRAIN) & (piece.way is None)
                for side in (0, 1):
                    free &= ~piece.has(side, bad)
                file.write(free.astype(np.uint8).tobytes())
        found = ArrayFile(self.folder / "candidates.npy", "<u8")
        for low, high in ranges(self.end):
            distinct = []
            for piece in self.pieces:
                keys, order = open_sorted(piece.folder / f"key{self.pivot}")
                where = inside(keys, low, high)
                free = read_fates(path, piece.start, piece.count)[order[where]]
                distinct.append(np.array(keys[where])[free.astype(bool)])
            found.append(np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *distinct])))
        found.close()
        path.unlink()
        return np.asarray(np.load(self.folder / "candidates.npy", mmap_mode="r"))

    def claim_published(self, claims: Claims) -> None:
        """Claim both sides of the dev and test sets that corpora provide."""
        for split in HELD_OUT:
            pairs = self.own.get(split, []) + self.also_out.get(split, [])
            keys = [key(clean_text(text)) for pair in pairs for text in pair]
            claims.add(published(split), np.array(keys, dtype=np.uint64))

    def adopt(self, quotas: dict[str, int], claims: Claims, seed: int) -> dict[str, int]:
        """Hold out pairs whose sentences other bitexts already hold out; return what is left of the quotas.

        Training has lost these pairs anyway. Pairs with both sides in the dev (or test) set of other bitexts
        come first, then pairs with one side.
        """
        left = dict(quotas)
        for split in HELD_OUT:
            if not left[split] or not claims.count(split):
                continue
            found = self._choose(claims.keys(split), (0, 1))
            found = self._rarest(self._free(found, claims, split))
            both = claims.has(found.keys[0], split) & claims.has(found.keys[1], split)
            order = np.lexsort((mixed(found.keys[self.pivot], seed), ~both))
            taken = found[order[: left[split]]]
            self._give(taken, split, claims)
            left[split] -= len(taken.places)
        return left

    def decide(self, chosen: dict[str, Keys], claims: Claims) -> None:
        """Put one pair of each chosen key into its set, and claim both sides of the pair.

        A pair with a side in the other set is left out, so that no sentence is in both sets.
        """
        for split in HELD_OUT:
            found = self._choose(chosen[split], (self.pivot,))
            self._give(self._rarest(self._free(found, claims, split)), split, claims)

    def _choose(self, wanted: Keys, sides: Sequence[int]) -> Chosen:
        """Return the training pairs with a key, on one of the ``sides``, that is in the sorted ``wanted``."""
        places, keys = (
            [np.empty(0, dtype=np.int64)],
            ([np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint64)]),
        )
        for piece in self.pieces if len(wanted) else ():
            if piece.way is not None:
                continue
            found = np.zeros(piece.count, dtype=bool)
            for side in sides:
                found |= piece.has(side, wanted)
            if found.any():
                at = np.flatnonzero(found & (self.fate(piece) == TRAIN))
                places.append(piece.start + at)
                for side in (0, 1):
                    keys[side].append(piece.keys(side)[at])
        return Chosen(np.concatenate(places), (np.concatenate(keys[0]), np.concatenate(keys[1])))

    def _free(self, pairs: Chosen, claims: Claims, split: str) -> Chosen:
        """Keep the pairs with no side that is in the other set, published, or common."""
        bad = np.union1d(claims.keys(other(split), *map(published, HELD_OUT)), self.common)
        return pairs[~(np.isin(pairs.keys[0], bad) | np.isin(pairs.keys[1], bad))]

    def _rarest(self, pairs: Chosen) -> Chosen:
        """Keep one pair of each pivot key: the one whose other side is in the fewest pairs.

        Training loses all pairs of that other side.
        """
        second = pairs.keys[1 - self.pivot]
        wanted = np.unique(second)
        counts = np.zeros(len(wanted), dtype=np.int64)
        for piece in self.pieces if len(wanted) else ():
            begins, ends = spans_of(open_sorted(piece.folder / f"key{1 - self.pivot}")[0], wanted)
            counts += ends - begins
        order = np.lexsort((pairs.places, counts[np.searchsorted(wanted, second)]))
        _, first = np.unique(pairs.keys[self.pivot][order], return_index=True)
        return pairs[order[first]]

    def _give(self, pairs: Chosen, split: str, claims: Claims) -> None:
        claims.add(split, *pairs.keys)
        places = np.sort(pairs.places)
        for piece in self.pieces:
            first, last = np.searchsorted(places, [piece.start, piece.start + piece.count])
            if last > first:
                fate = self.fate(piece)
                fate[places[first:last] - piece.start] = FATES[split]
                self.set_fate(piece, fate)

    def leave_out(self, claims: Claims) -> None:
        """Drop the training pairs with a side that any bitext holds out."""
        claimed, dropped = claims.keys(), 0
        for piece in self.pieces:
            fate = self.fate(piece)
            gone = (fate == TRAIN) & (piece.has(0, claimed) | piece.has(1, claimed))
            fate[gone] = DROPPED
            dropped += int(gone.sum())
            self.set_fate(piece, fate)
        self.counts["held out"] = dropped

    def train_on_translated(self) -> None:
        """Drop the training pairs that no model has translated: they were only a source of held-out text."""
        dropped = 0
        for piece in self.pieces:
            if piece.way is None:
                fate = self.fate(piece)
                dropped += int((fate == TRAIN).sum())
                fate[fate == TRAIN] = DROPPED
                self.set_fate(piece, fate)
        self.counts["not translated"] = dropped

    def cap(self, most: int, seed: int) -> None:
        """Keep at most ``most`` training pairs: those whose pivot sentences come first in a random order.

        Bitexts with the same pivot language keep the same sentences, if they have them.
        """
        size = self.size("train")
        self.counts["beyond max_pairs"] = max(0, size - most)
        if size <= most:
            return
        last, ties = self._last(most, seed)
        for piece in self.pieces:
            fate, chance = self.fate(piece), mixed(piece.keys(self.pivot), seed)
            equal = np.flatnonzero((fate == TRAIN) & (chance == last))
            fate[(fate == TRAIN) & (chance > last)] = DROPPED
            fate[equal[ties:]] = DROPPED
            ties -= min(ties, len(equal))
            self.set_fate(piece, fate)

    def _last(self, most: int, seed: int) -> tuple[np.uint64, int]:
        """Return the random number of the last of ``most`` training pairs that are kept, and how many pairs
        with this number are kept.

        Find the number digit by digit: for each digit, count the pairs that begin with the digits before it.
        """
        begin, left = 0, most
        for shift in range(64 - DIGIT, -1, -DIGIT):
            counts = np.zeros(1 << DIGIT, dtype=np.int64)
            for piece in self.pieces:
                chance = mixed(piece.keys(self.pivot)[self.fate(piece) == TRAIN], seed) >> np.uint64(shift)
                chance = chance[chance >> np.uint64(DIGIT) == begin]
                counts += np.bincount(
                    (chance & np.uint64((1 << DIGIT) - 1)).astype(np.int64), minlength=1 << DIGIT
                )
            ends = np.cumsum(counts)
            digit = int(np.searchsorted(ends, left))
            left -= int(ends[digit] - counts[digit])
            begin = begin << DIGIT | digit
        return np.uint64(begin), left

    # --- what is left

    def kept_of(self, corpus: str) -> int:
        """Count the pairs of a corpus that were not dropped."""
        spans = [span for span in self.spans if span[0] == corpus]
        return sum(
            int((self.fate(piece) != DROPPED).sum())
            for piece in self.pieces
            if any(start <= piece.start < end for _, start, end in spans)
        )

    def size(self, split: str) -> int:
        if split in self.own:
            return len(self.own[split])
        return sum(int((self.fate(piece) == FATES[split]).sum()) for piece in self.pieces)

    def trained(self, way: str | None) -> int:
        """Count the training pairs that both directions train on, or ``way`` alone."""
        return sum(int((self.fate(piece) == TRAIN).sum()) for piece in self.pieces if piece.way == way)

    @property
    def ways(self) -> tuple[str, str]:
        """The direction from the first language to the second, and the other one."""
        return self.name, "-".join(reversed(self.codes))

    def pairs(self, split: str) -> Iterator[Pair]:
        """Yield the pairs of a split: unchanged if a corpus provides the set, otherwise cleaned."""
        if split in self.own:
            yield from self.own[split]
            return
        for piece in self.pieces:
            places = np.flatnonzero(self.fate(piece) == FATES[split])
            lines = piece.lines() if len(places) else []
            yield from (read_pair(lines[place]) for place in places.tolist())

    def sample(self, wanted: tuple[int, int], generator: np.random.Generator) -> Iterator[str]:
        """Yield ``wanted`` training sentences of each side, in the order of the pairs.

        If there are fewer, sentences repeat; their numbers of repetitions differ by at most one.
        """
        count, start = self.size("train"), 0
        times = [(number // count, _some(count, number % count, generator)) for number in wanted]
        for piece in self.pieces:
            places = np.flatnonzero(self.fate(piece) == TRAIN)
            numbers = []
            for base, extra in times:
                own = np.full(len(places), base, dtype=np.int64)
                first, last = np.searchsorted(extra, [start, start + len(places)])
                own[extra[first:last] - start] += 1
                numbers.append(own)
            start += len(places)
            drawn = np.flatnonzero(numbers[0] + numbers[1])
            lines = piece.lines() if len(drawn) else []
            for at in drawn.tolist():
                for text, own in zip(read_pair(lines[places[at]]), numbers, strict=True):
                    yield from repeat(text, int(own[at]))


def _some(count: int, wanted: int, generator: np.random.Generator) -> Places:
    """Return ``wanted`` of the numbers below ``count``, sorted.

    numpy may need the memory of a permutation of all numbers; for a large ``count`` our own permutation is
    computed element by element instead.
    """
    if count <= 1 << 22:
        return np.sort(generator.choice(count, wanted, replace=False))
    size, turn = (np.full(wanted, number, np.uint64) for number in (count, generator.integers(1 << 62)))
    return np.sort(permute(np.arange(wanted, dtype=np.uint64), size, turn))

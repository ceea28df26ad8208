"""Batching: which sentence pairs each step trains on, and their tensors.

A step is ``batch.count`` units (micro-batches) of at most ``batch.tokens`` padded tokens. Rank r of D trains
on units r, r + D, ..., or on those that :mod:`lsmoe_ds.data.assignment` assigns to it. Every rank plans all
units (numbers only, no text), so all know the totals of the step without communication.

Random choices are hashes of (seed, purpose, counters), never the state of a generator. So any position of the
plan can be reached at once, is the same on every rank, and is a few integers in a checkpoint. Shapes: B
sentences, T positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.config.data import Batch as BatchSettings
from lsmoe_ds.data.assignment import assign, check_affinity
from lsmoe_ds.data.batches import Batch, DirectionIds, Form, Step, Tags
from lsmoe_ds.data.shuffling import Integers, Words, choose, hash_words, permute, thresholds_of
from lsmoe_ds.data.units import by_length, cut
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError

CHUNK_UNITS = 200  # units' worth of sentences that are sorted together: padding stays under 10 % on real text
SMALLEST_CHUNK_UNITS = 48  # in small data a chunk shrinks so that no sentence is in it twice, down to this
SHARES, STEPS, UNITS, TIES, ORDER, PLACES = range(6)  # purposes: the second argument of every hash


class Lengths(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> NDArray[Any]: ...


class TokenStore(Protocol):
    @property
    def lengths(self) -> Lengths: ...
    def __getitem__(self, index: int, /) -> NDArray[Any]: ...


class TokenPairs(Protocol):
    @property
    def source(self) -> TokenStore: ...
    @property
    def target(self) -> TokenStore: ...


class Prepared(Protocol):
    def tokens(self, direction: Direction, split: str, /) -> TokenPairs: ...


@dataclass(frozen=True)
class _Unit:
    direction: Integers  # [B]
    index: Integers  # [B] place in the direction's data
    source_tokens: int
    target_tokens: int


@dataclass(frozen=True)
class _Chunk:
    units: list[_Unit]
    drawn: Integers  # pairs, by direction of the pool


@dataclass
class _Pool:
    """Directions whose sentences may share a unit, and the position in their endless sequence of chunks."""

    directions: Integers
    thresholds: Words
    sentences: int  # drawn for each chunk
    chunk: int = 0
    taken: int = 0  # units of this chunk
    plan: _Chunk | None = None


class BatchStream:
    """Yield the endless sequence of training steps of one data-parallel rank: ``next(stream)`` returns a
    :class:`Step`.

    A direction with n pairs has a share of the sentences in proportion to n ** (1 / temperature). Each epoch
    has every pair once, in a new seeded order. Pairs are left out if a side has more than
    ``batch.max_length`` tokens (tag and EOS counted) or they do not fit into ``batch.tokens``; ``skipped``
    has their number by direction. In a homogeneous stream each unit holds one direction; in a task-affine
    one, the directions of one expert group. ``groups`` is the group of each direction, ``at_home`` the groups
    whose experts each of the ``world`` ranks holds. ``directions`` are those that train, by default all.
    Whatever the number of ranks, a step has units of each direction or group in proportion to its tokens, to
    rounding.

    Raises UserError if the ranks do not divide ``batch.count``, if no direction has a pair, if the pairs of a
    direction are all too long, or if ``groups`` and ``at_home`` do not fit ``batch.languages``, the
    directions and the ranks.
    """

    def __init__(
        self,
        prepared: Prepared,
        languages: Languages,
        vocabulary: Tags,
        batch: BatchSettings,
        temperature: float,
        seed: int,
        rank: int = 0,
        world: int = 1,
        split: str = "train",
        groups: Sequence[int] | None = None,
        at_home: Sequence[Collection[int]] | None = None,
        form: Form | None = None,
        directions: Collection[Direction] | None = None,
    ) -> None:
        if batch.count % world:
            allowed = f"allowed: {world}, {2 * world}, {3 * world}, ..."
            raise UserError(
                f"'data.batch.count' is {batch.count}, which the {world} data-parallel ranks cannot share "
                f"evenly; {allowed}"
            )
        check_affinity(batch.languages, len(languages.directions), world, groups, at_home)
        self._at_home = at_home
        self._form = form or DirectionIds.of(languages, vocabulary)
        self._batch, self._seed, self._rank, self._world = batch, seed, rank, world
        self._pairs = [prepared.tokens(d, split) for d in languages.directions]
        self._lengths = [(pairs.source.lengths, pairs.target.lengths) for pairs in self._pairs]
        self._sizes = np.array([len(source) for source, _ in self._lengths], dtype=np.int64)
        self._overheads = [self._form.overhead(number) for number in range(len(languages.directions))]
        counts = [
            _count_fitting(d, *lengths, overhead, batch)
            for d, lengths, overhead in zip(languages.directions, self._lengths, self._overheads, strict=True)
        ]
        fitting, tokens = np.array(counts, dtype=np.float64).T
        self.skipped = {
            str(d): int(n - f) for d, n, f in zip(languages.directions, self._sizes, fitting, strict=True)
        }

        # A direction with only held-out text (zero-shot) does not train.
        chosen = [directions is None or direction in directions for direction in languages.directions]
        trained = np.flatnonzero((self._sizes > 0) & np.array(chosen))
        if not len(trained):
            which = "no direction" if all(chosen) else "none of 'training.directions'"
            raise UserError(f"{which} has a training pair: add a corpus that has some to 'data.corpora'")
        sizes, fitting, tokens = self._sizes[trained], fitting[trained], tokens[trained]
        kept = sizes ** (1 / temperature)
        drawn = kept * sizes / fitting  # draw more from a direction in which pairs are left out
        places = np.arange(len(trained))
        together = {"mixed": np.zeros_like(places), "homogeneous": places}
        labels = together[batch.languages] if groups is None else np.array(groups, dtype=np.int64)[trained]
        self._labels = np.unique(labels).tolist()  # one for each pool: its expert group, if there are groups
        parts = [np.flatnonzero(labels == label) for label in self._labels]
        self._pools = [self._pool(trained[part], drawn[part], tokens[part] / sizes[part]) for part in parts]
        # Choose units in proportion to tokens: a unit of short sentences holds more sentences.
        self._choice = thresholds_of(np.array([(kept * tokens / fitting)[part].sum() for part in parts]))
        self._step = 0
        self._cursors = np.zeros(
            len(self._sizes), dtype=np.int64
        )  # pairs drawn before each pool's current chunk
        self._plan = {
            "data.directions": [str(d) for d in languages.directions],
            "number of training pairs": self._sizes.tolist(),
            **self._form.settings,
            "data.temperature": float(temperature),
            "data.batch.tokens": batch.tokens,
            "data.batch.max_length": batch.max_length,
            "data.batch.languages": batch.languages,
            "expert group of each direction": None if groups is None else [int(group) for group in groups],
            "training.seed": seed,
        }

    def _pool(self, directions: Integers, weights: NDArray[np.float64], tokens: NDArray[np.float64]) -> _Pool:
        """Make the pool of ``directions`` with these ``weights``.

        ``tokens`` is the tokens per drawn pair of each direction, where pairs that are left out count as 0.
        """
        shares = weights / weights.sum()
        unit = self._batch.tokens / float(shares @ tokens)  # sentences
        once = float((self._sizes[directions] / shares).min())
        sentences = round(min(CHUNK_UNITS * unit, max(once, SMALLEST_CHUNK_UNITS * unit)))
        return _Pool(directions, thresholds_of(weights), max(1, sentences))

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        pools = self._choose_pools().tolist()
        units = [self._take(number) for number in pools]
        mine, away = list(range(self._rank, len(units), self._world)), 0
        if self._at_home is not None:
            assigned, away = assign([self._labels[number] for number in pools], self._at_home)
            mine = assigned[self._rank]
        self._step += 1
        sentences = sum(len(unit.index) for unit in units)
        given = sentences * self._form.given
        return Step(
            batches=[self._build(units[place]) for place in mine],
            target_tokens=sum(unit.target_tokens for unit in units) - given,
            source_tokens=sum(unit.source_tokens for unit in units),
            sentences=sentences,
            directions=np.unique(np.concatenate([unit.direction for unit in units])).tolist(),
            away=away,
            given_tokens=given,
        )

    def _choose_pools(self) -> Integers:
        """Choose the pool of each unit of the step [count] by a systematic sample: a pool with share s gets
        count x s units, to rounding.

        Their order is random: the direction of a unit must not decide its rank or its place in the step.
        """
        count = np.uint64(self._batch.count)
        total, places = self._choice[-1], np.arange(count, dtype=np.uint64)
        start = hash_words(self._seed, STEPS, self._step) % total
        pools = choose(self._choice, (places * total + start) // count)
        return pools[np.argsort(hash_words(self._seed, PLACES, self._step, places), kind="stable")]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which is the same on every rank and can be written as JSON."""
        return {
            "step": self._step,
            "chunks": [pool.chunk for pool in self._pools],
            "taken": [pool.taken for pool in self._pools],
            "cursors": self._cursors.tolist(),
            "plan": self._plan,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at a position saved on any number of ranks; ``batch.count`` may have changed.

        Raises UserError if something else has changed that the order of the data depends on.
        """
        for key, now in self._plan.items():
            saved = state["plan"].get(
                key, "target" if key == "data.tags" else None
            )  # earlier versions had no other
            if saved != now:
                raise UserError(
                    f"the data position was saved with {key} {saved}, now it is {now}: set it back, or start "
                    "a new run"
                )
        self._step = state["step"]
        self._cursors = np.array(state["cursors"], dtype=np.int64)
        for pool, chunk, taken in zip(self._pools, state["chunks"], state["taken"], strict=True):
            pool.chunk, pool.taken, pool.plan = chunk, taken, None

    def _take(self, number: int) -> _Unit:
        """Return the next unit of a pool, and advance the pool."""
        pool = self._pools[number]
        while pool.plan is None or pool.taken >= len(
            pool.plan.units
        ):  # loop, because a chunk may have no pair that fits
            if pool.plan is not None:
                self._cursors[pool.directions] += pool.plan.drawn
                pool.chunk, pool.taken = pool.chunk + 1, 0
            pool.plan = self._plan_chunk(number, pool)
        pool.taken += 1
        return pool.plan.units[pool.taken - 1]

    def _plan_chunk(self, number: int, pool: _Pool) -> _Chunk:
        """Cut the pool's current chunk into units, in the order in which they are taken."""
        where = number, pool.chunk
        choice = choose(pool.thresholds, hash_words(self._seed, SHARES, *where, np.arange(pool.sentences)))
        drawn = np.bincount(choice, minlength=len(pool.directions))
        ends = np.cumsum(drawn)
        direction = np.repeat(pool.directions, drawn)
        cursor = np.arange(ends[-1]) - np.repeat(ends - drawn, drawn) + self._cursors[direction]
        epoch, position = np.divmod(cursor, self._sizes[direction])
        key = hash_words(self._seed, ORDER, direction, epoch)
        index = permute(position.astype(np.uint64), self._sizes[direction].astype(np.uint64), key)
        source, target = np.empty_like(index), np.empty_like(index)
        for one, start, end in zip(
            pool.directions.tolist(), (ends - drawn).tolist(), ends.tolist(), strict=True
        ):
            for lengths, side, overhead in zip(
                self._lengths[one], (source, target), self._overheads[one], strict=True
            ):
                side[start:end] = lengths[index[start:end]] + overhead
        fits = np.flatnonzero(_fits(source, target, self._batch))
        if not len(fits):
            return _Chunk([], drawn)
        # Otherwise pairs of equal lengths would be ordered by direction, and batches mix fewer directions.
        fits = fits[np.argsort(hash_words(self._seed, TIES, *where, fits))]
        order = fits[by_length(source[fits], target[fits], self._batch.tokens)]
        unit_ends = cut(source[order], target[order], self._batch.tokens)
        starts = np.concatenate(([0], unit_ends[:-1]))
        source_tokens = np.add.reduceat(source[order], starts).tolist()
        target_tokens = np.add.reduceat(target[order], starts).tolist()
        shuffled = np.argsort(
            hash_words(self._seed, UNITS, *where, np.arange(len(starts))), kind="stable"
        ).tolist()
        parts = [order[starts[u] : unit_ends[u]] for u in shuffled]
        units = [
            _Unit(direction[p], index[p], source_tokens[u], target_tokens[u])
            for u, p in zip(shuffled, parts, strict=True)
        ]
        return _Chunk(units, drawn)

    def _build(self, unit: _Unit) -> Batch:
        # Sort by language, so that language-specific parts are applied to neighboring sentences together.
        order = np.lexsort(
            (self._form.target_language[unit.direction], self._form.source_language[unit.direction])
        )
        direction, index = unit.direction[order], unit.index[order]
        sentences = [(self._pairs[d], i) for d, i in zip(direction.tolist(), index.tolist(), strict=True)]
        return self._form.collate(
            [p.source[i] for p, i in sentences], [p.target[i] for p, i in sentences], direction
        )


def _fits(source: Integers, target: Integers, batch: BatchSettings) -> NDArray[np.bool_]:
    return (np.maximum(source, target) <= batch.max_length) & (source + target <= batch.tokens)


def _count_fitting(
    direction: Direction,
    source: Lengths,
    target: Lengths,
    overhead: tuple[int, int],
    batch: BatchSettings,
) -> tuple[int, int]:
    """Count the pairs of a direction that fit, and their tokens; raise UserError if it has pairs and none
    fits.

    It works in blocks: a direction may have 10^8 pairs.
    """
    pairs, tokens, block = 0, 0, 2**22
    for start in range(0, len(source), block):
        s = source[start : start + block].astype(np.int64) + overhead[0]
        t = target[start : start + block].astype(np.int64) + overhead[1]
        fits = _fits(s, t, batch)
        pairs += int(fits.sum())
        tokens += int((s + t)[fits].sum())
    if len(source) and not pairs:
        limits = f"'data.batch.tokens' {batch.tokens} and 'data.batch.max_length' {batch.max_length}"
        # Tags and EOS are a token or two, but a prompt may fill the batch by itself.
        prompt = f", of which the prompt takes {overhead[0]}" if overhead[0] > 2 else ""
        raise UserError(f"no training pair of direction {direction} fits into {limits}{prompt}: allow more")
    return pairs, tokens

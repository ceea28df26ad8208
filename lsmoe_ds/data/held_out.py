"""Choose dev and test sentences by key, so that one string is held out of every bitext at once.

A key is the 64-bit hash of a sentence without case, punctuation, blanks and digits. So a sentence is held out
together with its near-duplicates, in every bitext. Sentences are chosen by the key of a bitext's English
side, or of its first side if it has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.config.data import HeldOut
from lsmoe_ds.data.keys import Keys, contains, inside, ranges, reopened

HELD_OUT = ("dev", "test")


def quota(settings: HeldOut, pairs: int) -> dict[str, int]:
    """Return how many sentences to hold out of ``pairs`` pairs: by the recipe, but at most a tenth each."""
    return {"dev": min(settings.dev, pairs // 10), "test": min(settings.test, pairs // 10)}


class Claims:
    """Hold the keys of all held-out sentences, of both sides and all bitexts, by their set.

    The sets are those chosen here and those that corpora provide (:func:`published`).
    """

    def __init__(self) -> None:
        self._keys = {name: np.empty(0, dtype=np.uint64) for name in (*HELD_OUT, *map(published, HELD_OUT))}

    def add(self, name: str, *keys: Keys) -> None:
        self._keys[name] = np.unique(np.concatenate([self._keys[name], *keys]))

    def has(self, keys: Keys, *names: str) -> NDArray[np.bool_]:
        """Tell which of ``keys`` are in one of the sets ``names``, or in any set if there are no names."""
        return contains(self.keys(*names), keys)

    def keys(self, *names: str) -> Keys:
        """Return the sorted keys of the sets ``names``, or of all sets if there are no names."""
        return np.unique(np.concatenate([self._keys[name] for name in names or self._keys]))

    def count(self, name: str) -> int:
        return len(self._keys[name])

    def in_both(self) -> int:
        """Count the sentences that are in both a published dev set and a published test set."""
        return int(self.has(self._keys[published("dev")], published("test")).sum())


def published(split: str) -> str:
    """Return the name, in :class:`Claims`, of the dev or test sets that corpora provide."""
    return f"published {split}"


def other(split: str) -> str:
    """Return the other held-out set."""
    return HELD_OUT[1 - HELD_OUT.index(split)]


def choose(
    keys: Mapping[str, Keys], quotas: Mapping[str, Mapping[str, int]], seed: int
) -> dict[str, dict[str, Keys]]:
    """Choose the keys of the dev and test set of each bitext.

    ``keys`` are each bitext's own, sorted and distinct, possibly memory-mapped; ``quotas`` are the wanted
    sizes of its sets. Keys that most bitexts have come first, so the sets are as multi-way parallel as the
    corpora allow. A key is in the same set in all bitexts. A chosen key is removed from the training text of
    all bitexts that have it. No bitext may lose more than its quota plus a tenth of its keys, so that large
    bitexts do not empty a small one; therefore a set may be smaller than its quota. The same keys, quotas and
    seed give the same choice.
    """
    names = sorted(keys)
    need = np.array([[quotas[name][split] for split in HELD_OUT] for name in names], dtype=np.int64).reshape(
        len(names), 2
    )
    total = np.maximum(need.sum(axis=0), 1)
    spare = need.sum(axis=1) + np.array([len(keys[name]) // 10 for name in names], dtype=np.int64)
    chosen: dict[str, dict[str, list[int]]] = {name: {split: [] for split in HELD_OUT} for name in names}
    taken: set[int] = set()
    for factor in (4, 32, None):
        short = need.sum(axis=1) > 0
        if not short.any():
            break
        limits = {
            name: None if factor is None else factor * int(sum(quotas[name].values()))
            for name, s in zip(names, short, strict=True)
            if s
        }
        candidates = _candidates(keys, limits, seed)
        members = np.stack([contains(reopened(keys[name]), candidates) for name in names], axis=1)
        for key, row in zip(candidates.tolist(), members, strict=True):
            wishes = need[row].sum(axis=0)
            if key in taken or not wishes.any() or (spare[row] <= 0).any():
                continue
            split = int(np.argmax(wishes / total))
            taken.add(key)
            spare[row] -= 1
            for index in np.flatnonzero(row & (need[:, split] > 0)):
                need[index, split] -= 1
                chosen[names[index]][HELD_OUT[split]].append(key)
            if not need.any():
                break
    return {
        name: {split: np.sort(np.array(found, dtype=np.uint64)) for split, found in sets.items()}
        for name, sets in chosen.items()
    }


def _candidates(keys: Mapping[str, Keys], limits: Mapping[str, int | None], seed: int) -> Keys:
    """Return the best keys of each bitext in ``limits``, at most so many (None: all), as one sorted list.

    The best keys are those that most bitexts have.
    """
    best: dict[str, NDArray[Any]] = {name: np.empty(0, dtype=RANKED) for name in limits}
    for low, high in ranges(sum(map(len, keys.values()))):
        here: dict[str, Keys] = {}
        for name in keys:
            own = reopened(keys[name])
            here[name] = np.array(own[inside(own, low, high)])
        distinct, counts = np.unique(np.concatenate(list(here.values())), return_counts=True)
        for name, limit in limits.items():
            ranked = np.empty(len(here[name]), dtype=RANKED)
            ranked["fewer"] = len(keys) - counts[np.searchsorted(distinct, here[name])]
            ranked["chance"] = mixed(here[name], seed)
            ranked["key"] = here[name]
            if limit is not None and len(best[name]) == limit > 0:  # most keys rank below the last of these
                last, fewer = best[name][-1], ranked["fewer"]
                ranked = ranked[
                    (fewer < last["fewer"])
                    | ((fewer == last["fewer"]) & (ranked["chance"] <= last["chance"]))
                ]
            together = np.concatenate([best[name], ranked])
            order = np.lexsort((together["key"], together["chance"], together["fewer"]))
            best[name] = together[order[:limit]]
    everything = np.unique(np.concatenate(list(best.values())))
    return np.asarray(everything["key"], dtype=np.uint64)


RANKED = np.dtype([("fewer", np.int64), ("chance", np.uint64), ("key", np.uint64)])


def mixed(keys: Keys, seed: int) -> Keys:
    """Return a pseudo-random number for each key and the seed (the finalizer of splitmix64)."""
    with np.errstate(over="ignore"):
        words = keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(words ^ (words >> np.uint64(31)), dtype=np.uint64)

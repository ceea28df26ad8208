"""Choosing dev and test sentences by key, so that one string is held out of every bitext at once.

A key is the 64-bit hash of the English side (of the first side where there is no English) without case, punctuation,
blanks and digits: what is chosen by key is held out with its near-duplicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.config import HeldOut

Keys = NDArray[np.uint64]
HELD_OUT = ("dev", "test")
# Keys are compared over all bitexts one range at a time, so that about this many are in memory.
KEYS_AT_ONCE = 1 << 24


def quota(settings: HeldOut, pairs: int) -> dict[str, int]:
    """Sentences to hold out of a bitext of ``pairs`` pairs: as the recipe says, but each set at most a tenth."""
    return {"dev": min(settings.dev, pairs // 10), "test": min(settings.test, pairs // 10)}


def choose(keys: Mapping[str, Keys], quotas: Mapping[str, Mapping[str, int]], seed: int) -> dict[str, dict[str, Keys]]:
    """Keys of the dev and test set of each bitext.

    ``keys`` are each bitext's own, sorted and distinct (memory-mapped ones will do); ``quotas`` how many it wants in each set. Keys
    that the most bitexts have come first, so the sets are as multi-way parallel as the corpora allow; a key is in the
    same set everywhere. A chosen key leaves the training text of all bitexts that have it, and none may lose more than
    its quota and a tenth of its keys: a small bitext is not emptied by the wishes of large ones. So a set may
    end smaller than its quota. The same keys, quotas and seed give the same choice.
    """
    names = sorted(keys)
    need = np.array([[quotas[name][split] for split in HELD_OUT] for name in names], dtype=np.int64).reshape(len(names), 2)
    total = np.maximum(need.sum(axis=0), 1)
    spare = need.sum(axis=1) + np.array([len(keys[name]) // 10 for name in names], dtype=np.int64)
    chosen: dict[str, dict[str, list[int]]] = {name: {split: [] for split in HELD_OUT} for name in names}
    taken: set[int] = set()
    for factor in (4, 32, None):
        short = need.sum(axis=1) > 0
        if not short.any():
            break
        limits = {
            name: None if factor is None else factor * int(sum(quotas[name].values())) for name, s in zip(names, short, strict=True) if s
        }
        candidates = _candidates(keys, limits, seed)
        members = np.stack([_contains(keys[name], candidates) for name in names], axis=1)
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
    return {name: {split: np.sort(np.array(found, dtype=np.uint64)) for split, found in sets.items()} for name, sets in chosen.items()}


def _candidates(keys: Mapping[str, Keys], limits: Mapping[str, int | None], seed: int) -> Keys:
    """For each bitext in ``limits`` that many of its keys (all where None), those first that most bitexts have; in that order."""
    best: dict[str, NDArray[Any]] = {name: np.empty(0, dtype=RANKED) for name in limits}
    ranges = max(1, -(-sum(map(len, keys.values())) // KEYS_AT_ONCE))
    for part in range(ranges):
        low, high = np.uint64((part << 64) // ranges), np.uint64(((part + 1 << 64) // ranges) - 1)
        inside = {name: np.asarray(own[np.searchsorted(own, low) : np.searchsorted(own, high, side="right")]) for name, own in keys.items()}
        distinct, counts = np.unique(np.concatenate(list(inside.values())), return_counts=True)
        for name, limit in limits.items():
            ranked = np.empty(len(inside[name]), dtype=RANKED)
            ranked["fewer"] = len(keys) - counts[np.searchsorted(distinct, inside[name])]
            ranked["chance"] = _mixed(inside[name], seed)
            ranked["key"] = inside[name]
            best[name] = np.sort(np.concatenate([best[name], ranked]))[:limit]
    everything = np.unique(np.concatenate(list(best.values())))
    return np.asarray(everything["key"], dtype=np.uint64)


RANKED = np.dtype([("fewer", np.int64), ("chance", np.uint64), ("key", np.uint64)])


def _mixed(keys: Keys, seed: int) -> Keys:
    """A number for each key that looks random and depends on the seed (the finalizer of splitmix64)."""
    with np.errstate(over="ignore"):
        mixed = keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)


def _contains(own: Keys, wanted: Keys) -> NDArray[np.bool_]:
    """Whether each of ``wanted`` is among the sorted keys ``own``."""
    if not len(own):
        return np.zeros(len(wanted), dtype=bool)
    place = np.minimum(np.searchsorted(own, wanted), len(own) - 1)
    return np.asarray(own[place] == wanted)

"""Chance without state: random words, choices and permutations as functions of a few integers.

Nothing here depends on how numpy's generators or a machine's mathematics round, so all ranks see the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]


def _mix(x: Words) -> Words:
    """Finalizer of MurmurHash3: a bijection of 64-bit words in which every bit depends on every other."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def hash_words(*parts: ArrayLike) -> Words:
    """Hash of non-negative integers, each a number or an array that broadcasts with the others; always an array."""
    state = np.full(1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for part in parts:
        state = _mix(state * np.uint64(0x9E3779B97F4A7C15) + np.asarray(part).astype(np.uint64))
    return state


def permute(position: Words, size: Words, key: Words) -> Integers:
    """Elementwise: where the permutation of ``range(size)`` that is number ``key`` sends ``position``; all uint64 [N].

    A Feistel network on the pairs (x // b, x % b) with a * b just above ``size``, repeated while it leads outside of the
    range (cycle walking). No memory, whatever the size, and any position at once.
    """
    b = np.sqrt(size.astype(np.float64)).astype(np.uint64) + np.uint64(1)
    a = (size + b - np.uint64(1)) // b
    result = position.copy()
    todo = np.arange(len(position))
    while len(todo):
        left, right = np.divmod(result[todo], b[todo])
        for turn in range(4):
            left = (left + hash_words(key[todo], 2 * turn, right)) % a[todo]
            right = (right + hash_words(key[todo], 2 * turn + 1, left)) % b[todo]
        result[todo] = left * b[todo] + right
        todo = todo[result[todo] >= size[todo]]
    return result.astype(np.int64)


def thresholds_of(weights: NDArray[np.float64]) -> Words:
    """Upper ends of ranges of integers in proportion to the weights: whole numbers, so that no rank rounds otherwise."""
    return np.cumsum(np.maximum(np.rint(weights / weights.sum() * 2**32), 1).astype(np.uint64))


def choose(thresholds: Words, words: Words) -> Integers:
    """Places of the random words [N] among the ranges."""
    return np.searchsorted(thresholds, words % thresholds[-1], side="right").astype(np.int64)

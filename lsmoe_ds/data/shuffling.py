"""Randomness without state: random words, choices and permutations as functions of a few integers.

Nothing here depends on numpy's generators or on a machine's rounding, so all ranks get the same results.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]


def _mix(x: Words) -> Words:
    """Apply MurmurHash3's finalizer, a bijection of 64-bit words in which every bit affects every other."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def hash_words(*parts: ArrayLike) -> Words:
    """Hash non-negative integers, each a number or an array; they broadcast. The result is an array."""
    state = np.full(1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for part in parts:
        state = _mix(state * np.uint64(0x9E3779B97F4A7C15) + np.asarray(part).astype(np.uint64))
    return state


def permute(position: Words, size: Words, key: Words) -> Integers:
    """Apply the permutation number ``key`` of ``range(size)`` to ``position``, elementwise; all uint64 [N].

    It is a Feistel network on the pairs (x // b, x % b) with a * b just above ``size``, repeated while the
    result is outside the range (cycle walking). It needs no memory, whatever the size, and computes any
    position directly.
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
    """Return the upper ends of integer ranges in proportion to the weights.

    They are integers, so that all ranks round alike.
    """
    return np.cumsum(np.maximum(np.rint(weights / weights.sum() * 2**32), 1).astype(np.uint64))


def choose(thresholds: Words, words: Words) -> Integers:
    """Return the index of the range into which each of the random words [N] falls."""
    return np.searchsorted(thresholds, words % thresholds[-1], side="right").astype(np.int64)

"""Randomness without state: permutations, random words and choices."""

from __future__ import annotations

import numpy as np
import pytest

from lsmoe_ds.data.shuffling import _mix, choose, permute, thresholds_of


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65537])
def test_permutation_is_a_bijection(size: int) -> None:
    seen = []
    for key in (0, 1, 2**63):
        there = permute(
            np.arange(size, dtype=np.uint64),
            np.full(size, size, dtype=np.uint64),
            np.full(size, key, dtype=np.uint64),
        )
        assert np.array_equal(np.sort(there), np.arange(size))
        seen.append(there.tolist())
    if size > 5:
        assert seen[0] != seen[1] != seen[2]


def test_permutation_is_random() -> None:
    keys = np.arange(20000, dtype=np.uint64)
    for size in (4, 10):
        places = permute(np.full(20000, 2, dtype=np.uint64), np.full(20000, size, dtype=np.uint64), keys)
        assert np.allclose(np.bincount(places, minlength=size) / 20000, 1 / size, atol=0.012)
    n = 10_000
    there = permute(
        np.arange(n, dtype=np.uint64), np.full(n, n, dtype=np.uint64), np.zeros(n, dtype=np.uint64)
    )
    assert abs(np.corrcoef(there[:-1], there[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(np.arange(n), there)[0, 1]) < 0.04


def test_permutation_of_very_many() -> None:
    size, some = 10**11, np.arange(5000, dtype=np.uint64)
    there = permute(some, np.full(5000, size, dtype=np.uint64), np.full(5000, 3, dtype=np.uint64))
    assert len(set(there.tolist())) == 5000
    assert 0 <= there.min() < 0.01 * size < 0.99 * size < there.max() < size


def test_words_are_mixed_as_in_murmurhash3() -> None:
    """Values of its 64-bit finalizer, from the reference implementation."""
    mixed = _mix(np.array([0, 1, 2], dtype=np.uint64))
    assert mixed.tolist() == [0, 0xB456BCFC34C2CB2C, 0x3ABF2A20650683E7]


def test_choices_in_proportion_to_weights() -> None:
    ends = thresholds_of(np.array([1.0, 2.0, 1.0]))
    assert ends.tolist() == [2**30, 3 * 2**30, 2**32]
    words = np.array([0, 2**30 - 1, 2**30, 3 * 2**30 - 1, 3 * 2**30, 2**32 - 1, 2**32], dtype=np.uint64)
    assert choose(ends, words).tolist() == [0, 0, 1, 1, 2, 2, 0]
    assert (
        thresholds_of(np.array([1.0, 1e-12])).tolist()[1] - 2**32 == 1
    )  # what is tiny is still chosen at times

"""Store sorted 64-bit keys in files, and compare them one range of values at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Places = NDArray[np.int64]
# Keys of all shards and bitexts are compared one range at a time, so that only about this many are in memory.
KEYS_AT_ONCE = 1 << 21
BLOCK = 1 << 20  # keys per look-up


def save_sorted(path: Path, keys: Keys) -> None:
    """Write the sorted keys of a shard's pairs, followed by the number of the pair of each key."""
    order = np.argsort(keys, kind="stable")
    with path.open("wb") as file:
        file.write(keys[order].astype("<u8").tobytes())
        file.write(order.astype("<u4").tobytes())


def open_sorted(path: Path) -> tuple[Keys, NDArray[np.uint32]]:
    """Memory-map the keys and pair numbers that :func:`save_sorted` wrote."""
    count = path.stat().st_size // 12
    if not count:  # an empty file cannot be mapped
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint32)
    content = np.memmap(path, dtype=np.uint8, mode="r")
    return content[: 8 * count].view("<u8"), content[8 * count :].view("<u4")


def reopened(array: Keys) -> Keys:
    """Map a memory-mapped array again, so that dropping the result releases the pages read through it."""
    if not isinstance(array, np.memmap) or array.filename is None:
        return array
    return np.asarray(np.load(array.filename, mmap_mode="r"))


def ranges(count: int) -> Iterator[tuple[np.uint64, np.uint64]]:
    """Yield ranges of values (lowest, highest) with about :data:`KEYS_AT_ONCE` of ``count`` keys each."""
    parts = max(1, -(-count // KEYS_AT_ONCE))
    for part in range(parts):
        yield np.uint64((part << 64) // parts), np.uint64(((part + 1 << 64) // parts) - 1)


def inside(keys: Keys, low: np.uint64, high: np.uint64) -> slice:
    """Return the slice of sorted keys that lies in a range of values, both ends included."""
    return slice(int(np.searchsorted(keys, low)), int(np.searchsorted(keys, high, side="right")))


def contains(own: Keys, wanted: Keys) -> NDArray[np.bool_]:
    """Tell which of ``wanted`` are among the sorted keys ``own``."""
    found = np.zeros(len(wanted), dtype=bool)
    for start in range(0, len(wanted) if len(own) else 0, BLOCK):
        block = wanted[start : start + BLOCK]
        place = np.minimum(np.searchsorted(own, block), len(own) - 1)
        found[start : start + BLOCK] = own[place] == block
    return found


def spans_of(keys: Keys, wanted: Keys) -> tuple[Places, Places]:
    """Return where each of ``wanted`` begins and ends in sorted keys that may repeat."""
    return np.searchsorted(keys, wanted), np.searchsorted(keys, wanted, side="right")

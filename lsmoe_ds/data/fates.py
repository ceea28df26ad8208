"""Read and write the fates of a bitext's pairs, a byte each, in a file; memory holds those of one shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TRAIN, DEV, TEST, DROPPED = range(4)
FATES = {"train": TRAIN, "dev": DEV, "test": TEST}
Fate = NDArray[np.uint8]


def read_fates(path: Path, start: int, count: int) -> Fate:
    """Return the fates of ``count`` pairs from number ``start`` on."""
    return np.fromfile(path, dtype=np.uint8, count=count, offset=start)


def write_fates(path: Path, start: int, fates: Fate) -> None:
    """Write the fates of pairs from number ``start`` on into a file that exists."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(fates.tobytes())

"""The cleaned shards of a bitext, and pairs that are chosen from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.data.keys import Keys, Places, open_sorted, spans_of


@dataclass(frozen=True)
class Piece:
    """A cleaned shard of a bitext: pairs number ``start`` to ``start + count``.

    Its ``folder`` has ``pairs.tsv`` and, sorted, the hashes ``pair`` of whole pairs and the keys of both
    sides (:func:`lsmoe_ds.data.keys.save_sorted`). ``way`` is the one direction that trains on it, if not
    both do.
    """

    folder: Path
    start: int
    count: int
    way: str | None = None

    def keys(self, side: int) -> Keys:
        """Return the keys of a side in the order of the pairs."""
        keys, order = open_sorted(self.folder / f"key{side}")
        found = np.empty(self.count, dtype=np.uint64)
        found[order] = keys
        return found

    def has(self, side: int, wanted: Keys) -> NDArray[np.bool_]:
        """Tell for each pair whether the key of a side is among the sorted ``wanted``."""
        keys, order = open_sorted(self.folder / f"key{side}")
        begins, ends = spans_of(keys, wanted)
        places = [order[begin:end] for begin, end in zip(begins, ends, strict=True) if end > begin]
        found = np.zeros(self.count, dtype=bool)
        found[np.concatenate([np.empty(0, dtype=np.uint32), *places])] = True
        return found

    def lines(self) -> list[bytes]:
        """Return the pairs as they are written."""
        return (self.folder / "pairs.tsv").read_bytes().split(b"\n")


@dataclass(frozen=True)
class Chosen:
    """N pairs of a bitext: their numbers, in increasing order, and the keys of their sides [N]."""

    places: Places
    keys: tuple[Keys, Keys]

    def __getitem__(self, which: NDArray[np.bool_] | Places) -> Chosen:
        return Chosen(self.places[which], (self.keys[0][which], self.keys[1][which]))

"""Encode pairs, and write the token files of one bitext and split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.data.vocabulary import Vocabulary

CHUNK = 10_000  # pairs that a process holds at once
Pairs = Sequence[tuple[str, str]]
Counts = dict[str, int]  # of one side: tokens, unknown ones, and the length of the longest sentence


@cache
def load_vocabulary(path: Path, _stamp: int) -> Vocabulary:
    """Read a vocabulary once per process, and again only if its file has another stamp."""
    return Vocabulary.load(path)


def token_type(vocabulary: Vocabulary) -> str:
    """Return the numpy type of ids: two bytes as long as all ids of the vocabulary fit."""
    return "<u2" if vocabulary.size <= 1 << 16 else "<u4"


def _encode(vocabulary: Vocabulary, texts: Iterable[str]) -> tuple[NDArray[Any], NDArray[np.uint32], int]:
    """Return the ids of texts, one after another, their number in each text, and how many are unknown."""
    encoded = vocabulary.encode_all(list(map(clean_text, texts)))
    lengths = np.fromiter(map(len, encoded), dtype=np.uint32, count=len(encoded))
    count = int(lengths.sum(dtype=np.int64))
    ids = np.fromiter(chain.from_iterable(encoded), dtype=token_type(vocabulary), count=count)
    return ids, lengths, int((ids == vocabulary.UNK).sum()) if vocabulary.UNK >= 0 else 0


class ArrayFile:
    """A growing one-dimensional .npy file.

    The header is rewritten at the end; numpy leaves room in it for a longer shape.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.file: BinaryIO = path.open("wb")
        self.dtype, self.count = np.dtype(dtype), 0
        self._header()
        self.start = self.file.tell()

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        )

    def append(self, array: NDArray[Any]) -> None:
        self.file.write(array.astype(self.dtype, copy=False).tobytes())
        self.count += len(array)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        assert self.file.tell() == self.start
        self.file.close()


class EncodedShard:
    """Write the ids and lengths of a shard's sentences: ``0.tokens.npy`` and ``0.lengths.npy`` for the first
    side, ``1.*`` for the second.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.tokens = [ArrayFile(folder / f"{side}.tokens.npy", token_type(vocabulary)) for side in (0, 1)]
        self.lengths = [ArrayFile(folder / f"{side}.lengths.npy", "<u4") for side in (0, 1)]
        self.counts: list[Counts] = [add_counts(()), add_counts(())]

    def append(self, pairs: Pairs) -> None:
        """Encode further pairs."""
        if not pairs:
            return
        for side, count in enumerate(self.counts):
            ids, lengths, unknown = _encode(self.vocabulary, (pair[side] for pair in pairs))
            self.tokens[side].append(ids)
            self.lengths[side].append(lengths)
            longest = int(lengths.max(initial=0))
            more = {"tokens": len(ids), "unknown": unknown, "longest": longest}
            self.counts[side] = add_counts((count, more))

    def close(self) -> list[Counts]:
        """Return the counts of both sides."""
        for array in self.tokens + self.lengths:
            array.close()
        return self.counts


def add_counts(counts: Iterable[Counts]) -> Counts:
    """Combine the counts of several parts of a side."""
    total = {"tokens": 0, "unknown": 0, "longest": 0}
    for each in counts:
        for name in ("tokens", "unknown"):
            total[name] += each[name]
        total["longest"] = max(total["longest"], each["longest"])
    return total


def write_tokens(
    folder: Path, codes: tuple[str, str], pairs: Pairs, vocabulary: Vocabulary
) -> dict[str, Counts]:
    """Encode a dev or test set, and write its ids, offsets and sentences.

    Returns the counts of each side.
    """
    folder.mkdir(parents=True)
    for side, code in enumerate(codes):
        with (folder / f"{code}.txt").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{pair[side]}\n" for pair in pairs)
    shard = EncodedShard(folder, vocabulary)
    for start in range(0, len(pairs), CHUNK):
        shard.append(pairs[start : start + CHUNK])
    counts = dict(zip(codes, shard.close(), strict=True))
    for side, code in enumerate(codes):
        Joining(folder, side, code, [folder], token_type(vocabulary)).run()
        for name in ("tokens", "lengths"):
            (folder / f"{side}.{name}.npy").unlink()
    return counts


@dataclass(frozen=True)
class Joining:
    """Write the ids and offsets of a side (0 or 1, the language ``code``) from those of its shards, one after
    another.
    """

    folder: Path
    side: int
    code: str
    shards: Sequence[Path]
    dtype: str

    def run(self) -> None:
        """Write the two files."""
        tokens = ArrayFile(self.folder / f"{self.code}.tokens.npy", self.dtype)
        offsets = ArrayFile(self.folder / f"{self.code}.offsets.npy", "<i8")
        offsets.append(np.zeros(1, dtype=np.int64))
        for shard in self.shards:
            lengths = np.load(shard / f"{self.side}.lengths.npy")
            offsets.append(tokens.count + np.cumsum(lengths, dtype=np.int64))
            tokens.append(np.load(shard / f"{self.side}.tokens.npy"))
        tokens.close()
        offsets.close()

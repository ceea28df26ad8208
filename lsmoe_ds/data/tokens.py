"""Write the token files of one bitext and split."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.data.workers import Workers, chunks

CHUNK = 10_000
Side = tuple[NDArray[Any], NDArray[np.int64], int]


@cache
def _vocabulary(path: Path, _stamp: int) -> Vocabulary:
    return Vocabulary.load(path)


def _encode_chunk(pairs: list[tuple[str, str]], model: Path, stamp: int, dtype: str) -> tuple[Side, Side]:
    """Encode both sides of pairs: the ids, their number in each sentence, and how many are unknown."""
    vocabulary = _vocabulary(model, stamp)

    def side(index: int) -> Side:
        encoded = vocabulary.encode_all([clean_text(pair[index]) for pair in pairs])
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        ids = np.fromiter((i for each in encoded for i in each), dtype=dtype, count=int(lengths.sum()))
        return ids, lengths, int((ids == vocabulary.UNK).sum()) if vocabulary.UNK >= 0 else 0

    return side(0), side(1)


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


def write_tokens(
    folder: Path,
    codes: tuple[str, str],
    pairs: Iterator[tuple[str, str]],
    model: Path,
    size: int,
    text: bool,
    workers: Workers,
) -> dict[str, dict[str, int]]:
    """Write ids, offsets and (with ``text``) sentences of both sides.

    Returns for each side the number of tokens, of unknown tokens, and the length of the longest sentence.
    """
    folder.mkdir(parents=True)
    dtype = "<u2" if size <= 1 << 16 else "<u4"
    tokens = [ArrayFile(folder / f"{code}.tokens.npy", dtype) for code in codes]
    offsets = [ArrayFile(folder / f"{code}.offsets.npy", "<i8") for code in codes]
    counts = [{"tokens": 0, "unknown": 0, "longest": 0} for _ in codes]
    for array in offsets:
        array.append(np.zeros(1, dtype=np.int64))
    texts = (
        [(folder / f"{code}.txt").open("w", encoding="utf-8", newline="\n") for code in codes] if text else []
    )

    def passing() -> Iterator[tuple[str, str]]:
        for pair in pairs:
            for file, sentence in zip(texts, pair, strict=False):
                file.write(sentence + "\n")
            yield pair

    encode = partial(_encode_chunk, model=model, stamp=os.stat(model).st_mtime_ns, dtype=dtype)
    for done in workers.map(encode, chunks(passing(), CHUNK)):
        for side, (ids, lengths, unknown) in enumerate(done):
            offsets[side].append(counts[side]["tokens"] + np.cumsum(lengths))
            tokens[side].append(ids)
            counts[side]["tokens"] += len(ids)
            counts[side]["unknown"] += unknown
            counts[side]["longest"] = max(counts[side]["longest"], int(lengths.max(initial=0)))
    for array in tokens + offsets:
        array.close()
    for file in texts:
        file.close()
    return dict(zip(codes, counts, strict=True))

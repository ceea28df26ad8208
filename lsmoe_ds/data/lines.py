"""Read UTF-8 files line by line, plain or compressed by gzip or zstd.

Errors name the file and line of a wrong byte.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zstandard

from lsmoe_ds.data.zstd import open_zstd
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import shown
from lsmoe_ds.notices import counted

LINE_LIMIT = 1 << 20
BLOCK = 1 << 22  # bytes that are read at once
# The endings of compressed files, and their first bytes, with which no UTF-8 text begins.
PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}


def plain_or_packed(path: Path) -> Path:
    """Return the path, or ``PATH.gz`` or ``PATH.zst`` if only that file exists."""
    packed = (path.parent / f"{path.name}{ending}" for ending in PACKED)
    return path if path.exists() else next((each for each in packed if each.exists()), path)


def without_packing(path: Path) -> Path:
    """Return the path without ``.gz`` or ``.zst`` at its end."""
    return path.with_suffix("") if path.suffix in PACKED else path


def readable(paths: Iterable[Path]) -> list[Path]:
    """Return the sorted paths; of a file that exists plain and compressed, only the plain one."""
    found: dict[Path, Path] = {}
    for path in sorted(
        paths, key=lambda path: [*PACKED, ""].index(path.suffix if path.suffix in PACKED else "")
    ):
        found[without_packing(path)] = path
    return sorted(found.values())


def packing(path: Path) -> str | None:
    """Return ``.gz`` or ``.zst`` for a compressed file, by its name or first bytes; None for a plain one."""
    with path.open("rb") as file:
        first = file.read(max(map(len, PACKED.values())))
    by_name = path.suffix if path.suffix in PACKED else None
    return by_name or next((ending for ending, magic in PACKED.items() if first.startswith(magic)), None)


def open_unpacked(path: Path) -> BinaryIO:
    """Open a plain or compressed file for reading its uncompressed bytes."""
    match packing(path):
        case ".gz":
            return gzip.open(path)  # type: ignore[return-value]
        case ".zst":
            return open_zstd(path)
    return path.open("rb")


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without their line ends.

    Raises UserError for a file that is missing, unreadable, damaged or not UTF-8.
    """
    with explained(path), open_unpacked(path) as file:
        yield from decode(file, path, 1)


def decode(file: BinaryIO, name: Path, first: int) -> Iterator[str]:
    """Yield the lines of an open file from its position, the start of line ``first`` of ``name``."""
    number = first - 1
    while line := file.readline(LINE_LIMIT):
        number += 1
        if len(line) == LINE_LIMIT:
            raise UserError(
                f"{name}, line {number}: the line is longer than {LINE_LIMIT} bytes: this is no file "
                "of sentences"
            )
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            byte, position = f"0x{line[error.start]:02x}", error.start + 1
            raise UserError(
                f"{name}, line {number}: not UTF-8 (byte {byte} at position {position})"
            ) from None


@dataclass(frozen=True)
class Stretch:
    """Describe ``count`` lines of an uncompressed file, from line ``first`` (counted from 1) at byte
    ``start``.

    Errors call the file ``name``, the original if ``path`` is an uncompressed copy. ``sha256`` is that of the
    lines' bytes.
    """

    path: Path
    name: Path
    first: int
    count: int
    start: int
    sha256: str

    def lines(self) -> Iterator[str]:
        """Yield the lines. Raises UserError as :func:`read_lines`, and for a file that has become shorter."""
        found = 0
        with explained(self.path), self.path.open("rb") as file:
            file.seek(self.start)
            for line in islice(decode(file, self.name, self.first), self.count):
                found += 1
                yield line
        if found < self.count:
            raise UserError(f"{self.name} has changed while it was read: prepare the data again")


def index_lines(path: Path, every: int, copy: Path | None = None) -> tuple[int, list[int], list[str]]:
    """Count the lines of a file, and find where each stretch of ``every`` lines begins.

    Returns the number of lines, the byte offsets of lines 0, ``every``, ..., and the sha256 of each stretch.
    Writes the uncompressed content to ``copy``, if given. Raises UserError as :func:`read_lines`, but accepts
    bytes that are not UTF-8.
    """
    lines, size, starts, sums, last = 0, 0, [0], [hashlib.sha256()], b"\n"
    with contextlib.ExitStack() as stack:
        stack.enter_context(explained(path))
        file = stack.enter_context(open_unpacked(path))
        out = stack.enter_context(copy.open("wb")) if copy is not None else None
        while block := file.read(BLOCK):
            if out is not None:
                out.write(block)
            ends = None
            done, last = 0, block[-1:]
            count = block.count(b"\n")
            while (wanted := len(starts) * every - lines) <= count:  # a stretch ends in this block
                if ends is None:
                    ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + 1
                end = int(ends[wanted - 1])
                sums[-1].update(block[done:end])
                sums.append(hashlib.sha256())
                starts.append(size + end)
                done = end
            sums[-1].update(block[done:])
            lines, size = lines + count, size + len(block)
    lines += last != b"\n"
    stretches = -(-lines // every)
    return lines, starts[:stretches], [each.hexdigest() for each in sums[:stretches]]


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise UserError for a file that is missing, unreadable or damaged."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"there is no file {shown(path)}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        program = "zstd" if packing(path) == ".zst" else "gzip"
        raise UserError(f"{path} is damaged: {program} cannot read it ({error})") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_whole(path: Path) -> str:
    """Return the text of a UTF-8 file, with lines of any length. Raises UserError as :func:`read_lines`."""
    with explained(path), open_unpacked(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {number}: not UTF-8 (byte 0x{content[error.start]:02x})") from None


def read_aligned(
    first: Path, second: Path, read: Callable[[Path], Iterator[str]] = read_lines, what: str = "line"
) -> Iterator[tuple[str, str]]:
    """Yield the lines of two files side by side.

    ``read`` may yield other items, which errors call ``what``. Raises UserError with both counts if they are
    not equal.
    """
    sides = read(first), read(second)
    for count, (left, right) in enumerate(zip_longest(*sides)):
        if left is None or right is None:
            (shorter, longer), rest = (
                ((first, second), sides[1]) if left is None else ((second, first), sides[0])
            )
            more = count + 1 + sum(1 for _ in rest)
            raise unequal(shorter, count, longer, more, what)
        yield left, right


def unequal(shorter: Path, count: int, longer: Path, more: int, what: str = "line") -> UserError:
    """Return the error for two files that should have equally many lines."""
    return UserError(
        f"{shorter} has {counted(count, what)} but {longer} has {more:,}: aligned files need equally "
        f"many {what}s"
    )

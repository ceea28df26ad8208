"""Read UTF-8 files line by line, with or without gzip compression.

An error names the file and line of a wrong byte.
"""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import shown
from lsmoe_ds.notices import counted

LINE_LIMIT = 1 << 20
GZIP = b"\x1f\x8b"  # the first bytes of gzip files, with which no UTF-8 text begins


def plain_or_gz(path: Path) -> Path:
    """Return the path, or ``PATH.gz`` if only that file exists."""
    compressed = path.parent / f"{path.name}.gz"
    return compressed if not path.exists() and compressed.exists() else path


def without_gz(path: Path) -> Path:
    """Return the path without ``.gz`` at its end."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def readable(paths: Iterable[Path]) -> list[Path]:
    """Sort the paths, without compressed copies of uncompressed files."""
    found = set(paths)
    return sorted(path for path in found if path.suffix != ".gz" or without_gz(path) not in found)


def _open(path: Path) -> BinaryIO:
    """Open a file, through gzip if its name or its first bytes say so."""
    with path.open("rb") as file:
        compressed = path.suffix == ".gz" or file.read(len(GZIP)) == GZIP
    return gzip.open(path) if compressed else path.open("rb")  # type: ignore[return-value]


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without their line ends.

    Raises UserError for a file that is missing, unreadable, damaged or not UTF-8.
    """
    with _explained(path), _open(path) as file:
        number = 0
        while line := file.readline(LINE_LIMIT):
            number += 1
            if len(line) == LINE_LIMIT:
                raise UserError(
                    f"{path}, line {number}: the line is longer than {LINE_LIMIT} bytes: this is no file "
                    "of sentences"
                )
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at position "
                    f"{error.start})"
                ) from None


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise UserError for a file that is missing, unreadable or damaged."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"there is no file {shown(path)}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: gzip cannot read it ({error})") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_whole(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises UserError as :func:`read_lines`, but for no length of lines."""
    with _explained(path), _open(path) as file:
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
            raise UserError(
                f"{shorter} has {counted(count, what)} but {longer} has {more:,}: aligned files need one "
                f"{what} for each other's {what}"
            )
        yield left, right

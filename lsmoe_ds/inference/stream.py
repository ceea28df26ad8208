"""Lines of a stream in chunks: large ones while lines come fast, small ones when the stream pauses."""

from __future__ import annotations

import io
import os
import select
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import BinaryIO

from lsmoe_ds.errors import UserError

FIRST_CHUNK, LARGEST_CHUNK = 16, 2048  # lines
PAUSE = 0.1  # seconds without a further line after which those that are there make a chunk
BLOCK = 1 << 16


def in_chunks(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield lines in chunks that grow from 16 to 2,048 lines."""
    rest, size = iter(lines), FIRST_CHUNK
    while chunk := list(islice(rest, size)):
        yield chunk
        size = min(2 * size, LARGEST_CHUNK)


def read_chunks(stream: BinaryIO) -> Iterator[list[str]]:
    """Yield the lines of a stream of UTF-8 without their ends, in chunks as :func:`in_chunks`; what is there
    when the stream pauses is a chunk of its own, so that whoever types a line, or sends it through a pipe,
    gets it answered.

    Raises UserError that names the first line which is not UTF-8, after the lines before it.
    """
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:  # not a file of the system's
        yield from in_chunks(read_lines(stream))
        return
    size, number, ended = FIRST_CHUNK, 0, False
    lines: list[bytes] = []
    rest = b""
    while not ended or lines:
        while (
            len(lines) < size
            and not ended
            and select.select([descriptor], [], [], PAUSE if lines else None)[0]
        ):
            try:
                block = os.read(descriptor, BLOCK)
            except OSError as error:
                raise UserError(f"standard input cannot be read: {error.strerror}") from None
            *found, rest = (rest + block).split(b"\n")
            ended = not block
            lines += found if not ended or not rest else [*found, rest]
        chunk, lines = lines[:size], lines[size:]
        texts = []
        for line in chunk:
            number += 1
            try:
                texts.append(decode_line(line, number))
            except UserError:
                if texts:
                    yield texts
                raise
        if texts:
            yield texts
        size = min(2 * size, LARGEST_CHUNK) if len(chunk) == size else size


def read_lines(stream: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a stream of UTF-8 without their ends. Raises UserError that names the first line
    which is not UTF-8.
    """
    for number, line in enumerate(stream, start=1):
        yield decode_line(line, number)


def decode_line(line: bytes, number: int) -> str:
    """Return the text of a line, which is the ``number``-th, without its end."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1})"
        ) from None

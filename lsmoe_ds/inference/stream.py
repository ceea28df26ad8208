"""Read lines of a stream in chunks (large while lines come fast, small when the stream pauses), and report
progress.
"""

from __future__ import annotations

import io
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import BinaryIO, TypeVar

from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import LINE_EVERY

FIRST_CHUNK, LARGEST_CHUNK = 16, 2048  # lines
PAUSE = 0.1  # seconds without a further line, after which a chunk ends
BLOCK = 1 << 16


In = TypeVar("In")
Out = TypeVar("Out")


def in_chunks(lines: Iterable[In]) -> Iterator[list[In]]:
    """Yield lines in chunks that grow from 16 to 2,048 lines."""
    rest, size = iter(lines), FIRST_CHUNK
    while chunk := list(islice(rest, size)):
        yield chunk
        size = min(2 * size, LARGEST_CHUNK)


def read_chunks(stream: BinaryIO) -> Iterator[list[str]]:
    """Yield the lines of a UTF-8 stream without their ends, in chunks as :func:`in_chunks`.

    A chunk also ends when the stream pauses, so that lines that are typed or piped one by one are answered at
    once. Raises UserError, which names the first line that is not UTF-8, after the lines before it.
    """
    return convert_lines(_read_bytes(stream), decode_line)


def convert_lines(chunks: Iterable[Sequence[In]], convert: Callable[[In, int], Out]) -> Iterator[list[Out]]:
    """Yield chunks of the results of ``convert`` for each line and its number, from 1.

    A UserError about a line is raised after the lines before it are yielded.
    """
    number = 0
    for chunk in chunks:
        done: list[Out] = []
        for line in chunk:
            number += 1
            try:
                done.append(convert(line, number))
            except UserError:
                if done:
                    yield done
                raise
        yield done


def _read_bytes(stream: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the undecoded lines of a stream in nonempty chunks, as :func:`read_chunks` does."""
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:  # the stream has no file descriptor
        yield from in_chunks(stream)
        return
    size, ended = FIRST_CHUNK, False
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
        if chunk:
            yield chunk
        size = min(2 * size, LARGEST_CHUNK) if len(chunk) == size else size


def decode_line(line: bytes, number: int) -> str:
    """Return the text of a line, which is the ``number``-th, without its end."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1})"
        ) from None


def telling(done: str, total: int, of: str) -> Callable[[int], None]:
    """Return a function to call with the number of items done since the last call. Every half minute it
    prints ``DONE 10 of 50 OF``.
    """
    count, said = 0, time.monotonic()

    def advance(more: int) -> None:
        nonlocal count, said
        count += more
        if count < total and (now := time.monotonic()) - said >= LINE_EVERY:
            said = now
            print(f"lsmoe: {done} {count:,} of {total:,} {of}", file=sys.stderr, flush=True)

    return advance

"""Read files compressed by zstd."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import zstandard

BLOCK = 1 << 20  # compressed bytes read at a time


class _Unpacked(io.RawIOBase):
    """Read the content of a file's frames, one after another.

    Raises EOFError if the file ends within a frame; zstandard's own reader would treat that as the end.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._ready = path.open("rb"), b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            packed = (self._frame.unused_data if self._frame and self._frame.eof else b"") or self._file.read(
                BLOCK
            )
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the file ends within a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_zstd(path: Path) -> io.BufferedReader:
    """Open a packed file; reading raises EOFError or zstandard.ZstdError if it is damaged."""
    return io.BufferedReader(_Unpacked(path), BLOCK)

"""Read aligned files inside a zip, as OPUS offers them for each corpus and language pair."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from lsmoe_ds.data.lines import decode, read_aligned
from lsmoe_ds.errors import UserError


def names_in(archive: Path) -> list[str]:
    """List the files in a zip, sorted. Raises UserError for one that is damaged."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return sorted(info.filename for info in opened.infolist() if not info.is_dir())
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive} is damaged or no zip: {error}") from None


class ZippedReader:
    """Yield the pairs of two aligned files in a zip."""

    def __init__(self, archive: Path, first: str, second: str) -> None:
        self.archive, self.names = archive, (PurePosixPath(first), PurePosixPath(second))

    def __call__(self, tell: Callable[[str], None]) -> Iterator[tuple[str, str]]:
        first, second = (self.archive / name for name in self.names)  # the names in errors
        yield from read_aligned(first, second, self._lines)

    def _lines(self, path: Path) -> Iterator[str]:
        name = path.relative_to(self.archive).as_posix()
        try:
            with zipfile.ZipFile(self.archive) as opened, opened.open(name) as file:
                yield from decode(cast(BinaryIO, file), path, 1)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{self.archive} is damaged: {name} cannot be read ({error})") from None

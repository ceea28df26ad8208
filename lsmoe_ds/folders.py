"""Folders and files that are whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeGuard

from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted

BLOCK = 1 << 20
# What a path can be guilty of, so that it is told in a sentence; anything else is a fault of the program or the machine.
UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of each file, by its name below ``folder``."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in sorted(names)}


def is_plain(name: object) -> bool:
    """Whether this is the name of a file below a folder, as we write them: ``train/de-en/de.txt``, not
    ``../x`` or ``/x``.
    """
    plain = isinstance(name, str) and name.isprintable() and len(name.encode()) < 256
    return plain and all(part.strip(".") for part in str(name).split("/"))


def is_count(value: object) -> TypeGuard[int]:
    """Whether this, out of a JSON file, is a whole number that counts something."""
    return type(value) is int and 0 <= value < 2**63


def damage(folder: Path, files: Any, verify: bool) -> str | None:
    """What is wrong with the files of a folder, by :func:`describe_files`; sums are compared only with
    ``verify``.
    """
    if not isinstance(files, dict):
        return f"{folder} does not say which files it has"
    for name, expected in files.items():
        if not is_plain(name):
            return f"it names the file '{name}': only files below {folder} are read"
        path = folder / name
        if not isinstance(expected, dict) or not is_count(expected.get("bytes")) or not isinstance(expected.get("sha256"), str):
            return f"size and sha256 of {path} are not noted"
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"]:
            size, written = counted(path.stat().st_size, "byte"), expected["bytes"]
            return f"{path} has {size} where {written:,} should be"
        if verify and sha256(path) != expected["sha256"]:
            return f"{path} is not what was written (its sha256 differs)"
    return None


def checker(folder: Path, files: dict[str, dict[str, Any]]) -> Callable[[Path], None]:
    """Of a file in the folder: raises UserError if its sum is not what :func:`describe_files` noted."""

    def check(path: Path) -> None:
        if wrong := damage(folder, {path.name: files.get(path.name)}, verify=True):
            raise UserError(f"{folder} is damaged: {wrong}")

    return check


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file or it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


KINDS = {int: "a count", float: "a number", str: "text", dict: "an object"}


def read_fields(path: Path, **fields: type) -> dict[str, Any]:
    """The JSON object in a file, after :func:`check_fields`. Raises UserError also if there is none."""
    value = read_json(path)
    if value is None:
        raise UserError(f"{path} is damaged: it holds no JSON object" if path.exists() else f"{path} is missing")
    check_fields(path, value, **fields)
    return value


def check_fields(path: Path, value: Any, **fields: type) -> None:
    """Raises UserError unless a value out of a file is an object with these ``fields`` and each is what
    :data:`KINDS` says.
    """
    for name, kind in fields.items():
        if not isinstance(value, dict) or not _is(value.get(name), kind):
            raise UserError(f"{path} is damaged: '{name}' should be {KINDS[kind]}")


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return is_count(value) or (isinstance(value, float) and 0 <= value < float("inf"))
    return is_count(value) if kind is int else isinstance(value, kind)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place, synced, then renamed. Symbolic links stay and are
    written through.

    Raises UserError if it cannot be written.
    """
    given, path = path, resolved(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")  # two nodes may write at once
    try:
        # A lone surrogate, which a JSON file can smuggle in, is not worth losing the scores for.
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{given} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_huggingface(folder: Path) -> bool:
    """Tell whether a folder is one of Hugging Face, and not as ``lsmoe convert`` leaves it."""
    ours = any((folder / name).exists() for name in ("provenance.json", "recipe.yaml"))
    return (folder / "config.json").is_file() and not ours


def how_to_import(folder: Path) -> str | None:
    """Say how a folder of Hugging Face becomes one of ours; None for any other folder."""
    if not is_huggingface(folder):
        return None
    made = f"`lsmoe convert {folder} --to consolidated --out DIR --set data.corpora=... --set data.languages=...`"
    return f"it is one of Hugging Face, of which {made} makes one to start from"


def shown(path: Path) -> str:
    """Write a path as it was given, and where that is relative, also as an absolute one."""
    return str(path) if path.is_absolute() else f"{path} ({path.absolute()})"


def resolved(path: Path) -> Path:
    """Follow symbolic links, so that whatever a folder is called it has one lock, and is replaced where it
    really is.
    """
    try:
        return path.resolve()
    except (RuntimeError, OSError) as error:  # which of them a loop of links raises depends on Python's version
        reason = "its symbolic links lead in a circle"
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            reason = str(error.strerror)
        raise UserError(f"{path} cannot be used: {reason}") from None


def check_can_write(folder: Path, instead: str, make: bool = True) -> None:
    """Raise UserError that says what to do ``instead`` unless files can be made in a folder; makes it if it may."""
    try:
        if make and not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): {instead}") from None


def recover(path: Path) -> None:
    """Put back a folder whose replacement was cut off between its two renames. Call it under the lock."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[int]:
    """Hold the right to write ``path``, by whatever name, against other processes; if another has it, wait,
    or raise UserError.

    Yields a descriptor: a process that inherits it holds the right as long as it lives. The file that is
    locked lies beside ``path`` as long as anyone holds it.
    """
    given, path = path, resolved(path)
    with explain_errors(given):
        path.parent.mkdir(parents=True, exist_ok=True)
        place = path.with_name(f".{path.name}.lock")
        file = _lock(place, given, wait)
    try:
        recover(path)
        yield file.fileno()
    finally:
        _unlock(file, place)


def _lock(place: Path, given: Path, wait: bool) -> TextIO:
    """Open the file of a lock and lock it; once more if whoever held it has removed it meanwhile."""
    while True:
        file = place.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
                return file
            file.close()
            raise UserError(f"another process is writing {given}: wait for it, or stop it") from None
        if _is_at(file, place):
            return file
        file.close()


def _unlock(file: TextIO, place: Path) -> None:
    """Give up a lock; remove its file unless somebody has it, who waited for it or inherited the descriptor."""
    with file, suppress(OSError):
        again = place.open()
        file.close()
        with again:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(again, place):  # and stays so: only who has locked it removes it
                place.unlink()


def _is_at(file: TextIO, place: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except OSError:
        return False


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` when the block ends well; otherwise ``path``
    stays as it was.

    Use it under :func:`locked`. A symbolic link stays: the folder that it leads to is replaced. A full disk
    or missing permission is a UserError; what was half written is removed.
    """
    given, path = path, resolved(path)
    new, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    with explain_errors(given):
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            new.mkdir(parents=True)
            yield new
            sync(new)
            if path.exists():
                path.rename(old)
            new.rename(path)
            sync(path.parent, contents=False)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            recover(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # numpy tells of a write that came short without an errno
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "written" in str(error)):
            raise UserError(f"the disk is full: {path} cannot be written; what was there before is untouched") from None
        if error.errno in UNWRITABLE:
            raise UserError(f"{path} cannot be written: {error.strerror} ({error.filename})") from None
        raise


def sync(folder: Path, contents: bool = True) -> None:
    """Forces a folder, and with ``contents`` everything below it, to the disk."""
    for root, _, files in os.walk(folder, topdown=False) if contents else ():
        for name in files:
            _sync_file(Path(root, name))
        _sync_file(Path(root))
    if not contents:
        _sync_file(folder)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

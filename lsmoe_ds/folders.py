"""Write folders and files completely or not at all: beside their final place, synced, then renamed."""

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
from lsmoe_ds.notices import counted, listed

BLOCK = 1 << 20
# Errors that a wrong path can cause; these become a UserError. Others are faults of the program or the
# machine.
UNWRITABLE = {
    *(
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.ENOENT,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    )
}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the size in bytes and the sha256 of each file, by its name below ``folder``."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in sorted(names)
    }


def is_plain(name: object) -> bool:
    """Tell whether this names a file below a folder: ``train/de-en/de.txt``, not ``../x`` or ``/x``."""
    plain = isinstance(name, str) and name.isprintable() and len(name.encode()) < 256
    return plain and all(part.strip(".") for part in str(name).split("/"))


def is_count(value: object) -> TypeGuard[int]:
    """Tell whether a value from a JSON file is a count: a whole number from 0 to below 2^63."""
    return type(value) is int and 0 <= value < 2**63


def damage(folder: Path, files: Any, verify: bool) -> str | None:
    """Describe what is wrong with the files of a folder, or return None.

    ``files`` is what :func:`describe_files` recorded. Checksums are compared only with ``verify``.
    """
    if not isinstance(files, dict):
        return f"{folder} does not say which files it has"
    for name, expected in files.items():
        if not is_plain(name):
            return f"it names the file '{name}': only files below {folder} are read"
        path = folder / name
        if (
            not isinstance(expected, dict)
            or not is_count(expected.get("bytes"))
            or not isinstance(expected.get("sha256"), str)
        ):
            return f"size and sha256 of {path} are not noted"
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"]:
            size, written = counted(path.stat().st_size, "byte"), expected["bytes"]
            return f"{path} has {size} where {written:,} should be"
        if verify and sha256(path) != expected["sha256"]:
            return f"{path} is not what was written (its sha256 differs)"
    return None


def check_nothing_lost(folder: Path, ours: Iterable[str], instead: str) -> None:
    """Raise UserError, which suggests ``instead``, if a folder to replace has other files than ``ours``."""
    known = {name.split("/")[0] for name in ours}
    if others := sorted(path.name for path in folder.iterdir() if path.name not in known):
        raise UserError(
            f"{folder} holds {listed(others)}, which would be lost: {instead}, or remove this one"
        )


def checker(folder: Path, files: dict[str, dict[str, Any]]) -> Callable[[Path], None]:
    """Return a function that checks a file of the folder against the checksum in ``files``.

    It raises UserError if the checksum is not the one that :func:`describe_files` recorded.
    """

    def check(path: Path) -> None:
        if wrong := damage(folder, {path.name: files.get(path.name)}, verify=True):
            raise UserError(f"{folder} is damaged: {wrong}")

    return check


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file does not exist or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


KINDS = {int: "a count", float: "a number", str: "text", dict: "an object", list: "a list"}


def read_fields(path: Path, **fields: type) -> dict[str, Any]:
    """Return a file's JSON object, checked by :func:`check_fields`. Raises UserError if there is none."""
    value = read_json(path)
    if value is None:
        raise UserError(
            f"{path} is damaged: it holds no JSON object" if path.exists() else f"{path} is missing"
        )
    check_fields(path, value, **fields)
    return value


def check_fields(path: Path, value: Any, **fields: type) -> None:
    """Raise UserError unless a value from a file is an object with these ``fields`` of the given types."""
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
    """Write a file completely or not at all: beside its final place, synced, then renamed.

    A symbolic link stays, and its target is written. Raises UserError if the file cannot be written.
    """
    given, path = path, resolved(path)
    temporary = path.with_name(
        f".{path.name}.{socket.gethostname()}.{os.getpid()}"
    )  # two nodes may write at once
    try:
        # A lone surrogate, which a JSON file can contain, is replaced rather than losing the whole file for
        # it.
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
    """Tell whether a folder is a Hugging Face model that ``lsmoe convert`` did not write."""
    ours = any((folder / name).exists() for name in ("provenance.json", "recipe.yaml"))
    return (folder / "config.json").is_file() and not ours


def how_to_import(folder: Path) -> str | None:
    """Say how to import a Hugging Face folder; None for any other folder."""
    if not is_huggingface(folder):
        return None
    made = (
        f"`lsmoe convert {folder} --as consolidated --out DIR --set data.corpora=... --set "
        "data.languages=...`"
    )
    return (
        f"it is one of Hugging Face, of which {made} makes one to start from, and so does "
        "'model.huggingface' in a recipe"
    )


def is_stored_recipe(file: Path) -> bool:
    """Tell whether a file is the recipe that a run has stored in its folder, not one of a converted model."""
    beside = file.name == "recipe.yaml" and (file.parent / "vocabulary.model").is_file()
    return beside and file.is_file() and not (file.parent / "provenance.json").exists()


def how_to_rename(recipe: Path) -> str | None:
    """Say how to rename keys in a recipe that lsmoe_ds itself wrote; None for a recipe of the user."""
    if is_stored_recipe(recipe):
        return f"{recipe} is the recipe of a run: rename them there by hand, and the run resumes"
    if recipe.name == "recipe.yaml" and (recipe.parent / "provenance.json").is_file():
        return f"{recipe.parent} was converted by an earlier version: convert its model again"
    return None


def shown(path: Path) -> str:
    """Return a path as it was given and, if that is relative, also the absolute path."""
    return str(path) if path.is_absolute() else f"{path} ({path.absolute()})"


def resolved(path: Path) -> Path:
    """Follow symbolic links. Raises UserError if that is impossible.

    A folder then has one lock under all its names, and is replaced at its real place.
    """
    try:
        return path.resolve()
    except (RuntimeError, OSError) as error:  # for a loop of links, one or the other, by Python's version
        reason = "its symbolic links lead in a circle"
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            reason = str(error.strerror)
        raise UserError(f"{path} cannot be used: {reason}") from None


def check_can_write(folder: Path, instead: str, make: bool = True) -> None:
    """Raise UserError, which suggests ``instead``, unless files can be created in a folder.

    With ``make`` a folder that does not exist is made.
    """
    try:
        if make and not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): {instead}") from None


def recover(path: Path) -> None:
    """Restore a folder whose replacement was interrupted between its two renames. Call it under the lock."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[int]:
    """Hold the lock on ``path``, under all its names, inside the block.

    If another process holds it, this waits, or without ``wait`` raises UserError. Yields the lock's file
    descriptor: a process that inherits it holds the lock as long as it lives. The lock file is beside
    ``path`` and exists as long as a process holds the lock.
    """
    with _held(path, wait) as held:
        if held is None:
            raise UserError(f"another process is writing {path}: wait for it, or stop it")
        yield held


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold the lock on ``path`` inside the block unless another process does; yields whether it is held.

    A process that dies, on this machine or another, loses its locks. On a file system without locks every
    process holds them all.
    """
    with _held(path, wait=False) as held:
        yield held is not None


@contextmanager
def _held(path: Path, wait: bool) -> Iterator[int | None]:
    given, path = path, resolved(path)
    with explain_errors(given):
        path.parent.mkdir(parents=True, exist_ok=True)
        place = path.with_name(f".{path.name}.lock")
        file = _lock(place, wait)
    if file is None:
        yield None
        return
    try:
        recover(path)
        yield file.fileno()
    finally:
        _unlock(file, place)


def _lock(place: Path, wait: bool) -> TextIO | None:
    """Open a lock file and lock it; repeat if its last holder has removed it meanwhile.

    If another process holds the lock, returns None, or waits for it with ``wait``.
    """
    while True:
        file = place.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # the file system has no locks
                return file
            file.close()
            return None
        if _is_at(file, place):
            return file
        file.close()


def _unlock(file: TextIO, place: Path) -> None:
    """Release a lock. Remove its file unless a process that waited, or inherited the lock, holds it."""
    with file, suppress(OSError):
        again = place.open()
        file.close()
        with again:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(again, place):  # this cannot change now: only the holder of the lock removes the file
                place.unlink()


def _is_at(file: TextIO, place: Path) -> bool:
    """Tell whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except OSError:
        return False


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces ``path`` if the block ends without an exception.

    After an exception ``path`` stays as it was, and the new folder is removed. Use it under :func:`locked`. A
    symbolic link stays, and its target is replaced. A full disk or a missing permission raises UserError.
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
    """Turn an OSError inside the block into a UserError about ``path``, if disk or path is the cause."""
    try:
        yield
    except OSError as error:
        # numpy reports an incomplete write without an errno.
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "written" in str(error)):
            raise UserError(
                f"the disk is full: {path} cannot be written; what was there before is untouched"
            ) from None
        if error.errno in UNWRITABLE:
            raise UserError(f"{path} cannot be written: {error.strerror} ({error.filename})") from None
        raise


def sync(folder: Path, contents: bool = True) -> None:
    """Force a folder, and with ``contents`` everything below it, to the disk."""
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

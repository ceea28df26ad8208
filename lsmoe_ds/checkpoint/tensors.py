"""Lazy tensors by name: conversions compose them, and so never hold the whole model in memory.

On disk they are safetensors: one file, or above :data:`SHARD` bytes several files with an index, as in
``transformers``.
"""

from __future__ import annotations

import errno
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lsmoe_ds.checkpoint.sparse import LEAST, from_bits, to_bits
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import is_count, is_plain, read_json, write_json

SHARD = 2**29  # bytes of a file, more only for a single larger tensor
AT_ONCE = 2**28  # bytes to read from mapped files before they are reopened
# Types that reading keeps, by safetensors' names; others, those of weights, become float32.
KEPT = {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
KEPT |= {"U8": torch.uint8, "BOOL": torch.bool}
# Keys of a file's metadata: the tensors that are not parameters, and the shapes of those stored as bits.
BUFFERS, PACKED = "buffers", "packed"
T = TypeVar("T")


class LazyTensor(NamedTuple):
    """A tensor that is computed on demand, on the CPU."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32
    is_buffer: bool = False  # state that is no parameter

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * self.dtype.itemsize


class Tensors(Mapping[str, Tensor]):
    """A mapping that computes a tensor at each access."""

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Tensors:
        """Wrap any mapping of tensors."""
        if isinstance(tensors, Tensors):
            return tensors

        def entry(value: Tensor) -> LazyTensor:
            return LazyTensor(tuple(value.shape), lambda: value, value.dtype)

        return cls({name: entry(value) for name, value in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].make()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without computing the tensor."""
        return self.entries[name].shape

    @property
    def numbers(self) -> int:
        """The number of values in all parameters."""
        return sum(entry.numbers for entry in self.entries.values() if not entry.is_buffer)


class Files(Generic[T]):
    """Keep files open. Pages of a mapped file stay in memory while it is open, so all files are reopened
    after :data:`AT_ONCE` bytes.

    ``check`` is called once for each file before it is read, and raises UserError if the file has changed.
    """

    def __init__(self, open_file: Callable[[Path], T], check: Callable[[Path], None] | None = None) -> None:
        self._open_file, self._check = open_file, check
        self._checked: set[Path] = set()
        self._opened: dict[Path, T] = {}
        self._read = 0

    def get(self, path: Path, to_read: int = 0) -> T:
        """Return an open file, from which the caller will copy ``to_read`` bytes; 0 if it reads only names
        and shapes.
        """
        if self._read > AT_ONCE or len(self._opened) > 64:
            self._opened.clear()
            self._read = 0
        self._read += to_read
        if to_read and self._check is not None and path not in self._checked:
            self._check(path)
            self._checked.add(path)
        if path not in self._opened:
            self._opened[path] = self._open_file(path)
        return self._opened[path]


def save_tensors(
    tensors: Mapping[str, Tensor], folder: Path, stem: str = "model", shard: int | None = None
) -> list[str]:
    """Write ``stem.safetensors``, or shards and ``stem.safetensors.index.json``, and return the names of the
    files.

    A shard has up to ``shard`` bytes (default :data:`SHARD`); memory holds one at a time. Booleans are stored
    as bits, unless they are few. If writing fails, raises OSError for a full disk, otherwise UserError.
    """
    given = Tensors.of(tensors).entries
    packed = {
        name: entry.shape
        for name, entry in given.items()
        if entry.dtype == torch.bool and entry.numbers >= LEAST
    }
    whole = Tensors(given | {name: _as_bits(given[name]) for name in packed})
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in whole.entries.items():
        if shards[-1] and size + entry.bytes > (SHARD if shard is None else shard):
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.bytes
    if len(shards) == 1:
        _save(whole, shards[0], packed, folder / f"{stem}.safetensors")
        return [f"{stem}.safetensors"]
    files = {
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, 1)
    }
    for file, names in files.items():
        _save(whole, names, packed, folder / file)
    index = f"{stem}.safetensors.index.json"
    places = {name: file for file, names in files.items() for name in names}
    size = sum(entry.bytes for entry in whole.entries.values())
    write_json(folder / index, {"metadata": {"total_size": size}, "weight_map": places})
    return [*files, index]


def _as_bits(entry: LazyTensor) -> LazyTensor:
    return entry._replace(
        shape=((entry.numbers + 7) // 8,),
        make=lambda: to_bits(entry.make().reshape(-1)),
        dtype=torch.uint8,
    )


def _save(tensors: Tensors, names: list[str], packed: Mapping[str, tuple[int, ...]], path: Path) -> None:
    notes = {
        BUFFERS: [name for name in names if tensors.entries[name].is_buffer],
        PACKED: {name: packed[name] for name in names if name in packed},
    }
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in notes.items() if value}
    try:
        safetensors.torch.save_file({name: _apart(tensors[name]) for name in names}, path, metadata)
    except safetensors.SafetensorError as error:
        if "No space left" in str(error):  # safetensors reports a full disk as its own error type
            raise OSError(errno.ENOSPC, str(error)) from None
        raise UserError(f"{path} cannot be written: {error}") from None
    _sort_metadata(path)
    # safetensors makes its files private; give them the read permissions of their folder.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a file that was just saved, whose order safetensors leaves to chance.

    So the same model always gives the same bytes, which matters because checksums identify models.
    """
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        entries = json.loads(header)
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        ordered = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(header))
        if len(ordered) == len(header):  # leave a header of another format unchanged
            file.seek(8)
            file.write(ordered)


def _apart(value: Tensor) -> Tensor:
    """Return a contiguous tensor in its own memory, because safetensors refuses views of shared memory."""
    own = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if own else value.clone(memory_format=torch.contiguous_format)


def open_tensors(folder: Path, stem: str = "model", check: Callable[[Path], None] | None = None) -> Tensors:
    """Open files that :func:`save_tensors` or ``transformers`` wrote; ``check`` as in :class:`Files`.

    Half precision becomes float32. Raises UserError if a file is missing or damaged.
    """
    files: Files[Any] = Files(_open, check)

    def entries(path: Path) -> dict[str, LazyTensor]:
        opened = files.get(path)
        buffers, packed, found = _buffers(path, opened), _packed(path, opened), {}
        for name in opened.keys():  # noqa: SIM118
            part = opened.get_slice(name)
            entry = _entry(
                files, path, name, tuple(part.get_shape()), KEPT.get(part.get_dtype(), torch.float32)
            )
            if name in packed:
                entry = _from_bits(entry, packed[name], path)
            found[name] = entry._replace(is_buffer=name in buffers)
        return found

    return _join(folder, stem, "safetensors", entries)


def open_pickled(folder: Path, stem: str) -> Tensors:
    """Open files that torch saved: ``stem.bin``, or shards with an index.

    Raises UserError if a file is missing, damaged, or holds anything but tensors; no code in it is executed.
    """
    files: Files[dict[str, Tensor]] = Files(_unpickle)

    def entry(path: Path, name: str, value: Tensor) -> LazyTensor:
        numbers = value.numel()
        return LazyTensor(
            tuple(value.shape), lambda: files.get(path, 4 * numbers)[name].to(torch.float32, copy=True)
        )

    return _join(
        folder,
        stem,
        "bin",
        lambda path: {name: entry(path, name, value) for name, value in files.get(path).items()},
    )


def _join(folder: Path, stem: str, ending: str, read: Callable[[Path], dict[str, LazyTensor]]) -> Tensors:
    """Join the entries of ``stem.ending``, or of the files that its index lists."""
    whole = f"{stem}.{ending}"
    index = folder / f"{whole}.index.json"
    if (folder / whole).exists() or not index.exists():
        listed = {whole}
        wanted = None
    else:
        wanted = (read_json(index) or {}).get("weight_map")
        if (
            not isinstance(wanted, dict)
            or not wanted
            or not all(isinstance(name, str) for name in wanted.values())
        ):
            raise UserError(f"{index} is damaged: it has no 'weight_map' from tensors to files")
        listed = set(wanted.values())
        for name in listed:
            if not is_plain(name) or Path(name).name != name or not name.endswith(f".{ending}"):
                raise UserError(f"{index} names the file '{name}': only {ending} files beside it are read")
    entries: dict[str, LazyTensor] = {}
    for name in sorted(listed):
        entries |= {
            key: entry
            for key, entry in read(folder / name).items()
            if wanted is None or wanted.get(key) == name
        }
    missing = [] if wanted is None else sorted(wanted.keys() - entries.keys())
    if missing:
        raise UserError(f"{folder} is damaged: {wanted[missing[0]]} lacks {missing[0]}")  # type: ignore[index]
    return Tensors(entries)


def _note(opened: Any, key: str, otherwise: Any) -> Any:
    """Return a note in the metadata of an open file; None if it is damaged."""
    try:
        return json.loads((opened.metadata() or {}).get(key, json.dumps(otherwise)))
    except (ValueError, RecursionError):
        return None


def _buffers(path: Path, opened: Any) -> list[str]:
    """Return which tensors of an open file are buffers."""
    names = _note(opened, BUFFERS, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is damaged: its '{BUFFERS}' should be a list of names")
    return names


def _packed(path: Path, opened: Any) -> dict[str, list[int]]:
    """Return the shapes of the tensors of an open file that are stored as bits."""
    shapes = _note(opened, PACKED, {})
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and all(is_count(size) for size in shape) for shape in shapes.values()
    ):
        raise UserError(f"{path} is damaged: its '{PACKED}' should be shapes by name")
    return shapes


def _from_bits(entry: LazyTensor, shape: list[int], path: Path) -> LazyTensor:
    return entry._replace(
        shape=tuple(shape), make=lambda: from_bits(entry.make(), shape, path), dtype=torch.bool
    )


def _entry(
    files: Files[Any], path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> LazyTensor:
    def make() -> Tensor:
        try:
            value: Tensor = files.get(path, dtype.itemsize * math.prod(shape)).get_tensor(name)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from None
        return value.to(dtype, copy=True)

    return LazyTensor(shape, make, dtype)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, "pt")
    except (safetensors.SafetensorError, OSError, json.JSONDecodeError) as error:
        what = f"{path} is missing" if not path.is_file() else f"{path} is damaged: {error}"
        raise UserError(what) from None


def _unpickle(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # from unpickling, torch's reader, or the system
        why = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which could run code: it is not read ({why})"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise UserError(f"{path} should hold tensors by name and nothing else")
    return found

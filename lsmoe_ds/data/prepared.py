"""Prepared data as the other rooms see it: token ids in memory-mapped files, the vocabulary and the manifest.

``SPLIT/BITEXT/CODE.tokens.npy`` holds the ids of all sentences of one side, one after another, without tag and EOS;
``CODE.offsets.npy`` where each begins (int64 [N+1]); for dev and test ``CODE.txt`` holds the sentences, one a line.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, read_json
from lsmoe_ds.languages import Direction, Languages

MANIFEST = "manifest.json"
FORMAT = 1  # of the folder and of the cleaning rules: a change of either must prepare anew


class TokenStore:
    """The N sentences of one side of a bitext, memory-mapped; pickled as a path."""

    def __init__(self, folder: Path, code: str) -> None:
        self.folder, self.code = folder, code

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path, str]]:
        return TokenStore, (self.folder, self.code)

    @cached_property
    def ids(self) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of all sentences, flat."""
        return _open_array(self.folder / f"{self.code}.tokens.npy")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each sentence begins in ``ids``, and at the end their number: [N+1]."""
        return _open_array(self.folder / f"{self.code}.offsets.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of sentence ``index`` (counted from 0), without tag and EOS."""
        if not 0 <= index < len(self):
            raise IndexError(f"sentence {index} of {len(self)}")
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Number of ids of each sentence [N]."""
        return np.diff(self.offsets).astype(np.int32)


@dataclass(frozen=True)
class TokenPairs:
    """Sentence i of ``source`` translates as sentence i of ``target``."""

    source: TokenStore
    target: TokenStore

    def __len__(self) -> int:
        return len(self.source)


def _open_array(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"prepared data: {path} cannot be read: {error}") from None


class PreparedData:
    """What ``lsmoe data prepare`` wrote for one recipe."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.languages = Languages(tuple(Direction.parse(text) for text in manifest["settings"]["directions"]))
        self.vocabulary = Vocabulary.load(folder / "vocabulary.model")

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> PreparedData:
        """Opens a folder after checking that it is whole: every file's size, with ``verify`` also its sha256.

        Raises UserError for a folder that is absent, damaged or of another format.
        """
        folder = Path(path)
        manifest = read_json(folder / MANIFEST)
        if manifest is None:
            raise UserError(f"there is no prepared data in {folder}: run 'lsmoe data prepare' on the recipe")
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{folder} was prepared by another version (format {manifest.get('format')}, {FORMAT} is needed): prepare it again"
            )
        wrong = damage(folder, manifest["files"], verify)
        if wrong is not None:
            raise UserError(f"prepared data is damaged: {wrong}; run 'lsmoe data prepare' on the recipe")
        _allow_files(4 * len(manifest["bitexts"]))
        return cls(folder, manifest)

    def _bitext(self, direction: Direction, split: str) -> Path:
        if direction.bitext not in self.manifest["bitexts"]:
            known = ", ".join(self.manifest["bitexts"])
            raise UserError(f"there is no prepared text for {direction} in {self.folder}: it has {known}")
        return self.folder / split / direction.bitext

    def tokens(self, direction: Direction, split: str) -> TokenPairs:
        """Tokens of a direction in ``train``, ``dev`` or ``test``."""
        folder = self._bitext(direction, split)
        return TokenPairs(TokenStore(folder, direction.source), TokenStore(folder, direction.target))

    def text(self, direction: Direction, split: str) -> tuple[list[str], list[str]]:
        """Source and target sentences of a direction in ``dev`` or ``test``."""
        folder = self._bitext(direction, split)
        return _read_lines(folder / f"{direction.source}.txt"), _read_lines(folder / f"{direction.target}.txt")


def _read_lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="\n") as file:  # a carriage return within a sentence is no end of it
        return file.read().split("\n")[:-1]


def _allow_files(count: int) -> None:
    """A memory map holds its file open: hundreds of bitexts pass the usual limit of 1,024, which a process may raise for itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count + 512:
        wanted = count + 512 if hard == resource.RLIM_INFINITY else min(hard, count + 512)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

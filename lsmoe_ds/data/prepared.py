"""Open prepared data: token ids in memory-mapped files, the vocabulary and the manifest.

``SPLIT/BITEXT/CODE.tokens.npy`` holds the ids of all sentences of one side, one after another, without tag
and EOS. ``CODE.offsets.npy`` holds where each begins (int64 [N+1]). For dev and test ``CODE.txt`` holds the
sentences, one a line. Labelled text has ``labels`` as its other side (:mod:`lsmoe_ds.data.labels`); a long
example is several token sequences, but one line of text. In training text, the pairs that train only the
direction of the bitext's name come first, and those that train only the reverse come last; ``one_way`` in the
manifest has both counts.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lsmoe_ds.config.groups import Groups
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.comparison import MANIFEST, VOCABULARY, check_settings, check_trained_on, data_directories
from lsmoe_ds.data.formats import SPLITS
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import check_fields, damage, is_count, read_json

ONE_WAY = "one_way"  # in the manifest
LABELS = "labels"  # the other side of labelled text
FORMAT = 2  # of the folder, and of the cleaning and holding-out rules: data of another number are refused
PREPARE = "run 'lsmoe data prepare' on the recipe"


class TokenStore:
    """The N sentences of one side of a bitext, memory-mapped; pickled as a path.

    ``left_out`` is the number of sentences to skip at the beginning and at the end.
    """

    def __init__(self, folder: Path, code: str, left_out: tuple[int, int] = (0, 0)) -> None:
        self.folder, self.code, self.left_out = folder, code, left_out

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path, str, tuple[int, int]]]:
        return TokenStore, (self.folder, self.code, self.left_out)

    @cached_property
    def ids(self) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of all sentences, flat."""
        return _open_array(self.folder / f"{self.code}.tokens.npy", "u")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each sentence begins in ``ids``, and where the last one ends: [N+1]."""
        path = self.folder / f"{self.code}.offsets.npy"
        offsets = _open_array(path, "i")
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(self.ids):
            raise UserError(f"prepared data: {path} does not say where the sentences of {self.code} begin")
        first, last = self.left_out
        return offsets[first : len(offsets) - last]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.unsignedinteger[Any]]:
        """Return the ids of sentence ``index`` (counted from 0), without tag and EOS."""
        if not 0 <= index < len(self):
            raise IndexError(f"sentence {index} of {len(self)}")
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def tokens(self) -> int:
        """The number of ids of all sentences."""
        return int(self.offsets[-1] - self.offsets[0])

    @property
    def lengths(self) -> Lengths:
        """Number of ids of each sentence [N]."""
        return Lengths(self)


class Lengths:
    """The lengths of N sentences, read from the memory-mapped offsets on demand.

    A billion pairs cost no private memory: all processes of a machine, and both directions of a bitext,
    share the pages of the file.
    """

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: slice | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the lengths at an array of indexes, or of a slice without a step."""
        offsets = self.store.offsets
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            found = np.diff(np.asarray(offsets[start : stop + 1])) if start < stop else np.zeros(0, np.int64)
        else:
            found = np.asarray(offsets[index + 1] - offsets[index])
        if (found < 0).any():
            raise UserError(
                f"prepared data: {self.store.folder} has sentences of {self.store.code} that end before they "
                "begin"
            )
        return found.astype(np.int64, copy=False)


@dataclass(frozen=True)
class TokenPairs:
    """Two aligned sides: sentence i of ``target`` translates sentence i of ``source``."""

    source: TokenStore
    target: TokenStore

    def __len__(self) -> int:
        return len(self.source)


def _open_array(path: Path, kinds: str) -> NDArray[Any]:
    """Memory-map a flat array of one of numpy's ``kinds``. Raises UserError for any other file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        Exception
    ) as error:  # the header is Python text; numpy does not catch what tokenizing and parsing it raises
        raise UserError(f"prepared data: {path} cannot be read: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise UserError(f"prepared data: {path} holds {array.dtype} in {array.ndim} dimensions")
    return array


def sides(direction: Direction) -> tuple[str, str]:
    """Return the names of a direction's two sides in files: its languages, or the language and its labels."""
    return direction.source, LABELS if direction.alone else direction.target


def check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raise UserError for prepared data of another version, and for a damaged manifest."""
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path.parent} was prepared by another version (format {manifest.get('format')}, {FORMAT} is "
            "needed): prepare it again"
        )
    check_fields(path, manifest, settings=dict, corpora=dict, bitexts=dict, cleaning=dict, files=dict)
    for stamp in manifest["corpora"].values():
        check_fields(path, stamp, bytes=int, sha256=str)
    check_fields(path, manifest["files"], **{VOCABULARY: dict})
    directions, notices = manifest["settings"].get("directions"), manifest.get("notices")
    if (
        not isinstance(directions, list)
        or not directions
        or not all(isinstance(each, str) for each in directions)
    ):
        raise UserError(f"{path} is damaged: 'directions' should be a list of directions")
    if not isinstance(notices, list) or not all(isinstance(each, str) for each in notices):
        raise UserError(f"{path} is damaged: 'notices' should be a list of sentences")
    for direction in map(Direction.parse, directions):
        check_fields(path, manifest["bitexts"], **{direction.bitext: dict})
    for name, splits in manifest["bitexts"].items():
        check_fields(path, manifest["cleaning"], **{name: dict})
        for split in SPLITS:
            check_fields(path, splits, **{split: dict})
            check_fields(path, splits[split], pairs=int, sides=dict)
            one_way = splits[split].get(ONE_WAY, [0, 0])
            if not isinstance(one_way, list) or len(one_way) != 2 or not all(map(is_count, one_way)):
                raise UserError(f"{path} is damaged: '{ONE_WAY}' should be two counts")
            for code in name.split("-"):
                check_fields(path, splits[split]["sides"], **{code: dict})
                check_fields(path, splits[split]["sides"][code], tokens=int, unknown=int)


class PreparedData:
    """Hold what ``lsmoe data prepare`` wrote. :meth:`of` opens it and compares it with a recipe."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._whole: set[Path] = set()  # folders of held-out text whose checksums were compared
        self.languages = Languages(
            tuple(Direction.parse(text) for text in manifest["settings"]["directions"])
        )
        self.vocabulary = Vocabulary.load(folder / VOCABULARY)
        self.groups = Groups()

    @classmethod
    def of(cls, recipe: Recipe, home: Path | None = None) -> PreparedData:
        """Open the prepared data of a recipe. All readers of prepared data use this method.

        ``home`` is the run or converted folder that the recipe comes from: data are searched from there, and
        must be those of its training. Raises UserError, with the key and both values, for data prepared with
        other settings than the recipe's; for data prepared again since the training; and for data that are
        absent, damaged or of another format.
        """
        folders = [directory / "prepared" / recipe.data_name for directory in data_directories(recipe, home)]
        there = [folder for folder in folders if (folder / MANIFEST).is_file()]
        if not there:
            looked = ", ".join(str(folder.absolute()) for folder in folders)
            raise UserError(
                f"there is no prepared data in {recipe.prepared} (looked for {looked}): {PREPARE}"
            )
        wrong = []
        for folder in there:
            try:
                return cls._matching(folder, recipe, home)
            except UserError as error:
                wrong.append(error)
        raise wrong[0]

    @classmethod
    def _matching(cls, folder: Path, recipe: Recipe, home: Path | None) -> PreparedData:
        data = cls.open(folder)
        check_settings(folder, data.manifest["settings"], recipe, home)
        if home is not None:
            check_trained_on(home, folder, data.manifest)
        data.languages, data.groups = recipe.languages, recipe.data.groups
        return data

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> PreparedData:
        """Open a folder after checking the size of every file, with ``verify`` also its sha256.

        Raises UserError for a folder that is absent, damaged or of another format.
        """
        folder = Path(path)
        manifest = read_json(folder / MANIFEST)
        if manifest is None:
            raise UserError(f"there is no prepared data in {folder}: {PREPARE}")
        check_manifest(folder / MANIFEST, manifest)
        wrong = damage(folder, manifest["files"], verify)
        if wrong is not None:
            raise UserError(f"prepared data is damaged: {wrong}; {PREPARE}")
        _allow_files(4 * len(manifest["bitexts"]))
        return cls(folder, manifest)

    def _bitext(self, direction: Direction, split: str) -> Path:
        if direction.bitext not in self.manifest["bitexts"]:
            known = ", ".join(self.manifest["bitexts"])
            raise UserError(f"there is no prepared text for {direction} in {self.folder}: it has {known}")
        folder = self.folder / split / direction.bitext
        if split != "train" and folder not in self._whole:
            # All scores depend on these small files, so compare checksums, not only sizes.
            inside = f"{split}/{direction.bitext}/"
            files = {name: stamp for name, stamp in self.manifest["files"].items() if name.startswith(inside)}
            if wrong := damage(self.folder, files, verify=True):
                raise UserError(f"prepared data is damaged: {wrong}; {PREPARE}")
            self._whole.add(folder)
        return folder

    def language_groups(self) -> dict[str, str]:
        """Return the resource group of each language: from the recipe's lists, or else by the training pairs
        of its largest bitext. Monolingual (labelled) data have only the recipe's groups.
        """
        if self.languages.groups or self.languages.directions[0].alone:
            return dict(self.languages.groups)
        sizes = {
            code: [
                splits["train"]["pairs"]
                for bitext, splits in self.manifest["bitexts"].items()
                if code in bitext.split("-")
            ]
            for code in self.languages.codes
        }
        return {code: self.groups.of(max(pairs)) for code, pairs in sizes.items()}

    def tokens(self, direction: Direction, split: str) -> TokenPairs:
        """Return the tokens of a direction in ``train``, ``dev`` or ``test``."""
        folder = self._bitext(direction, split)
        left_out = self._left_out(direction, split)
        source, target = (TokenStore(folder, side, left_out) for side in sides(direction))
        return TokenPairs(source, target)

    def _left_out(self, direction: Direction, split: str) -> tuple[int, int]:
        """Count the pairs at the beginning and the end of a bitext that train the other direction alone."""
        first, last = self.manifest["bitexts"][direction.bitext][split].get(ONE_WAY, (0, 0))
        return (0, last) if direction.bitext == str(direction) else (first, 0)

    def lines(self, direction: Direction, split: str) -> int:
        """Count the lines of text of a direction: sentence pairs, or examples with labels."""
        found = self.manifest["bitexts"][direction.bitext][split]
        return int(found.get("examples", found["pairs"])) - sum(self._left_out(direction, split))

    def text(self, direction: Direction, split: str) -> tuple[list[str], list[str]]:
        """Return source and target lines of a direction in ``dev`` or ``test``."""
        folder = self._bitext(direction, split)
        source, target = sides(direction)
        return _read_lines(folder / f"{source}.txt"), _read_lines(folder / f"{target}.txt")


def _read_lines(path: Path) -> list[str]:
    try:
        with path.open(
            encoding="utf-8", newline="\n"
        ) as file:  # a carriage return within a sentence does not end it
            return file.read().split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise UserError(f"prepared data: {path} cannot be read: {error}") from None


def _allow_files(count: int) -> None:
    """Raise this process's limit of open files so that ``count`` more can be open, as far as it may.

    A memory map holds its file open: hundreds of bitexts pass the usual limit of 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count + 512:
        wanted = count + 512 if hard == resource.RLIM_INFINITY else min(hard, count + 512)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Model(Protocol):
    """A model on disk or in memory, which knows its recipe and the folder that holds it."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def home(self) -> Path: ...


def open_data(model: Model) -> PreparedData:
    """Open the prepared data of a model. Raises UserError if they were prepared again since its training."""
    return PreparedData.of(model.recipe, model.home)

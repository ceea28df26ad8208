"""Read the text on which a model is evaluated: the run's held-out text, or the user's own test set.

The user's set is a folder (Moses files, FLORES, NTREX-128, OPUS-100, IWSLT), a table (TSV), the common part
of the names of aligned files (``mytest`` for ``mytest.de`` and ``mytest.en``), or a file for each language.
Its lines are scored as they are: nothing is cleaned or left out, not even an empty line.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lsmoe_ds.config.data import Corpus
from lsmoe_ds.data.formats import find_parts
from lsmoe_ds.data.lines import without_packing
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import CODE, find_code, normalize_code
from lsmoe_ds.notices import listed, notice

SPLITS = ("test", "dev")

FORMS = (
    "give a folder, a TSV file, the common part of file names (mytest for mytest.de and mytest.en), or --test"
    " CODE=FILE for each language"
)
OWN = "--test FILES scores text of your own"
Pairs = tuple[list[str], list[str]]


@dataclass(frozen=True)
class Texts:
    """Sources and references by direction.

    ``split`` is the set's name in scores; the ``skipped`` directions have no sentence in it.
    """

    split: str
    by_direction: dict[Direction, Pairs]
    skipped: tuple[Direction, ...]

    @property
    def sentences(self) -> int:
        return sum(len(source) for source, _ in self.by_direction.values())

    def first(self, limit: int | None) -> Texts:
        """Keep the first ``limit`` sentences of each direction."""
        return replace(
            self,
            by_direction={
                d: (source[:limit], target[:limit]) for d, (source, target) in self.by_direction.items()
            },
        )


def read_held_out(data: PreparedData, split: str, directions: Sequence[Direction]) -> Texts:
    """Read the ``test`` or ``dev`` text of prepared data. Raises UserError if no direction has any."""
    check_split(split)
    texts = {direction: data.text(direction, split) for direction in directions}
    if all(direction.alone for direction in texts):
        other = next(each for each in SPLITS if each != split)
        return _skip_empty(split, texts, f"{split} set", f"; `--split {other}` scores the {other} set")
    return _skip_empty(split, texts, f"{split} sentences", f"; {OWN}")


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"'{split}' is no held-out text: choose {' or '.join(SPLITS)}")


def read_own(paths: Sequence[str], split: str, directions: Sequence[Direction]) -> Texts:
    """Read the user's own test set; if it has several splits, as FLORES does, the ``test`` or ``dev`` one.

    The set's name ends with a checksum of its text in these directions, to distinguish sets of the same name.
    Raises UserError if this is not a test set, for files of unequal length, and if the set has no text in any
    of the directions.
    """
    check_split(split)
    bitexts = list(dict.fromkeys(direction.bitext for direction in directions))
    if len(paths) == 1 and not _names_language(paths[0]):
        name, parts = _find(Path(paths[0]), split, bitexts)
    else:
        name, parts = _name_files(paths, bitexts)
        if split != SPLITS[0]:
            raise _one_set(" ".join(paths))
    digest, pairs = hashlib.sha256(), {}
    for bitext in sorted(parts):
        found = [pair for part in parts[bitext] for pair in part.pairs()]
        pairs[bitext] = [side for side, _ in found], [side for _, side in found]
        digest.update(repr((bitext, found)).encode("utf-8", "surrogatepass"))
    texts: dict[Direction, Pairs] = {}
    for direction in directions:
        first, second = pairs.get(direction.bitext, ([], []))
        texts[direction] = (
            (first, second)
            if direction.bitext == f"{direction.source}-{direction.target}"
            else (second, first)
        )
    split = f"{re.sub('[^A-Za-z0-9_-]+', '-', name)[:40].strip('-') or 'own'}-{digest.hexdigest()[:8]}"
    return _skip_empty(split, texts, f"text in {name}")


def _skip_empty(split: str, texts: dict[Direction, Pairs], what: str, instead: str = "") -> Texts:
    skipped = tuple(direction for direction, (source, _) in texts.items() if not source)
    if len(skipped) == len(texts):
        raise UserError(f"there is nothing to score: {say_skipped(skipped, what)}{instead}")
    return Texts(
        split, {direction: text for direction, text in texts.items() if direction not in skipped}, skipped
    )


def say_skipped(skipped: Sequence[Direction], what: str) -> str:
    """Return one line that names the directions without text."""
    return f"{listed(each.label for each in skipped)} {'has' if len(skipped) == 1 else 'have'} no {what}"


def tell_skipped(texts: Texts) -> None:
    """Name on standard error the directions that are not scored."""
    if texts.skipped:
        what = f"{texts.split} sentences" if texts.split in SPLITS else f"text in {texts.split}"
        print(f"lsmoe: skipped: {say_skipped(texts.skipped, what)}", file=sys.stderr, flush=True)


def _one_set(given: str) -> UserError:
    return UserError(f"--test {given} is one set of text, not dev and test: leave --split out")


def _names_language(text: str) -> bool:
    """Tell whether a text is CODE=FILE."""
    code, equals, _ = text.partition("=")
    return bool(equals) and not Path(text).exists() and re.fullmatch(r"[A-Za-z0-9@_-]+", code) is not None


def _find(path: Path, split: str, bitexts: Iterable[str]) -> tuple[str, dict[str, list[TextPart]]]:
    """Find a folder, a table or aligned files of one stem; return the set's name and its parts by bitext."""
    layout = _layout(path)
    found = find_parts([Corpus(path=path, format=layout)], Path(), bitexts)
    # If no text is marked as dev or test, as in a table, all of it is the set.
    chosen = [part for part in found if part.split == split] or [
        part for part in found if part.split == "train"
    ]
    if chosen and split != SPLITS[0] and chosen[0].split != split:
        raise _one_set(str(path))
    parts: dict[str, list[TextPart]] = {}
    for part in chosen:
        parts.setdefault(part.bitext, []).append(part)
        if layout == "moses" and len(parts[part.bitext]) > 1:
            first, second = (path / each.files[0].name.split(".")[0] for each in parts[part.bitext][:2])
            raise UserError(f"--test {path} holds more than one set, such as {first} and {second}: name one")
    if named := [part.files[0].name for part in chosen if part.files[0].name.startswith("train")]:
        notice(f"--test {path}: {named[0]} is scored as a test set, and is named like training text")
    if found and not parts:
        raise UserError(f"--test {path} has no {split} text: choose the other --split")
    return re.sub(r"\.tsv(\.gz|\.zst)?$", "", path.resolve().name), parts


def _layout(path: Path) -> Literal["opus100", "flores", "ntrex", "iwslt", "moses", "tsv"]:
    if path.is_file():
        if re.search(r"\.tsv(\.gz|\.zst)?$", path.name):
            return "tsv"
        raise UserError(f"--test {path} is one file: {FORMS}")
    if not path.is_dir():
        if not path.parent.is_dir() or not any(path.parent.glob(f"{path.name}.*")):
            raise UserError(
                f"--test {path}: there is no such folder and there are no files {path}.CODE: {FORMS}"
            )
        return "moses"
    if (path / "dev").is_dir() or (path / "devtest").is_dir():
        return "flores"
    if (path / "NTREX-128").is_dir() or any(path.glob("*-src.*.txt")):
        return "ntrex"
    if (path / "supervised").is_dir() or (path / "zero-shot").is_dir():
        return "opus100"
    return "iwslt" if any(path.rglob("IWSLT*.xml")) else "moses"


def _name_files(paths: Sequence[str], bitexts: Iterable[str]) -> tuple[str, dict[str, list[TextPart]]]:
    """Read ``CODE=FILE`` or ``NAME.CODE`` for each language; return the name and the parts by bitext."""
    files: dict[str, Path] = {}
    for text in paths:
        if _names_language(text):
            code, _, name = text.partition("=")
            path = Path(name)
        else:
            path = Path(text)
            code = re.sub(r"\.txt$", "", without_packing(path).name).rpartition(".")[2]
        if not path.is_file():
            raise UserError(f"--test {text}: there is no file {path}")
        codes = {code for bitext in bitexts for code in bitext.split("-")}
        language = find_code(code, codes) or normalize_code(code)
        if not CODE.match(language):
            raise UserError(
                f"--test {text}: '{code}' is not a language code: write --test CODE=FILE, such as de={path}"
            )
        if language in files:
            raise UserError(f"--test names two files for {language}: {files[language]} and {path}")
        files[language] = path
    if len(files) == 1:
        raise UserError(f"--test {paths[0]} is the text of one language: {FORMS}")
    parts = {}
    for bitext in bitexts:
        chosen = [files.get(find_code(code, files) or code) for code in bitext.split("-")]
        if chosen[0] and chosen[1]:
            parts[bitext] = [TextPart(str(chosen[0]), bitext, "test", (chosen[0], chosen[1]), "lines")]
    return next(iter(files.values())).name.split(".")[0], parts

"""The tasks of a preparation: index a file, clean a shard of training text, and encode one.

A shard is a range of lines of one corpus, in one bitext. Each task names what its result depends on, so a
shard is processed again only if its own lines or the settings that it uses have changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lsmoe_ds.config.data import Cleaning
from lsmoe_ds.data.cleaning import PairFilter, clean_text, hash64, near_duplicate_form
from lsmoe_ds.data.fates import FATES, TRAIN, read_fates
from lsmoe_ds.data.held_out import HELD_OUT
from lsmoe_ds.data.keys import save_sorted
from lsmoe_ds.data.lines import Stretch, index_lines, packing, unequal
from lsmoe_ds.data.stages import Function, Record, Stale, Task
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.data.tokens import CHUNK, EncodedShard, load_vocabulary
from lsmoe_ds.data.workers import chunks

SHARD = 1 << 18  # lines
UNPACKED = "text"  # the decompressed copy of a file, in the folder of its index
Pair = tuple[str, str]


def key(text: str) -> int:
    """Return a 64-bit key that near-duplicates share."""
    return hash64(near_duplicate_form(text))


# --- a file


def index_task(path: Path) -> Task:
    """Return the task that finds where the shards of a file begin. Raises UserError if there is no file."""
    try:
        stat = path.stat()
        packed = packing(path) is not None
    except OSError:
        list(index_lines(path, SHARD))  # raises a UserError that explains it
        raise
    depends = {
        "path": str(path.absolute()),
        "bytes": stat.st_size,
        "changed": stat.st_mtime_ns,
        "lines": SHARD,
    }
    return Task("index", depends, {"path": str(path.absolute()), "packed": packed})


def index(folder: Path, work: Path, path: str, packed: bool) -> Record:
    """Count the lines of a file and find its shards; decompress it if ``packed``."""
    lines, starts, sums = index_lines(Path(path), SHARD, folder / UNPACKED if packed else None)
    return {"lines": lines, "starts": starts, "sha256": sums}


@dataclass(frozen=True)
class Indexed:
    """A file with its index; ``path`` is the file ``name`` or its decompressed copy."""

    path: Path
    name: Path
    lines: int
    starts: Sequence[int]
    sha256: Sequence[str]

    @classmethod
    def of(cls, name: Path, record: Mapping[str, Any], folder: Path) -> Indexed:
        """Read the record of a file's index, which is in ``folder``."""
        unpacked = folder / UNPACKED
        path = unpacked if unpacked.exists() else name
        return cls(path, name, record["lines"], record["starts"], record["sha256"])

    def stretch(self, number: int) -> Stretch:
        """Return the lines of shard ``number`` (from 0)."""
        first = number * SHARD
        count = min(SHARD, self.lines - first)
        return Stretch(
            self.path.absolute(), self.name, first + 1, count, self.starts[number], self.sha256[number]
        )


def as_table(part: TextPart, path: Path, tell: Callable[[str], None]) -> TextPart:
    """Write the pairs of a part to a table, and return the part as that table.

    ``tell`` is called with sentences about faults of its files.
    """
    blanks = str.maketrans("\t\n", "  ")  # as cleaning does
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for first, second in part.pairs(tell):
            file.write(f"{first.translate(blanks)}\t{second.translate(blanks)}\n")
    return TextPart(part.corpus, part.bitext, part.split, (path,), "table", way=part.way)


# --- a shard


@dataclass(frozen=True)
class Shard:
    """A part of the training text of a bitext: lines of a table, or of two aligned files."""

    part: TextPart
    stretches: tuple[Stretch, ...]

    def pairs(self, seen: Counter[str]) -> Iterator[Pair]:
        """Yield the pairs, unchanged. ``seen`` counts as :meth:`TextPart.split_table` does."""
        if self.part.reader == "table":
            (stretch,) = self.stretches
            return self.part.split_table(stretch.lines(), stretch.first, seen)
        first, second = self.stretches
        return zip(first.lines(), second.lines(), strict=True)

    def task(self, settings: Cleaning, pivot: int) -> Task:
        """Return the task that cleans the shard."""
        part, (first, *_) = self.part, self.stretches
        how = {
            "bitext": part.bitext,
            "reader": part.reader,
            "columns": list(part.columns),
            "header": part.header,
            "width": part.width,
            "way": part.way,
        }
        rules = {"settings": settings.model_dump(mode="json"), "pivot": pivot}
        text = [each.sha256 for each in self.stretches]
        depends = {**how, **rules, "text": text, "begins": first.first == 1}
        stretches = [vars(each) | {"path": str(each.path), "name": str(each.name)} for each in self.stretches]
        return Task("clean", depends, {**how, **rules, "stretches": stretches})

    @classmethod
    def read(cls, bitext: str, stretches: Sequence[Mapping[str, Any]], **how: Any) -> Shard:
        """Make the shard from the arguments of a task."""
        read = [
            Stretch(**{**each, "path": Path(each["path"]), "name": Path(each["name"])}) for each in stretches
        ]
        how["columns"] = tuple(how["columns"])
        files = tuple(each.name for each in read)
        return cls(TextPart("", bitext, "train", files, **how), tuple(read))


def shards_of(part: TextPart, files: Sequence[Indexed]) -> list[Shard]:
    """Cut a part into shards. Raises UserError if its files have different numbers of lines."""
    shortest, longest = (order(files, key=lambda each: each.lines) for order in (min, max))
    if shortest.lines != longest.lines:
        raise unequal(shortest.name, shortest.lines, longest.name, longest.lines)
    return [
        Shard(part, tuple(each.stretch(number) for each in files)) for number in range(len(files[0].starts))
    ]


def clean(folder: Path, work: Path, pivot: int, settings: Mapping[str, Any], **shard: Any) -> Record:
    """Clean a shard: write its pairs, the hashes of the pairs, and the keys of both sides.

    Records the number of ``pairs`` kept, and in ``counts`` how many were read and how many each rule dropped.
    """
    own, limits = Shard.read(**shard), Cleaning.model_validate(settings)
    codes, way = own.part.bitext.split("-"), [own.part.way] if own.part.way else []
    rules = PairFilter(limits, codes[pivot], codes[1 - pivot])
    counts, seen = Counter[str](read=0), Counter[str]()
    hashes = {name: list[np.ndarray[Any, np.dtype[np.uint64]]]() for name in ("pair", "key0", "key1")}
    with (folder / "pairs.tsv").open("w", encoding="utf-8", newline="\n") as file:
        for chunk in chunks(own.pairs(seen), CHUNK):
            kept: list[Pair] = []
            for raw in chunk:
                pair = (clean_text(raw[0]), clean_text(raw[1]))
                if rule := rules.rule_against(pair[pivot], pair[1 - pivot]):
                    counts[rule] += 1
                else:
                    kept.append(pair)
            counts["read"] += len(chunk)
            file.writelines(f"{first}\t{second}\n" for first, second in kept)
            for name, values in (
                # With `way` in the hash, a pair is no copy of one that trains other directions.
                ("pair", (hash64(*pair, *way) for pair in kept)),
                ("key0", (key(pair[0]) for pair in kept)),
                ("key1", (key(pair[1]) for pair in kept)),
            ):
                hashes[name].append(np.fromiter(values, dtype=np.uint64, count=len(kept)))
    for name, arrays in hashes.items():
        joined = np.concatenate([np.empty(0, dtype=np.uint64), *arrays])
        save_sorted(folder / name, joined)
    return {"pairs": len(joined), "counts": dict(counts), "seen": dict(seen)}


# --- tokens


def encode_task(cleaned: str, fates: Path, start: int, count: int, model: Path, sum_of_model: str) -> Task:
    """Return the task that encodes the training pairs of a cleaned shard with a vocabulary.

    The shard has pairs ``start`` to ``start + count`` of its bitext, whose fates are in the file ``fates``.
    """
    given = sha256(read_fates(fates, start, count).tobytes()).hexdigest()
    depends = {"shard": cleaned, "given": given, "model": sum_of_model}
    return Task(
        "encode",
        depends,
        {
            "shard": cleaned,
            "fates": str(fates.absolute()),
            "start": start,
            "count": count,
            "given": given,
            "model": str(model.absolute()),
        },
    )


def encode(
    folder: Path, work: Path, shard: str, fates: str, start: int, count: int, given: str, model: str
) -> Record:
    """Encode the training pairs of a cleaned shard, and write its held-out pairs as text.

    Raises Stale if the fates are not those that the task was made for.
    """
    fate = read_fates(Path(fates), start, count)
    if sha256(fate.tobytes()).hexdigest() != given:
        raise Stale
    vocabulary = load_vocabulary(Path(model), Path(model).stat().st_mtime_ns)
    tokens = EncodedShard(folder, vocabulary)
    held_out = {split: (folder / f"{split}.tsv").open("wb") for split in HELD_OUT}
    with (work / shard / "pairs.tsv").open("rb") as file:
        for first in range(0, count, CHUNK):
            lines, now = list(islice(file, CHUNK)), fate[first : first + CHUNK]
            tokens.append([read_pair(lines[place]) for place in np.flatnonzero(now == TRAIN).tolist()])
            for split, out in held_out.items():
                out.writelines(lines[place] for place in np.flatnonzero(now == FATES[split]).tolist())
    for out in held_out.values():
        out.close()
    return {"pairs": count, "sides": tokens.close()}


def read_pair(line: bytes) -> Pair:
    """Return the two texts of a line of ``pairs.tsv``."""
    first, _, second = line.decode("utf-8").rstrip("\n").partition("\t")
    return first, second


def read_held_out(shards: Sequence[Path], split: str) -> list[Pair]:
    """Return the held-out pairs of encoded shards."""
    found: list[Pair] = []
    for shard in shards:
        with (shard / f"{split}.tsv").open("rb") as file:
            found += map(read_pair, file)
    return found


FUNCTIONS: dict[str, Function] = {"index": index, "clean": clean, "encode": encode}

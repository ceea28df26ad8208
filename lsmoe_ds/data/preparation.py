"""Lead the preparation of parallel text, from corpora to tokens (see :mod:`lsmoe_ds.data.stages`).

Any number of processes clean and encode shards; the leader does the steps between. Memory does not grow with
the corpora. It holds a chunk of text and the keys of one shard for each worker, 2 million keys while pairs
are compared, the dev and test sets, and sentencepiece's copy of ``vocabulary.sentences`` sentences. Only
joining through ``data.pivot`` needs more: 24 bytes for each translation of a leg.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.bitext import Bitext
from lsmoe_ds.data.cleaning import check_cleaning
from lsmoe_ds.data.comparison import VOCABULARY, settings_of
from lsmoe_ds.data.fingerprints import corpora_fingerprint
from lsmoe_ds.data.formats import name_of
from lsmoe_ds.data.held_out import HELD_OUT
from lsmoe_ds.data.notices import Notices, why_no_text
from lsmoe_ds.data.pivot import JoinedPart, search_and_join
from lsmoe_ds.data.prepared import FORMAT, ONE_WAY
from lsmoe_ds.data.shards import Indexed, Shard, as_table, encode_task, index_task, read_held_out, shards_of
from lsmoe_ds.data.spelling import say_spellings
from lsmoe_ds.data.splitting import hold_out
from lsmoe_ds.data.stages import Record, Task, Work
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.data.tokens import Joining, add_counts, token_type, write_tokens
from lsmoe_ds.data.vocabulary import Vocabulary, read_vocabulary, train_vocabulary
from lsmoe_ds.data.workers import Workers, cores
from lsmoe_ds.directions import Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files, sha256
from lsmoe_ds.notices import listed

# Below this many bytes of corpora, starting processes takes longer than they save.
SMALL = 4 << 20


class Preparation:
    """Prepare the data of a recipe whose task is translation; the leader runs it."""

    def __init__(
        self, recipe: Recipe, folder: Path, work: Work, console: Console, processes: int | None
    ) -> None:
        self.recipe, self.data, self.folder, self.work = recipe, recipe.data, folder, work
        self.languages: Languages = recipe.languages
        self.names = sorted({direction.bitext for direction in self.languages.directions})
        # Files that each leader writes anew: fates of pairs, and text that is joined or extracted from tags.
        self.scratch = work.folder / "scratch"
        self.found, self.joins = search_and_join(self.data, self.names, self.scratch / "pivot")
        self.parts = [part for found in self.found for part in found.parts]
        say_spellings(found.wanted for found in self.found)
        self.bitexts = [Bitext(name, self.scratch / name) for name in self.names]
        self.notices = Notices(self.data)
        size = sum(file.stat().st_size for part in self.parts for file in part.files if file.exists())
        self.workers = Workers((0 if size < SMALL else cores()) if processes is None else processes)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(show_speed=True),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def run(self) -> dict[str, Any]:
        check_cleaning(self.data.cleaning)
        if self.data.vocabulary.file is not None:
            read_vocabulary(self.data.vocabulary, self.languages.codes)  # fails before hours of cleaning
        fingerprint = corpora_fingerprint(self.parts)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        with self.workers, self.progress:
            self._clean()
            self._hold_out()
            vocabulary = self._make_vocabulary()
            bitexts = self._write_tokens(vocabulary)
        files = [
            str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*")) if path.is_file()
        ]
        return {
            "format": FORMAT,
            "settings": settings_of(self.recipe),
            "corpora": fingerprint,
            "bitexts": bitexts,
            "notices": self.notices.texts,
            "cleaning": {bitext.name: dict(sorted(bitext.counts.items())) for bitext in self.bitexts},
            "files": describe_files(self.folder, files),
        }

    def _of(self, bitext: str, split: str) -> list[TextPart]:
        return [part for part in self.parts if (part.bitext, part.split) == (bitext, split)]

    def _do(
        self, what: str, tasks: Sequence[Task], total: int, size: Callable[[Record], int]
    ) -> dict[str, Record]:
        """Do the tasks of a stage, under a progress bar; return their records by their names."""
        bar, records = self.progress.add_task(what, total=total), {}
        for task, record in self.work.do(tasks, self.workers):
            records[task.name] = record
            self.progress.advance(bar, size(record))
        self.progress.remove_task(bar)
        return records

    def _clean(self) -> None:
        for bitext in self.bitexts:
            if not any(part.bitext == bitext.name for part in self.parts):
                hint = why_no_text(self.found, bitext.name)
                raise UserError(
                    f"there is no text for {bitext.name} in the corpora of the recipe "
                    f"({self._corpora()}){hint}"
                )
        shards = self._shards()
        tasks = {
            bitext.name: [
                (part, [each.task(self.data.cleaning, bitext.pivot) for each in own])
                for part, own in shards[bitext.name]
            ]
            for bitext in self.bitexts
        }
        every = [task for parts in tasks.values() for _, own in parts for task in own]
        lines = sum(
            shard.stretches[0].count for parts in shards.values() for _, own in parts for shard in own
        )
        records = self._do("cleaning pairs", every, lines, lambda record: int(record["counts"]["read"]))
        for bitext in self.bitexts:
            for part, own in tasks[bitext.name]:
                bitext.add(part, [(self.work.folder / task.name, records[task.name]) for task in own])
            bitext.drop_copies()
            for part in bitext.empty:
                self.notices.empty(part)
            for remark in bitext.remarks:
                self.notices.of_file(remark)
            for split in HELD_OUT:
                self._read_published(bitext, split)

    def _shards(self) -> dict[str, list[tuple[TextPart, list[Shard]]]]:
        """Cut the training text of each bitext into shards, by its parts.

        Text that is joined or not in lines is first written as a table; compressed files are decompressed.
        """
        parts = [part for bitext in self.bitexts for part in self._training_text(bitext)]
        remarks: dict[str, list[str]] = {bitext.name: bitext.remarks for bitext in self.bitexts}
        plain = {
            number: part
            if part.reader in ("lines", "table")
            else as_table(part, self.scratch / f"{number}.tsv", remarks[part.bitext].append)
            for number, part in enumerate(parts)
        }
        tasks = {
            path: index_task(path) for path in dict.fromkeys(p for part in plain.values() for p in part.files)
        }
        records = self._do("reading files", list(tasks.values()), len(tasks), lambda _: 1)
        files = {
            path: Indexed.of(path, records[task.name], self.work.folder / task.name)
            for path, task in tasks.items()
        }
        found: dict[str, list[tuple[TextPart, list[Shard]]]] = {bitext.name: [] for bitext in self.bitexts}
        for number, part in enumerate(parts):
            own = plain[number]
            found[part.bitext].append((part, shards_of(own, [files[path] for path in own.files])))
        return found

    def _training_text(self, bitext: Bitext) -> list[TextPart]:
        """Return the parts that train only the first direction, then those for both, then those for the
        other.

        In this order the training text of each direction is one range of pairs.
        """
        places = {bitext.ways[0]: 0, None: 1, bitext.ways[1]: 2}
        return sorted(self._of(bitext.name, "train"), key=lambda part: places[part.way])

    def _corpora(self) -> str:
        return ", ".join(map(name_of, self.data.corpora))

    def _read_published(self, bitext: Bitext, split: str) -> None:
        """Read the sets that corpora provide.

        The set of the first corpus is used unchanged; sets of others are only kept out of training text.
        """
        found: dict[str, list[tuple[str, str]]] = {}
        for part in self._of(bitext.name, split):
            pairs = list(part.pairs(self.notices.of_file))
            if not any(first.strip() and second.strip() for first, second in pairs):
                self.notices.empty(part)
                continue
            found.setdefault(part.corpus, []).extend(pairs)
        for number, pairs in enumerate(found.values()):
            if number:
                bitext.also_out.setdefault(split, []).extend(pairs)
            else:
                bitext.own[split] = pairs
        self.notices.published(bitext, split, list(found))

    def _hold_out(self) -> None:
        task = self.progress.add_task("holding out", total=None)
        claims = hold_out(self.bitexts, self.data.held_out)
        for bitext in self.bitexts:
            if self.data.train_on is not None:
                bitext.train_on_translated()
            if (most := self.data.most_pairs(bitext.codes)) is not None:
                bitext.cap(most, self.data.held_out.seed)
        self.progress.remove_task(task)
        for bitext in self.bitexts:
            if not bitext.own and not any(bitext.size(split) for split in ("train", *HELD_OUT)):
                raise UserError(_nothing_left([bitext]))
        if self.data.vocabulary.file is None and not any(bitext.size("train") for bitext in self.bitexts):
            if any(part.split == "train" for part in self.parts):
                raise UserError(
                    _nothing_left([bitext for bitext in self.bitexts if self._of(bitext.name, "train")])
                )
            raise UserError(
                f"no training pair is left: of the corpora of the recipe ({self._corpora()}) only dev and "
                "test sets remain, on which no vocabulary is trained: add a corpus with training text, or "
                "set 'data.vocabulary.file'"
            )
        self.notices.of_corpora(self.found, self.bitexts)
        self.notices.of_sets(self.bitexts, claims, [str(each) for each in self.languages.directions])
        self.notices.of_training_text(self.bitexts, self.joins)
        self.notices.of_start(self.recipe, self.bitexts)

    def _make_vocabulary(self) -> Vocabulary:
        settings, codes = self.data.vocabulary, self.languages.codes
        task = self.progress.add_task("training the vocabulary", total=None)
        vocabulary = self._trained(codes) if settings.file is None else read_vocabulary(settings, codes)
        vocabulary.save(self.folder / VOCABULARY)
        self.progress.remove_task(task)
        return vocabulary

    def _trained(self, codes: Sequence[str]) -> Vocabulary:
        """Train the vocabulary, unless an interrupted preparation has trained the same."""
        text = [
            (bitext.name, [piece.folder.name for piece in bitext.pieces], sha256(bitext.fates))
            for bitext in self.bitexts
        ]
        depends = {
            "settings": self.data.vocabulary.model_dump(mode="json"),
            "temperature": self.data.temperature,
            "seed": self.data.held_out.seed,
            "codes": codes,
            "text": text,
        }
        kept = self.work.folder / Task("vocabulary", depends, {}).name
        if kept.is_file():
            return Vocabulary.load(kept)
        vocabulary = train_vocabulary(self._sample(), self.data.vocabulary, codes)
        kept.parent.mkdir(exist_ok=True)
        vocabulary.save(new := kept.with_name("new"))
        new.rename(kept)
        return vocabulary

    def _sample(self) -> Iterator[str]:
        """Yield training sentences; a language's share is proportional to (its sentences)^(1/temperature).

        If a language has fewer sentences than its share, some are repeated.
        """
        sizes = {bitext.name: bitext.size("train") for bitext in self.bitexts}
        total = {
            code: sum(sizes[b.name] for b in self.bitexts if code in b.codes) for code in self.languages.codes
        }
        weight = {
            code: count ** (1 / self.data.temperature) if count else 0.0 for code, count in total.items()
        }
        sentences = min(self.data.vocabulary.sentences, sum(total.values()))
        generator = np.random.default_rng(self.data.held_out.seed)
        for bitext in self.bitexts:
            if count := sizes[bitext.name]:
                first, second = (
                    round(sentences * weight[code] / sum(weight.values()) * count / total[code])
                    for code in bitext.codes
                )
                yield from bitext.sample((first, second), generator)

    def _write_tokens(self, vocabulary: Vocabulary) -> dict[str, Any]:
        model = self.folder / VOCABULARY
        content = sha256(model)
        tasks = {
            bitext.name: [
                encode_task(
                    str(piece.folder.relative_to(self.work.folder)),
                    bitext.fates,
                    piece.start,
                    piece.count,
                    model,
                    content,
                )
                for piece in bitext.pieces
            ]
            for bitext in self.bitexts
        }
        every = [task for own in tasks.values() for task in own]
        records = self._do(
            "tokenizing",
            every,
            sum(bitext.end for bitext in self.bitexts),
            lambda record: int(record["pairs"]),
        )
        written: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        joins = []
        for bitext in self.bitexts:
            folders = [self.work.folder / task.name for task in tasks[bitext.name]]
            folder = self.folder / "train" / bitext.name
            folder.mkdir(parents=True)
            sides = {}
            for side, code in enumerate(bitext.codes):
                joins.append(Joining(folder, side, code, folders, token_type(vocabulary)))
                counts = (records[task.name]["sides"][side] for task in tasks[bitext.name])
                sides[code] = add_counts(counts)
            written[bitext.name]["train"] = {"pairs": bitext.size("train"), "sides": sides}
            if any(one_way := [bitext.trained(way) for way in bitext.ways]):
                written[bitext.name]["train"][ONE_WAY] = one_way
            for split in HELD_OUT:
                pairs = bitext.own[split] if split in bitext.own else read_held_out(folders, split)
                sides = write_tokens(self.folder / split / bitext.name, bitext.codes, pairs, vocabulary)
                written[bitext.name][split] = {"pairs": len(pairs), "sides": sides}
        bar = self.progress.add_task("joining the shards", total=len(joins))
        for _ in self.workers.map(Joining.run, joins):
            self.progress.advance(bar)
        self.progress.remove_task(bar)
        return written


def _nothing_left(bitexts: Sequence[Bitext]) -> str:
    """Return the error for bitexts without training text, or of which cleaning drops every pair."""
    names = listed(bitext.name for bitext in bitexts)
    counts = sum((bitext.counts for bitext in bitexts), Counter[str]())
    if not counts["read"]:
        files = listed(file.name for bitext in bitexts for part in bitext.empty for file in part.files)
        if any(isinstance(part, JoinedPart) for bitext in bitexts for part in bitext.empty):
            return (
                f"there is no text for {names}: 'data.pivot' joins pairs with the same sentence in the pivot "
                f"language, and no such sentence is left after cleaning in {files}"
            )
        return f"there is no text for {names}: the files of the corpora are empty ({files})"
    rules = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    return (
        f"no training pair of {names} is left after cleaning ({rules}): give more text or change "
        "'data.cleaning' or 'data.held_out'"
    )

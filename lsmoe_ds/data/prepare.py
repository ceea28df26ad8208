"""Turn corpora into tokens: clean, hold out, train the vocabulary and write PreparedData's folder.

Memory holds a few chunks of text for each core, 40 bytes for each pair of the largest bitext, 16 million keys
while the held-out sentences are chosen, and sentencepiece's own copy of ``vocabulary.sentences`` sentences.
The corpus itself is streamed.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.bitext import LATER, Bitext
from lsmoe_ds.data.comparison import MANIFEST, settings_of
from lsmoe_ds.data.fingerprints import State, corpora_fingerprint, state_of
from lsmoe_ds.data.formats import SPLITS, name_of
from lsmoe_ds.data.held_out import HELD_OUT
from lsmoe_ds.data.notices import Notices, why_no_text
from lsmoe_ds.data.pivot import JoinedPart, search_and_join
from lsmoe_ds.data.prepare_labelled import LabelledPreparation
from lsmoe_ds.data.prepared import FORMAT, PreparedData
from lsmoe_ds.data.spelling import say_spellings
from lsmoe_ds.data.splitting import hold_out
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.data.tokens import write_tokens
from lsmoe_ds.data.vocabulary import Vocabulary, read_vocabulary, train_vocabulary
from lsmoe_ds.data.workers import Workers, cores
from lsmoe_ds.directions import Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files, locked, replaced, write_json
from lsmoe_ds.notices import counted, listed

# Below this many bytes of corpora, starting processes takes longer than they save.
SMALL = 4 << 20


def prepare(recipe: Recipe, force: bool = False) -> PreparedData:
    """Prepare the data of a recipe, unless they are up to date.

    Prints why data are prepared again, and the notices on them. If it is stopped at any moment, the earlier
    data stay. Raises UserError for corpora that are missing, damaged, badly encoded or too small.
    """
    console, folder = (
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False),
        recipe.prepared,
    )
    if not force and (state := state_of(recipe)).reason is None:
        return _up_to_date(recipe, state, console)
    with locked(folder):
        state = State("it was asked for") if force else state_of(recipe)
        if state.reason is None:
            return _up_to_date(recipe, state, console)
        console.print(f"preparing {folder}{' again' if folder.exists() else ''}: {state.reason}")
        with replaced(folder) as new:
            kind = _Preparation if recipe.data.task == "translate" else LabelledPreparation
            manifest = kind(recipe, new, console).run()
            write_json(new / MANIFEST, manifest)
    for notice in manifest["notices"]:
        console.print(notice)
    pairs = sum(splits["train"]["pairs"] for splits in manifest["bitexts"].values())
    if recipe.data.task != "translate":
        examples = sum(splits["train"]["examples"] for splits in manifest["bitexts"].values())
        console.print(
            f"prepared {folder}: {counted(examples, 'training example')} in "
            f"{counted(len(manifest['bitexts']), 'language')}, {counted(pairs, 'sequence')}"
        )
        return PreparedData.of(recipe)
    console.print(
        f"prepared {folder}: {counted(pairs, 'training pair')} in "
        f"{counted(len(manifest['bitexts']), 'bitext')}"
    )
    console.print(_cleaned(manifest["cleaning"].values()))
    if left_out := sum(counts.get("held out", 0) for counts in manifest["cleaning"].values()):
        are, its = ("is", "it") if left_out == 1 else ("are", "them")
        console.print(
            f"{counted(left_out, 'more pair')} {are} not trained on, because a side of {its} is a dev or test"
            " sentence, or nearly"
        )
    return PreparedData.of(recipe)


def _cleaned(counts: Iterable[Mapping[str, int]]) -> str:
    """Describe how many pairs were read and how many each rule has dropped, in decreasing order."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    read = total.pop("read", 0)
    rules = [f"{name} {count:,}" for name, count in total.most_common() if count and name not in LATER]
    return (
        f"of {counted(read, 'pair')} that {'was' if read == 1 else 'were'} read, cleaning has dropped: "
        f"{', '.join(rules) or 'none'}"
    )


def _up_to_date(recipe: Recipe, state: State, console: Console) -> PreparedData:
    console.print(f"prepared data is up to date ({recipe.prepared})")
    for remark in state.remarks:
        console.print(remark)
    return PreparedData.of(recipe)


class _Preparation:
    def __init__(self, recipe: Recipe, folder: Path, console: Console) -> None:
        self.recipe, self.data, self.folder, self.work = recipe, recipe.data, folder, folder / ".work"
        self.languages: Languages = recipe.languages
        self.names = sorted({direction.bitext for direction in self.languages.directions})
        self.found, self.joins = search_and_join(self.data, self.names, self.work / "pivot")
        self.parts = [part for found in self.found for part in found.parts]
        say_spellings(found.wanted for found in self.found)
        self.bitexts = [Bitext(name, self.work / name) for name in self.names]
        self.notices = Notices(self.data)
        size = sum(file.stat().st_size for part in self.parts for file in part.files if file.exists())
        self.workers = Workers(0 if size < SMALL else cores())
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def run(self) -> dict[str, Any]:
        if self.data.vocabulary.file is not None:
            read_vocabulary(self.data.vocabulary, self.languages.codes)  # fails before hours of cleaning
        fingerprint = corpora_fingerprint(self.parts)
        self.work.mkdir()
        with self.workers, self.progress:
            self._clean()
            self._hold_out()
            vocabulary = self._make_vocabulary()
            bitexts = self._write_tokens(vocabulary)
        shutil.rmtree(self.work)
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

    def _clean(self) -> None:
        task = self.progress.add_task("cleaning pairs", total=None)
        for bitext in self.bitexts:
            if not any(part.bitext == bitext.name for part in self.parts):
                hint = why_no_text(self.found, bitext.name)
                raise UserError(
                    f"there is no text for {bitext.name} in the corpora of the recipe "
                    f"({self._corpora()}){hint}"
                )
            self.progress.update(task, description=f"cleaning {bitext.name}")
            for count in bitext.clean(self._of(bitext.name, "train"), self.data.cleaning, self.workers):
                self.progress.advance(task, count)
            for part in bitext.empty:
                self.notices.empty(part)
            for remark in bitext.remarks:
                self.notices.of_file(remark)
            for split in HELD_OUT:
                self._read_published(bitext, split)
        self.progress.remove_task(task)

    def _corpora(self) -> str:
        return ", ".join(map(name_of, self.data.corpora))

    def _read_published(self, bitext: Bitext, split: str) -> None:
        """Read the sets that corpora provide.

        The first corpus' set is used unchanged; those of others are only kept out of training.
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
            if (most := self.data.most_pairs(bitext.codes)) is not None:
                bitext.cap(most, self.data.held_out.seed)
        self.progress.remove_task(task)
        for bitext in self.bitexts:
            if not bitext.size("train") and not bitext.own:
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
        self.notices.of_sets(self.bitexts, claims)
        self.notices.of_training_text(self.bitexts, self.joins)
        self.notices.of_start(self.recipe, self.bitexts)

    def _make_vocabulary(self) -> Vocabulary:
        settings, codes = self.data.vocabulary, self.languages.codes
        task = self.progress.add_task("training the vocabulary", total=None)
        vocabulary = (
            train_vocabulary(self._sample(), settings, codes)
            if settings.file is None
            else read_vocabulary(settings, codes)
        )
        vocabulary.save(self.folder / "vocabulary.model")
        self.progress.remove_task(task)
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
            count = sizes[bitext.name]
            if not count:
                continue
            times = []
            for code in bitext.codes:
                wanted = round(sentences * weight[code] / sum(weight.values()) * count / total[code])
                own = np.full(count, wanted // count, dtype=np.int64)
                own[generator.choice(count, wanted % count, replace=False)] += 1
                times.append(own)
            for pair, repeat in zip(bitext.pairs("train"), zip(*times, strict=True), strict=True):
                for text, number in zip(pair, repeat, strict=True):
                    for _ in range(number):
                        yield text

    def _write_tokens(self, vocabulary: Vocabulary) -> dict[str, Any]:
        sizes = {(bitext.name, split): bitext.size(split) for bitext in self.bitexts for split in SPLITS}
        task = self.progress.add_task("tokenizing", total=sum(sizes.values()))
        model = self.folder / "vocabulary.model"
        written: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for split in SPLITS:
            for bitext in self.bitexts:
                folder = self.folder / split / bitext.name
                sides = write_tokens(
                    folder,
                    bitext.codes,
                    bitext.pairs(split),
                    model,
                    vocabulary.size,
                    split != "train",
                    self.workers,
                )
                written[bitext.name][split] = {"pairs": sizes[bitext.name, split], "sides": sides}
                self.progress.advance(task, sizes[bitext.name, split])
        self.progress.remove_task(task)
        return written


def _nothing_left(bitexts: Sequence[Bitext]) -> str:
    """Return the error for bitexts whose training text is empty, or which cleaning drops as a whole."""
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

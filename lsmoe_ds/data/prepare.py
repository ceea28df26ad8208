"""From corpora to tokens: ``prepare`` cleans, holds out, trains the vocabulary and writes the folder that PreparedData opens.

Memory: a few chunks of text for each core; 40 bytes for each pair of the largest bitext; 16 million keys while the
held-out sentences are chosen; and sentencepiece's own copy of ``vocabulary.sentences`` sentences. The corpus itself is streamed.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lsmoe_ds.config import Recipe
from lsmoe_ds.data.bitext import Bitext
from lsmoe_ds.data.fingerprints import corpora_fingerprint, reason_to_prepare, settings_of
from lsmoe_ds.data.formats import SPLITS, Part, find_parts, other_varieties
from lsmoe_ds.data.held_out import HELD_OUT, Keys, choose, quota
from lsmoe_ds.data.prepared import FORMAT, MANIFEST, PreparedData
from lsmoe_ds.data.tokens import write_tokens
from lsmoe_ds.data.vocabulary import Vocabulary, read_vocabulary, train_vocabulary
from lsmoe_ds.data.workers import Workers, cores
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files, locked, replaced, write_json
from lsmoe_ds.languages import Languages

# Below this many bytes of corpora, starting processes takes longer than they save.
SMALL = 4 << 20


def prepare(recipe: Recipe, force: bool = False) -> PreparedData:
    """Prepares the data of a recipe, unless that is done already; says why when it does it again.

    Stopped at any moment it leaves what was there before. Raises UserError for corpora that are missing, damaged, badly encoded or
    too small.
    """
    console, folder = Console(stderr=True, soft_wrap=True, highlight=False), recipe.prepared
    if not force and (reason := reason_to_prepare(recipe)) is None:
        return _up_to_date(folder, console)
    with locked(folder):
        reason = "it was asked for" if force else reason_to_prepare(recipe)
        if reason is None:
            return _up_to_date(folder, console)
        console.print(f"preparing {folder}{' again' if folder.exists() else ''}: {reason}")
        with replaced(folder) as new:
            manifest = _Preparation(recipe, new, console).run()
            write_json(new / MANIFEST, manifest)
        pairs = sum(splits["train"]["pairs"] for splits in manifest["bitexts"].values())
        console.print(f"prepared {folder}: {pairs:,} training pairs in {len(manifest['bitexts'])} bitexts")
    return PreparedData.open(folder)


def _up_to_date(folder: Path, console: Console) -> PreparedData:
    console.print(f"prepared data is up to date ({folder})")
    return PreparedData.open(folder)


class _Preparation:
    def __init__(self, recipe: Recipe, folder: Path, console: Console) -> None:
        self.recipe, self.data, self.folder, self.work = recipe, recipe.data, folder, folder / ".work"
        self.languages: Languages = recipe.languages
        self.names = sorted({direction.bitext for direction in self.languages.directions})
        self.parts = find_parts(self.data.corpora, self.data.directory, self.names)
        self.bitexts = [Bitext(name, self.work / name) for name in self.names]
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
            read_vocabulary(self.data.vocabulary, self.languages.codes)  # what is wrong with it is said before hours of cleaning
        fingerprint = corpora_fingerprint(self.parts)
        self.work.mkdir()
        with self.workers, self.progress:
            self._clean()
            self._hold_out()
            vocabulary = self._make_vocabulary()
            bitexts = self._write_tokens(vocabulary)
        shutil.rmtree(self.work)
        files = [str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return {
            "format": FORMAT,
            "settings": settings_of(self.recipe),
            "corpora": fingerprint,
            "bitexts": bitexts,
            "cleaning": {bitext.name: dict(sorted(bitext.counts.items())) for bitext in self.bitexts},
            "files": describe_files(self.folder, files),
        }

    def _of(self, bitext: str, split: str) -> list[Part]:
        return [part for part in self.parts if (part.bitext, part.split) == (bitext, split)]

    def _clean(self) -> None:
        both = not all(bitext.english for bitext in self.bitexts)
        task = self.progress.add_task("cleaning pairs", total=None)
        for bitext in self.bitexts:
            if not any(part.bitext == bitext.name for part in self.parts):
                corpora = ", ".join(corpus if isinstance(corpus, str) else str(corpus.path) for corpus in self.data.corpora)
                hint = other_varieties(self.data.corpora, self.data.directory, bitext.name)
                raise UserError(f"there is no text for {bitext.name} in the corpora of the recipe ({corpora}){hint}")
            self.progress.update(task, description=f"cleaning {bitext.name}")
            for count in bitext.clean(self._of(bitext.name, "train"), self.data.cleaning, both, self.workers):
                self.progress.advance(task, count)
            for split in HELD_OUT:
                parts = self._of(bitext.name, split)
                # The first corpus that brings a set serves as it stands; those of others are kept out of training only.
                own = [pair for part in parts if part.corpus == parts[0].corpus for pair in part.pairs()]
                others = [pair for part in parts if part.corpus != parts[0].corpus for pair in part.pairs()]
                if own:
                    bitext.own[split] = own
                bitext.also_out += others
        self.progress.remove_task(task)

    def _hold_out(self) -> None:
        keys = {bitext.name: bitext.distinct() for bitext in self.bitexts}
        published: dict[str, list[Keys]] = defaultdict(list)
        for bitext in self.bitexts:
            for code, own in bitext.published_keys().items():
                published[code].append(own)
        held = {code: np.unique(np.concatenate(arrays)) for code, arrays in published.items()}
        # A published sentence must not become a dev sentence elsewhere: it is no candidate.
        for bitext in self.bitexts:
            if len(out := held.get(bitext.codes[bitext.pivot], ())):
                keys[bitext.name] = keys[bitext.name][~np.isin(keys[bitext.name], out)]
        quotas = {}
        for bitext in self.bitexts:
            quotas[bitext.name] = quota(self.data.held_out, bitext.size("train")) | dict.fromkeys(bitext.own, 0)
        chosen = choose(keys, quotas, self.data.held_out.seed)
        for bitext in self.bitexts:
            for code, own in bitext.decide(chosen[bitext.name]).items():
                held[code] = np.union1d(held[code], own) if code in held else own
        for bitext in self.bitexts:
            bitext.leave_out(held)
            if not bitext.size("train") and not bitext.own:
                counts = ", ".join(f"{name} {count}" for name, count in sorted(bitext.counts.items()) if count)
                raise UserError(
                    f"no training pair of {bitext.name} is left after cleaning ({counts}): give more text or change 'data.cleaning'"
                )

    def _make_vocabulary(self) -> Vocabulary:
        settings, codes = self.data.vocabulary, self.languages.codes
        task = self.progress.add_task("training the vocabulary", total=None)
        vocabulary = train_vocabulary(self._sample(), settings, codes) if settings.file is None else read_vocabulary(settings, codes)
        vocabulary.save(self.folder / "vocabulary.model")
        self.progress.remove_task(task)
        return vocabulary

    def _sample(self) -> Iterator[str]:
        """Training sentences, each language's share proportional to (its number of sentences)^(1/temperature).

        Of a language that is to give more than it has, sentences come more than once.
        """
        sizes = {bitext.name: bitext.size("train") for bitext in self.bitexts}
        total = {code: sum(sizes[b.name] for b in self.bitexts if code in b.codes) for code in self.languages.codes}
        weight = {code: count ** (1 / self.data.temperature) if count else 0.0 for code, count in total.items()}
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
                sides = write_tokens(folder, bitext.codes, bitext.pairs(split), model, vocabulary.size, split != "train", self.workers)
                written[bitext.name][split] = {"pairs": sizes[bitext.name, split], "sides": sides}
                self.progress.advance(task, sizes[bitext.name, split])
        self.progress.remove_task(task)
        return written

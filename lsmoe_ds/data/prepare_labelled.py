"""Turn labelled corpora into tokens and labels: check every label, cut long texts, write PreparedData's
folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.comparison import VOCABULARY, settings_of
from lsmoe_ds.data.fingerprints import corpora_fingerprint
from lsmoe_ds.data.formats import SPLITS, find_parts, name_of
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.data.labelled import LabelledPart
from lsmoe_ds.data.labels import Labels, content_of
from lsmoe_ds.data.prepared import FORMAT, LABELS
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.data.tokens import ArrayFile
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files
from lsmoe_ds.notices import counted, listed


class LabelledPreparation:
    """Prepare the data of a recipe whose task is to tag or to answer."""

    def __init__(self, recipe: Recipe, folder: Path, console: Console) -> None:
        self.recipe, self.folder = recipe, folder
        self.bitexts = sorted({direction.bitext for direction in recipe.languages.directions})
        self.parts = find_parts(recipe.data.corpora, recipe.data.directory, self.bitexts)
        self.notices: list[str] = []
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
        )

    def run(self) -> dict[str, Any]:
        """Write the folder, and return its manifest."""
        file = self.recipe.data.vocabulary.file
        assert file is not None, "a model of transformers has a tokenizer"
        tokenizer = HostTokenizer.load(file)
        form = Labels.of(self.recipe.data, self.recipe.languages, tokenizer)
        fingerprint = corpora_fingerprint(self.parts)
        tokenizer.save(self.folder / VOCABULARY)
        bitexts: dict[str, dict[str, Any]] = {}
        with self.progress:
            task = self.progress.add_task("reading", total=len(self.bitexts) * len(SPLITS))
            for direction in self.recipe.languages.directions:
                self.progress.update(task, description=f"reading {direction.source}")
                bitexts[direction.bitext] = self._write_language(direction, form)
                self.progress.advance(task, len(SPLITS))
        self._tell(bitexts)
        paths = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return {
            "format": FORMAT,
            "settings": settings_of(self.recipe),
            "corpora": fingerprint,
            "bitexts": bitexts,
            "notices": self.notices,
            "cleaning": {
                name: {"read": sum(splits[split]["examples"] for split in SPLITS)}
                for name, splits in bitexts.items()
            },
            "files": describe_files(self.folder, [str(path.relative_to(self.folder)) for path in paths]),
        }

    def _write_language(self, direction: Direction, form: Labels) -> dict[str, Any]:
        code, found, told = direction.source, {}, len(self.notices)
        trained: set[str] = set()
        for split in SPLITS:
            parts = [part for part in self.parts if (part.bitext, part.split) == (direction.bitext, split)]
            examples = [pair for part in parts for pair in self._checked(part)]
            if split == "train":
                trained = {content_of(source) for source, _ in examples}
            elif again := sum(content_of(source) in trained for source, _ in examples):
                of_all = counted(len(examples), f"{split} example")
                self.notices.append(f"{code}: the training text has {again} of {of_all}, too")
            found[split] = self._write(split, direction, examples, form)
        if not found["train"]["examples"] and not found["dev"]["examples"] and not found["test"]["examples"]:
            corpora = ", ".join(map(name_of, self.recipe.data.corpora))
            why = "".join(f"; {notice}" for notice in self.notices[told:])
            raise UserError(f"there is no text for {code} in the corpora of the recipe ({corpora}){why}")
        return found

    def _checked(self, part: TextPart) -> Iterator[tuple[str, str]]:
        """Yield the examples of a part. Raises UserError for a tag that is not among ``data.labels``."""
        labels = self.recipe.data.labels
        for source, target in part.pairs(self.notices.append):
            if labels is not None and (wrong := set(target.split(" ")) - set(labels)):
                assert isinstance(part, LabelledPart)
                file, line, tag = part.find_tag(wrong)
                raise UserError(
                    f"{file}, line {line}: the tag {tag} is none of 'data.labels': {', '.join(labels)}"
                )
            yield source, target

    def _write(
        self, split: str, direction: Direction, examples: list[tuple[str, str]], form: Labels
    ) -> dict[str, Any]:
        folder = self.folder / split / direction.bitext
        folder.mkdir(parents=True)
        names = (direction.source, LABELS)
        counts = {name: {"tokens": 0, "unknown": 0, "longest": 0} for name in names}
        arrays = [ArrayFile(folder / f"{name}.tokens.npy", "<u4") for name in names]
        offsets = [ArrayFile(folder / f"{name}.offsets.npy", "<i8") for name in names]
        for file in offsets:
            file.append(np.zeros(1, dtype=np.int64))
        sequences = 0
        for source, target in examples:
            for made in form.read(source, target):
                sequences += 1
                for name, numbers, tokens, offset in zip(names, made, arrays, offsets, strict=True):
                    count = counts[name]
                    count["tokens"] += len(numbers)
                    count["longest"] = max(count["longest"], len(numbers))
                    tokens.append(np.array(numbers, dtype=np.uint32))
                    offset.append(np.array([count["tokens"]], dtype=np.int64))
                unknown = form.tokenizer.UNK
                counts[names[0]]["unknown"] += made[0].count(unknown) if unknown >= 0 else 0
        for file in (*arrays, *offsets):
            file.close()
        if split != "train":
            for side, name in enumerate(names):
                lines = "".join(f"{example[side]}\n" for example in examples)
                (folder / f"{name}.txt").write_text(lines, encoding="utf-8", newline="\n")
        return {"pairs": sequences, "examples": len(examples), "sides": counts}

    def _tell(self, bitexts: dict[str, dict[str, Any]]) -> None:
        for split in SPLITS:
            if lacking := [name.split("-")[0] for name, each in bitexts.items() if not each[split]["pairs"]]:
                which = "training text" if split == "train" else f"{split} set"
                self.notices.append(f"there is no {which} of {listed(lacking)}")

"""Report what a user of prepared data might not expect.

Examples are which files serve as dev and test sets, which corpora add nothing, and which sets are small.
``prepare`` prints the sentences and keeps them in the manifest; ``data show`` prints them again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lsmoe_ds.config.data import Corpus, Data
from lsmoe_ds.config.file import read_mapping
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.bitext import LATER, Bitext
from lsmoe_ds.data.comparison import settings_of
from lsmoe_ds.data.formats import SPLITS, Search, split_of
from lsmoe_ds.data.held_out import HELD_OUT, Claims
from lsmoe_ds.data.pivot import Joins
from lsmoe_ds.data.text_part import TextPart
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import read_json
from lsmoe_ds.languages import language_name
from lsmoe_ds.notices import counted, listed

# Settings on which the choice of dev and test sentences depends.
CHOOSE = ("corpora", "directions", "cleaning", "held_out")
OF_MANY = ("flores", "ntrex")  # layouts that have the same text in many languages


class Notices:
    """Collect the sentences of one preparation in ``texts``."""

    def __init__(self, data: Data) -> None:
        self.data, self.texts = data, list[str]()
        # Bitexts, by split and the corpus whose set is used; in ``_others`` also by a corpus whose set is
        # not.
        self._serving: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._others: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        self._empty: list[TextPart] = []

    def empty(self, part: TextPart) -> None:
        """Record training text, or a dev or test set, without a sentence."""
        self._empty.append(part)

    def of_file(self, text: str) -> None:
        """Report a fault of a file, only once if the file serves several bitexts."""
        if text not in self.texts:
            self.texts.append(text)

    def published(self, bitext: Bitext, split: str, corpora: Sequence[str]) -> None:
        """Record which corpora provide a set of a bitext; the first one's is used."""
        for number, corpus in enumerate(corpora):
            if number:
                self._others[split, corpora[0], corpus].append(bitext.name)
            else:
                self._serving[split, corpus].append(bitext.name)

    def of_corpora(self, found: Sequence[Search], bitexts: Sequence[Bitext]) -> None:
        """Report corpora that add nothing or lack a part, and the sets that corpora provide."""
        for corpus, each in zip(self.data.corpora, found, strict=True):
            name, own = each.wanted.corpus, each.parts
            if not own:
                self.texts.append(f"warning: corpus {name} has no text for any direction of the recipe")
            elif (
                all(part.split == "train" for part in own)
                and any(part not in self._empty for part in own)
                and not any(bitext.kept_of(name) for bitext in bitexts)
            ):
                self.texts.append(
                    f"warning: corpus {name} adds nothing: each of its pairs was dropped by cleaning, as a "
                    "copy or as held out"
                )
            self._of_halves(each)
            self._of_languages(each, of_many=isinstance(corpus, Corpus) and corpus.format in OF_MANY)
        self._of_published([part for each in found for part in each.parts])
        for corpus in self.data.corpora:
            self._of_stem(corpus)

    def _of_halves(self, found: Search) -> None:
        """Report files that are not read because the corpus lacks the other side."""
        served = {(part.bitext, part.split) for part in found.parts}
        perhaps = [
            half
            for half in found.wanted.perhaps_lacking
            if any(half.bitext == bitext for bitext, _ in served)
        ]
        for split in SPLITS:
            halves = [
                half
                for half in found.wanted.lacking
                if split in HELD_OUT or (half.bitext, split) not in served
            ]
            halves += [half for half in perhaps if split in HELD_OUT and (half.bitext, split) not in served]
            if own := [half for half in halves if half.split == split]:
                self.texts.append(
                    f"warning: corpus {found.wanted.corpus} has {listed(half.file for half in own)} but no "
                    f"file for {listed(half.lacking for half in own)} beside it: no {_set(split)} of "
                    f"{listed(half.bitext for half in own)} is read from there"
                )

    def _of_languages(self, found: Search, of_many: bool) -> None:
        """Report languages of the recipe that a corpus of many languages lacks, or has in another variety."""
        relatives = {code: found.wanted.relatives(code) for code in found.wanted.unserved}
        lacking = [code for code, others in relatives.items() if others or (of_many and found.parts)]
        if lacking:
            others = listed(text for others in relatives.values() for _, text in others)
            but = f"; it has {others}, which is another variety" if others else ""
            self.texts.append(f"corpus {found.wanted.corpus} has no text in {listed(lacking)}{but}")

    def _of_published(self, parts: Sequence[TextPart]) -> None:
        for (split, brings), names in self._serving.items():
            own = [
                part
                for part in parts
                if (part.split, part.corpus) == (split, brings) and part.bitext in names
            ]
            files = listed(file.name for part in own for file in part.files)
            self.texts.append(f"corpus {brings} brings the {split} set of {listed(names)}: {files}")
        for (split, first, brings), names in self._others.items():
            self.texts.append(
                f"the {split} set of {listed(names)} is that of {first}; that of {brings} is only kept out of"
                " training"
            )
        for part in self._empty:
            files = " and ".join(file.name for file in part.files)
            self.texts.append(
                f"warning: the {_set(part.split)} of {part.bitext} in corpus {part.corpus} has no sentence "
                f"({files})"
            )

    def _of_stem(self, corpus: str | Corpus) -> None:
        if isinstance(corpus, Corpus) and corpus.format == "moses" and not corpus.path.is_dir():
            split = split_of(corpus.path.name)
            if split != "train":
                self.texts.append(
                    f"warning: {corpus.path}.CODE is trained on although it is named like a {split} set: "
                    "give the folder as 'path', where such names serve as dev and test"
                )

    def of_sets(self, bitexts: Sequence[Bitext], claims: Claims, directions: Sequence[str]) -> None:
        """Report dev and test sets that are empty or too small, and bitexts without training text."""
        asked, empty, small = self.data.held_out, defaultdict(list), list[str]()
        for bitext in bitexts:
            sizes = {split: bitext.size(split) for split in HELD_OUT}
            lacking = [
                split
                for split in HELD_OUT
                if split not in bitext.own and not sizes[split] and getattr(asked, split)
            ]
            if lacking:
                empty[" or ".join(lacking)].append(f"{bitext.name} ({counted(_pairs(bitext), 'pair')})")
            if any(0 < sizes[split] < getattr(asked, split) for split in HELD_OUT if split not in bitext.own):
                small.append(f"{bitext.name} {sizes['dev']} and {sizes['test']}")
        for splits, names in empty.items():
            self.texts.append(
                f"warning: no {splits} set for {listed(names)}: a set is at most a tenth of the pairs after "
                "cleaning"
            )
        if small:
            wanted = " and ".join(f"{size} {each}" for each in HELD_OUT if (size := getattr(asked, each)))
            self.texts.append(
                f"smaller sets than the {wanted} sentences that the recipe asks "
                "for, since a set takes at most a tenth of a bitext's pairs and shares no sentence with the "
                f"other: {listed(small)}"
            )
        translated = self.data.train_on is not None
        left = "translations bring" if translated else "cleaning and holding out leave"
        untrained = [bitext for bitext in bitexts if not bitext.size("train")]
        for read, what in (
            (False, "there is no training text for"),
            (True, f"{left} no training text of"),
        ):
            if names := [bitext.name for bitext in untrained if bool(bitext.counts["read"]) == read]:
                self.texts.append(f"warning: {what} {listed(names)}: these are only evaluated (zero-shot)")
        if one_way := [
            way
            for bitext in bitexts
            for way in bitext.ways
            if way in directions and bitext.size("train") and not bitext.trained(None) + bitext.trained(way)
        ]:
            self.texts.append(
                f"warning: no translations train {listed(one_way)}, only the reverse direction: these are "
                "only evaluated (zero-shot)"
            )
        if both := claims.in_both():
            are = f"{counted(both, 'sentence')} {'is' if both == 1 else 'are'}"
            self.texts.append(
                f"warning: {are} in a dev set and in a test set that corpora bring: dev scores may flatter"
            )

    def of_training_text(self, bitexts: Sequence[Bitext], joins: Joins | None) -> None:
        """Report how many pairs were joined through a pivot language, and how many 'max_pairs' keeps."""
        joined: dict[str, dict[str, int]] = defaultdict(dict)
        for (corpus, bitext), count in joins.counts.items() if joins else ():
            joined[corpus][bitext] = count
        for corpus, sizes in joined.items():
            by = f"by their sentences in {language_name(self.data.pivot or '')}"
            self.texts.append(
                f"corpus {corpus}: {counted(sum(sizes.values()), 'pair')} were joined {by}, before "
                f"deduplication and holding out: {_sizes(sizes)}"
            )
        if untranslated := sum(bitext.counts["not translated"] for bitext in bitexts):
            self.texts.append(
                f"'data.train_on' leaves out {counted(untranslated, 'training pair')} that no model has "
                "translated"
            )
        if capped := {b.name: b.size("train") for b in bitexts if b.counts["beyond max_pairs"]}:
            dropped = sum(bitext.counts["beyond max_pairs"] for bitext in bitexts)
            self.texts.append(
                f"'data.max_pairs' leaves out {counted(dropped, 'training pair')}; it leaves {_sizes(capped)}"
            )

    def of_start(self, recipe: Recipe, bitexts: Sequence[Bitext]) -> None:
        """Report that the model to start from was trained on other data.

        Its training text may include sentences of the sets that are chosen here.
        """
        chosen = any(
            bitext.size(split) for bitext in bitexts for split in HELD_OUT if split not in bitext.own
        )
        start = recipe.training.start_from
        if start is None or not chosen or not (start / "recipe.yaml").is_file():
            return
        try:
            stored, _ = read_mapping(start / "recipe.yaml", "recipe", Recipe)
        except UserError:
            return  # training reports this error
        if "imported_from" in (read_json(start / "provenance.json") or {}):
            return  # no file here tells on what that model was trained
        own, theirs = settings_of(recipe), stored.get("data")
        if isinstance(theirs, dict) and (
            other := [f"'data.{key}'" for key in CHOOSE if _unlike(own[key], theirs.get(key))]
        ):
            self.texts.append(
                f"warning: {listed(other)} {'is' if len(other) == 1 else 'are'} not as in "
                f"{start / 'recipe.yaml'}: that model may have been trained on dev and test sentences that "
                "were chosen here (docs/recipe.md, Starting from a model)"
            )


def _sizes(pairs: Mapping[str, int]) -> str:
    return listed(f"{name} {count:,}" for name, count in pairs.items())


def _unlike(first: Any, second: Any) -> bool:
    """Tell whether two settings differ in more than their order."""
    both = [sorted(map(repr, each)) if isinstance(each, list) else each for each in (first, second)]
    return bool(both[0] != both[1])


def _set(split: str) -> str:
    return "training text" if split == "train" else f"{split} set"


def why_no_text(found: Sequence[Search], bitext: str) -> str:
    """Return what corpora without text for a bitext have instead: `` (corpus a has pt ...)`` or nothing."""
    said = []
    for each in found:
        corpus = f"corpus {each.wanted.corpus} has"
        said += [
            f"{corpus} {half.file} but no file for {half.lacking}"
            for half in each.wanted.lacking
            if half.bitext == bitext
        ]
        said += [
            f"{corpus} {text}: write {other}"
            for code in bitext.split("-")
            for other, text in each.wanted.relatives(code)
        ]
    return f" ({'; '.join(said)})" if said else ""


def _pairs(bitext: Bitext) -> int:
    """Count the distinct pairs after cleaning."""
    return bitext.counts["read"] - sum(
        count for rule, count in bitext.counts.items() if rule not in ("read", *LATER)
    )

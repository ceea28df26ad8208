"""Say what a reader of prepared data might not expect: which files serve as dev and test, what adds nothing,
which sets are small.

``prepare`` prints the sentences and keeps them in the manifest, ``data show`` prints them again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lsmoe_ds.data.bitext import Bitext
from lsmoe_ds.data.formats import Part, name_of, split_of
from lsmoe_ds.data.held_out import HELD_OUT, Claims
from lsmoe_ds.data.settings import Corpus, Data
from lsmoe_ds.notices import listed


class Notices:
    """Collect the sentences of one preparation in ``texts``."""

    def __init__(self, data: Data) -> None:
        self.data, self.texts = data, list[str]()
        self._serving: dict[tuple[str, str], list[str]] = defaultdict(list)  # bitexts, by split and the corpus whose set serves
        self._others: dict[tuple[str, str, str], list[str]] = defaultdict(list)  # also by the corpus whose set does not
        self._empty: list[Part] = []

    def empty(self, part: Part) -> None:
        """Note a dev or test set without a sentence."""
        self._empty.append(part)

    def published(self, bitext: Bitext, split: str, corpora: Sequence[str]) -> None:
        """Note which corpora bring a set of a bitext; the first one serves."""
        for number, corpus in enumerate(corpora):
            if number:
                self._others[split, corpora[0], corpus].append(bitext.name)
            else:
                self._serving[split, corpus].append(bitext.name)

    def of_corpora(self, parts: Sequence[Part], bitexts: Sequence[Bitext]) -> None:
        """Write of corpora that add nothing, and of the sets that corpora bring along."""
        for corpus in dict.fromkeys(map(name_of, self.data.corpora)):
            own = [part for part in parts if part.corpus == corpus]
            if not own:
                self.texts.append(f"warning: corpus {corpus} has no text for any direction of the recipe")
            elif all(part.split == "train" for part in own) and not any(bitext.kept_of(corpus) for bitext in bitexts):
                self.texts.append(
                    f"warning: corpus {corpus} adds nothing: each of its pairs was dropped by cleaning, as a copy or as held out"
                )
        self._of_published(parts)
        for each in self.data.corpora:
            self._of_stem(each)

    def _of_published(self, parts: Sequence[Part]) -> None:
        for (split, brings), names in self._serving.items():
            own = [part for part in parts if (part.split, part.corpus) == (split, brings) and part.bitext in names]
            files = listed(file.name for part in own for file in part.files)
            self.texts.append(f"corpus {brings} brings the {split} set of {listed(names)}: {files}")
        for (split, first, brings), names in self._others.items():
            self.texts.append(f"the {split} set of {listed(names)} is that of {first}; that of {brings} is only kept out of training")
        for part in self._empty:
            files = " and ".join(file.name for file in part.files)
            self.texts.append(f"warning: the {part.split} set of {part.bitext} in corpus {part.corpus} has no sentence ({files})")

    def _of_stem(self, corpus: str | Corpus) -> None:
        if isinstance(corpus, Corpus) and corpus.format == "moses" and not corpus.path.is_dir():
            split = split_of(corpus.path.name)
            if split != "train":
                self.texts.append(
                    f"warning: {corpus.path}.CODE is trained on although it is named like a {split} set: "
                    "give the folder as 'path', where such names serve as dev and test"
                )

    def of_sets(self, bitexts: Sequence[Bitext], claims: Claims) -> None:
        """Write of dev and test sets that are smaller than asked for or empty, and of bitexts without
        training text.
        """
        asked, empty, small = self.data.held_out, defaultdict(list), list[str]()
        for bitext in bitexts:
            sizes = {split: bitext.size(split) for split in HELD_OUT}
            lacking = [split for split in HELD_OUT if split not in bitext.own and not sizes[split] and getattr(asked, split)]
            if lacking:
                empty[" or ".join(lacking)].append(f"{bitext.name} ({_pairs(bitext)} pairs)")
            if any(0 < sizes[split] < getattr(asked, split) for split in HELD_OUT if split not in bitext.own):
                small.append(f"{bitext.name} {sizes['dev']} and {sizes['test']}")
        for splits, names in empty.items():
            self.texts.append(f"warning: no {splits} set for {listed(names)}: a set is at most a tenth of the pairs after cleaning")
        if small:
            self.texts.append(
                f"smaller sets than the {asked.dev} dev and {asked.test} test sentences that the recipe asks for, since a set takes "
                f"at most a tenth of a bitext's pairs and shares no sentence with the other: {listed(small)}"
            )
        if untrained := [bitext.name for bitext in bitexts if not bitext.size("train")]:
            self.texts.append(f"warning: there is no training text for {listed(untrained)}: these are only evaluated (zero-shot)")
        if both := claims.in_both():
            self.texts.append(f"warning: {both:,} sentences are in a dev set and in a test set that corpora bring: dev scores may flatter")


def _pairs(bitext: Bitext) -> int:
    """Count the distinct pairs after cleaning."""
    return bitext.counts["read"] - sum(count for rule, count in bitext.counts.items() if rule not in ("read", "held out"))

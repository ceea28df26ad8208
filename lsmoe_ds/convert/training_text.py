"""Describe a model's training text for its model card: corpora, pairs, directions, the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsmoe_ds.config.host import HOST
from lsmoe_ds.config.host_origin import license_files, origin_of
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.comparison import find_directory
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.sources import PROVENANCE, corpus_folder
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.metrics import TASKS
from lsmoe_ds.folders import read_json
from lsmoe_ds.notices import counted

HELD_OUT_ONLY = ("flores", "ntrex")  # layouts that have no training text


@dataclass(frozen=True)
class TrainingText:
    """``trained`` are the directions that the run trained on; None for imported models.

    A direction without training pairs did not train, whatever the recipe says. ``pairs`` has the training
    pairs of the bitexts of the model's directions, or, if none of these trained, of all that did.
    """

    corpora: list[str]
    pairs: dict[str, int]
    trained: list[str] | None

    @classmethod
    def of(cls, recipe: Recipe, provenance: Mapping[str, Any], home: Path) -> TrainingText:
        known = _pairs(recipe, home)
        corpora = [_corpus(corpus, find_directory(recipe, home)) for corpus in recipe.data.corpora]
        own, trained = recipe.languages.directions, provenance.get("trained")
        chosen = list(own)
        if trained is not None:
            trained = [each for each in trained if known.get(Direction.parse(each).bitext) != 0]
            chosen = [each for each in own if str(each) in trained] or list(map(Direction.parse, trained))
        names = dict.fromkeys(each.bitext for each in chosen)
        return cls(corpora, {name: known[name] for name in names if name in known}, trained)

    def lines(self) -> list[str]:
        """Return the items of the card's list."""
        return [
            *self.corpora,
            *(_amount(Direction.parse(name), pairs) for name, pairs in self.pairs.items()),
        ]

    def facts(self, recipe: Recipe, provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield the base model, the directions that trained, and the model's directions that did not.

        A model from which training started may have been trained on more.
        """
        if (host := recipe.model.huggingface) is not None:
            origin = origin_of(host)
            files = [f"`{HOST}/{name}`" for name in license_files(host)]
            told = [origin.license] if origin.license else [] if files else ["unknown"]
            yield "base model", f"{origin.name}, license: {', '.join([*told, *files])}"
        if self.trained is None:
            return
        start = provenance.get("started_from")
        started = f"; training started from {start}" if start else ""
        labels = [Direction.parse(each).label for each in self.trained]
        what = f"trained {TASKS[recipe.model.task].unit}s"
        yield what, (", ".join(labels) or "none") + started
        untrained = [d.label for d in recipe.languages.directions if str(d) not in self.trained]
        if untrained:
            yield f"not trained{' here' if start else ' (zero-shot)'}", ", ".join(untrained)


def _amount(direction: Direction, pairs: int) -> str:
    if direction.alone:
        return f"{direction.label}: {counted(pairs, 'example')}"
    return f"{direction.bitext}: {counted(pairs, 'pair')} of sentences"


def _corpus(corpus: Any, directory: Path) -> str:
    """Describe a corpus and its license, from its ``PROVENANCE.json``."""
    if not isinstance(corpus, str):
        only = corpus.format in HELD_OUT_ONLY and corpus.train is None
        held_out = " (held-out text only)" if only else ""
        # A path on this machine is private.
        return f"{corpus.path.name}{held_out}, from the trainer's own disk; license unknown"
    found = read_json(corpus_folder(corpus, directory) / PROVENANCE)
    if found is None:
        return f"{corpus}; version and license unknown"
    package, version, license, date = (
        found.get(key, "unknown") for key in ("package", "version", "license", "date")
    )
    return f"{corpus}: {package} {version}, license {license}, fetched {date}"


def _pairs(recipe: Recipe, home: Path) -> dict[str, int]:
    """Return the number of training pairs of each bitext; empty if the prepared data are not the run's."""
    try:
        bitexts = PreparedData.of(recipe, home).manifest["bitexts"]
    except UserError:
        return {}
    return {
        name: splits["train"].get("examples", splits["train"]["pairs"]) for name, splits in bitexts.items()
    }

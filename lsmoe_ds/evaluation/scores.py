"""Scores of a model's translations, by direction, beside those of copying the source.

A :class:`ScoreTable` answers one question, which is the step, the text, the route, the search and BLEU's
tokenizer. Its JSON::

    {"name", "question", "step", "split", "beam", "length_penalty", "route", "limit", "tokenize",
     "asked": [direction, ...] or null, "skipped": [direction, ...], "sentences",
     "signatures": {metric: [signature, ...]},
     "averages": {"into_english" | "out_of_english" | "between_others" | "all" | GROUP | "H2H" | "H2M" | ...:
                  {"directions", "bleu", "chrf", "chrfpp", "copy": {"bleu", "chrf", "chrfpp"}}},
     "resources": {bitext: GROUP}, "groups": {language: GROUP},
     "directions": {"en-de": {"bleu", "chrf", "chrfpp", "copy": {...}, "sentences", "exact", "weak",
                              "seconds", "signatures": {metric: signature},
                              "samples": [{"source", "hypothesis", "reference"}, ...]}}}

GROUP is one of "high", "medium", "low" and "very_low". With COMET a direction also has "comet", and the table
"comet", which names the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from sacrebleu.metrics import CHRF

from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.groups import CLASSES, Average, Metrics, averages
from lsmoe_ds.evaluation.metrics import METRICS, Tokenizer, make_metrics, score_corpus
from lsmoe_ds.folders import write_whole
from lsmoe_ds.languages import GROUPS, Direction

AVERAGES = {
    "into_english": "into English",
    "out_of_english": "out of English",
    "between_others": "between others",
    "all": "all directions",
    "high": "high resource",
    "medium": "medium resource",
    "low": "low resource",
    "very_low": "very low resource",
} | {name: f"{name}: {source} into {target}".replace("_", " ") for name, (source, target) in CLASSES.items()}
WEAK = 30.0
"""A translation whose own chrF is below this is rarely of any use."""
BEAM, PENALTY = 5, 1.0  # the usual search
LONGEST_NAME = 60  # characters of the directions in a question's name


@dataclass(frozen=True)
class Sample:
    """One sentence of the test set, the model's translation, and the reference."""

    source: str
    hypothesis: str
    reference: str


@dataclass(frozen=True)
class DirectionScore:
    """The scores of one direction.

    ``exact`` and ``weak`` are the shares of sentences, from 0 to 1, that equal the reference and that have a
    chrF below :data:`WEAK`. ``seconds`` is the time that translation took. ``comet`` is COMET's system score.
    """

    direction: Direction
    metrics: Metrics
    copy: Metrics
    sentences: int
    exact: float
    weak: float
    seconds: float
    signatures: dict[str, str]
    samples: tuple[Sample, ...]
    comet: float | None = None


def score_direction(
    direction: Direction,
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    seconds: float = 0.0,
    samples: int = 5,
    tokenizer: Tokenizer | None = None,
) -> DirectionScore:
    """Score N detokenized ``hypotheses``, and the N ``sources`` as a copy, against N ``references``.

    The samples are spread evenly over the lines, not hand-picked. Raises UserError if there is no line,
    ValueError if the numbers of lines differ.
    """
    if not len(sources) == len(hypotheses) == len(references):
        raise ValueError(
            f"{direction}: {len(sources)} sources, {len(hypotheses)} hypotheses and {len(references)} "
            "references"
        )
    if not references:
        raise UserError(
            f"{direction} has no sentences to score: 'data.held_out' must keep at least one of this split"
        )
    metrics, count = make_metrics(direction.target, tokenizer), len(references)
    shown = min(samples, count)
    exact, weak = shares(hypotheses, [references])
    return DirectionScore(
        direction=direction,
        metrics=score_corpus(metrics, hypotheses, [references]),
        copy=score_corpus(metrics, sources, [references]),
        sentences=count,
        exact=exact,
        weak=weak,
        seconds=seconds,
        signatures={name: str(metric.get_signature()) for name, metric in metrics.items()},
        samples=tuple(
            Sample(sources[i], hypotheses[i], references[i])
            for i in (k * count // shown for k in range(shown))
        ),
    )


def shares(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Compute the shares of N hypotheses that equal a reference and that have a chrF below :data:`WEAK`.

    ``references`` is [R, N].
    """
    characters, several = CHRF(), list(zip(*references, strict=True))
    exact = sum(h.strip() in [r.strip() for r in each] for h, each in zip(hypotheses, several, strict=True))
    weak = sum(
        characters.sentence_score(h, list(each)).score < WEAK
        for h, each in zip(hypotheses, several, strict=True)
    )
    return exact / len(hypotheses), weak / len(hypotheses)


@dataclass(frozen=True)
class ScoreTable:
    """The scores of a model at one step, and the question that they answer.

    ``split`` is "test", "dev" or the name of the user's own test set; ``route`` is "specific" or "shared", as
    for :func:`lsmoe_ds.inference.load.load`; ``limit`` is the number of sentences scored in each direction,
    None for all; ``tokenize`` is the name of BLEU's tokenizer if the user chose it; ``asked`` are the
    directions that were asked for, None for all; ``skipped`` are those of them without text; ``comet`` is the
    name of COMET's checkpoint; ``resources`` and ``groups`` are the resource groups of bitexts and languages,
    as far as they are known.
    """

    name: str
    step: int
    split: str
    beam: int
    length_penalty: float
    directions: tuple[DirectionScore, ...]
    resources: Mapping[str, str] = field(default_factory=dict)
    route: str = "specific"
    limit: int | None = None
    tokenize: str | None = None
    asked: tuple[Direction, ...] | None = None
    skipped: tuple[Direction, ...] = ()
    comet: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """Return the question's name in file names.

        It is ``step-200.test.beam-5``, plus whatever differs from a complete evaluation.
        """
        parts = [f"step-{self.step}", self.split, f"beam-{self.beam}"]
        parts += [f"penalty-{self.length_penalty}"] if self.length_penalty != PENALTY else []
        parts += [self.route] if self.route != "specific" else []
        parts += [f"limit-{self.limit}"] if self.limit is not None else []
        parts += [f"tok-{self.tokenize}"] if self.tokenize is not None else []
        parts += [self.comet] if self.comet is not None else []
        parts += [_name_directions(self.asked)] if self.asked is not None else []
        return ".".join(parts)

    def covers(self, directions: Iterable[Direction]) -> bool:
        """Tell whether this evaluates directions completely: all test sentences, default tokenizers."""
        answered = {*(score.direction for score in self.directions), *self.skipped}
        return (
            self.split == "test"
            and self.limit is None
            and self.tokenize is None
            and answered.issuperset(directions)
        )

    @property
    def usual_search(self) -> bool:
        return (self.beam, self.length_penalty) == (BEAM, PENALTY)

    def describe(self, directions: Sequence[Direction]) -> str:
        """Describe the question, and how it falls short of a complete evaluation of ``directions``."""
        said = f"Step {self.step:,}, {self.split} set, {self.sentences:,} sentences, beam {self.beam}"
        said += f", length penalty {self.length_penalty:g}" if self.length_penalty != PENALTY else ""
        said += ", shared route." if self.route == "shared" else "."
        scored = {score.direction for score in self.directions}
        without = [direction for direction in directions if direction in self.skipped]
        if without:
            said += f" Without sentences, and not scored: {', '.join(map(str, without))}."
        if self.covers(directions):
            return said
        lacks = (
            [f"only the first {self.limit:,} sentences of each direction"] if self.limit is not None else []
        )
        missing = sum(direction not in scored and direction not in self.skipped for direction in directions)
        lacks += [f"only {len(scored)} of {len(directions)} directions"] if missing else []
        lacks += [f"BLEU by the tokenizer {self.tokenize}"] if self.tokenize is not None else []
        lacks += ["not the test set"] if self.split != "test" else []
        return f"{said} This is no complete evaluation: {', '.join(lacks)}."

    def averages(self) -> dict[str, Average]:
        return averages(self.directions, self.resources, self.groups)

    @property
    def sentences(self) -> int:
        return sum(score.sentences for score in self.directions)

    def share(self, name: str) -> float:
        """Return the share, from 0 to 1, of all sentences that are ``name``: ``exact`` or ``weak``."""
        return sum(getattr(score, name) * score.sentences for score in self.directions) / max(
            self.sentences, 1
        )

    def signatures(self) -> dict[str, list[str]]:
        """List the signatures of each metric, each once: BLEU has one for every tokenizer."""
        names = dict.fromkeys(name for score in self.directions for name in score.signatures)
        return {
            name: list(dict.fromkeys(score.signatures[name] for score in self.directions))
            for name in names or METRICS
        }

    def to_json(self) -> str:
        value = {
            "name": self.name,
            "question": self.question,
            "step": self.step,
            "split": self.split,
            "beam": self.beam,
            "length_penalty": self.length_penalty,
            "route": self.route,
            "limit": self.limit,
            "tokenize": self.tokenize,
            "asked": None if self.asked is None else [str(direction) for direction in self.asked],
            "skipped": [str(direction) for direction in self.skipped],
            **({"comet": self.comet} if self.comet is not None else {}),
            "sentences": self.sentences,
            "signatures": self.signatures(),
            "averages": {name: average.as_dict() for name, average in self.averages().items()},
            "resources": dict(self.resources),
            "groups": dict(self.groups),
            "directions": {str(score.direction): _direction_to_json(score) for score in self.directions},
        }
        return json.dumps(value, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str, empty: bool = False) -> ScoreTable:
        """Read the output of :meth:`to_json`. Averages and the lists of signatures are computed again.

        Scores of earlier versions do not say which directions were asked for; then it is the scored ones.
        Raises UserError for anything else, and for scores of no direction unless they may be ``empty``.
        """
        try:
            value = json.loads(text)
            resources, groups = (
                {str(name): str(group) for name, group in given.items()}
                for given in (value["resources"], value.get("groups", {}))
            )
            if not {*resources.values(), *groups.values()} <= set(GROUPS):
                raise ValueError(f"a resource group is none of {', '.join(GROUPS)}")
            if not value["directions"] and not empty:
                raise ValueError("no direction is scored")
            scored = tuple(
                _direction_from_json(Direction.parse(name), score)
                for name, score in value["directions"].items()
            )
            asked = value.get("asked", [str(score.direction) for score in scored])
            return cls(
                name=str(value["name"]),
                step=int(value["step"]),
                split=str(value["split"]),
                beam=int(value["beam"]),
                length_penalty=float(value["length_penalty"]),
                directions=scored,
                resources=resources,
                groups=groups,
                route=str(value.get("route", "specific")),
                limit=None if value.get("limit") is None else int(value["limit"]),
                tokenize=None if value.get("tokenize") is None else str(value["tokenize"]),
                asked=None if asked is None else tuple(map(Direction.parse, asked)),
                skipped=tuple(map(Direction.parse, value.get("skipped", ()))),
                comet=None if value.get("comet") is None else str(value["comet"]),
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"these scores cannot be read: {error}") from None
        except KeyError as error:
            raise UserError(f"these scores cannot be read: {error} is missing") from None

    def write(self, path: Path) -> None:
        """Write the JSON whole or not at all."""
        write_whole(path, self.to_json() + "\n")

    @classmethod
    def read(cls, path: Path, empty: bool = False) -> ScoreTable:
        """Read a file by :meth:`from_json`. Raises UserError, which names the file."""
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
        """Make a table for a terminal, with a line for each direction and each average.

        The score of copying the source is in parentheses.
        """
        title = f"{self.name}: {self.question}"
        table = Table(title=title, caption="in parentheses: copying the source")
        table.add_column("direction")
        for column in (*METRICS.values(), *(["COMET"] if self.comet else []), "sentences"):
            table.add_column(column, justify="right")
        for score in self.directions:
            comet = [] if self.comet is None else [f"{score.comet:.4f}" if score.comet is not None else ""]
            table.add_row(
                str(score.direction), *_cells(score.metrics, score.copy), *comet, f"{score.sentences:,}"
            )
        table.add_section()
        for name, average in self.averages().items():
            comet = [] if self.comet is None else [""]
            table.add_row(
                AVERAGES[name],
                *_cells(average.metrics, average.copy),
                *comet,
                f"{average.directions} direction{'s' if average.directions > 1 else ''}",
            )
        return table


def _name_directions(directions: Iterable[Direction]) -> str:
    """Name directions, in any order: ``de-en+en-de``, or if that is too long their number and a checksum."""
    names = sorted(map(str, directions))
    joined = "+".join(names)
    if len(joined) <= LONGEST_NAME:
        return joined
    return f"{len(names)}-directions-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"


def _cells(metrics: Metrics, copy: Metrics) -> list[str]:
    return [f"{getattr(metrics, name):.1f} ({getattr(copy, name):.1f})" for name in METRICS]


def _direction_to_json(score: DirectionScore) -> dict[str, Any]:
    return {
        **score.metrics.as_dict(),
        **({"comet": score.comet} if score.comet is not None else {}),
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
        signatures={
            name: str(value["signatures"][name]) for name in dict.fromkeys([*METRICS, *value["signatures"]])
        },
        samples=tuple(
            Sample(str(s["source"]), str(s["hypothesis"]), str(s["reference"])) for s in value["samples"]
        ),
        comet=None if value.get("comet") is None else float(value["comet"]),
    )

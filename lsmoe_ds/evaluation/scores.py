"""Store the scores of a model: of translations by direction, with those of copying the source, or of another
task by language.

A :class:`ScoreTable` answers one question: a step, text, route, search and BLEU tokenizer. Its JSON::

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
"comet", which names the checkpoint. The table of another task also has "task"; its metrics are those of the
task (:data:`lsmoe_ds.evaluation.metrics.TASKS`), and its directions are languages, "de-de". It lacks what
only translations have: "beam", "length_penalty", "tokenize", "signatures", "copy", and the shares "exact"
and "weak" of a direction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from lsmoe_ds.checkpoint.averages import Averaging, describe_average, read_average
from lsmoe_ds.config.host import Task
from lsmoe_ds.directions import GROUPS, Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.direction_scores import DirectionScore
from lsmoe_ds.evaluation.groups import Average, averages
from lsmoe_ds.evaluation.metrics import TASKS, TaskMetrics
from lsmoe_ds.folders import write_whole
from lsmoe_ds.notices import counted

BEAM, PENALTY = 5, 1.0  # the usual search
LONGEST_NAME = 60  # characters of the directions in a question's name


@dataclass(frozen=True)
class ScoreTable:
    """The scores of a model at one step, and the question that they answer.

    ``split`` is "test", "dev" or the name of the user's own test set; ``route`` is "specific" or "shared", as
    for :func:`lsmoe_ds.inference.load.load`; ``limit`` is the number of sentences scored in each direction,
    None for all; ``tokenize`` is the name of BLEU's tokenizer if the user chose it; ``asked`` are the
    directions that were asked for, None for all; ``skipped`` are those without text; ``comet`` is the
    name of COMET's checkpoint; ``resources`` and ``groups`` are the resource groups of bitexts and languages,
    as far as they are known. Only translations have a search: other tasks leave ``beam``, ``length_penalty``,
    ``tokenize`` and ``comet`` at their defaults.
    """

    name: str
    step: int
    split: str
    beam: int = BEAM
    length_penalty: float = PENALTY
    directions: tuple[DirectionScore, ...] = ()
    resources: Mapping[str, str] = field(default_factory=dict)
    route: str = "specific"
    limit: int | None = None
    tokenize: str | None = None
    asked: tuple[Direction, ...] | None = None
    skipped: tuple[Direction, ...] = ()
    comet: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    task: Task = "translate"
    average: Averaging = 1

    @property
    def scoring(self) -> TaskMetrics:
        """Return what is scored of the task."""
        return TASKS[self.task]

    @property
    def translates(self) -> bool:
        return self.task == "translate"

    @property
    def question(self) -> str:
        """Return the question's name in file names.

        It is ``step-200.test.beam-5``, or ``step-200.test`` for a task without a search, plus all differences
        from a complete evaluation.
        """
        parts = [f"step-{self.step}", *self._weights(), self.split]
        parts += [f"beam-{self.beam}"] if self.translates else []
        parts += [f"penalty-{self.length_penalty}"] if self.length_penalty != PENALTY else []
        parts += [self.route] if self.route != "specific" else []
        parts += [f"limit-{self.limit}"] if self.limit is not None else []
        parts += [f"tok-{self.tokenize}"] if self.tokenize is not None else []
        parts += [self.comet] if self.comet is not None else []
        parts += [_name_directions(self.asked)] if self.asked is not None else []
        return ".".join(parts)

    def _weights(self) -> list[str]:
        if self.average == 1:
            return []
        return [self.average if isinstance(self.average, str) else f"mean-{self.average}"]

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
        unit, item = self.scoring.unit, self.scoring.item
        averaged = f", {describe_average(self.average)}" if self.average != 1 else ""
        said = f"Step {self.step:,}{averaged}, {self.split} set, {counted(self.sentences, item)}"
        said += f", beam {self.beam}" if self.translates else ""
        said += f", length penalty {self.length_penalty:g}" if self.length_penalty != PENALTY else ""
        said += ", shared route." if self.route == "shared" else "."
        scored = {score.direction for score in self.directions}
        without = [direction for direction in directions if direction in self.skipped]
        if without:
            said += f" Without {item}s, and not scored: {', '.join(each.label for each in without)}."
        if self.covers(directions):
            return said
        lacks = [f"only the first {self.limit:,} {item}s of each {unit}"] if self.limit is not None else []
        missing = sum(direction not in scored and direction not in self.skipped for direction in directions)
        lacks += [f"only {len(scored)} of {len(directions)} {unit}s"] if missing else []
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
            for name in names or (self.scoring.titles if self.translates else ())
        }

    def to_json(self) -> str:
        search = {"beam": self.beam, "length_penalty": self.length_penalty}
        value = {
            "name": self.name,
            **({} if self.translates else {"task": self.task}),
            "question": self.question,
            "step": self.step,
            "split": self.split,
            **(search if self.translates else {}),
            "route": self.route,
            **({"average": self.average} if self.average != 1 else {}),
            "limit": self.limit,
            **({"tokenize": self.tokenize} if self.translates else {}),
            "asked": None if self.asked is None else [str(direction) for direction in self.asked],
            "skipped": [str(direction) for direction in self.skipped],
            **({"comet": self.comet} if self.comet is not None else {}),
            "sentences": self.sentences,
            **({"signatures": self.signatures()} if self.translates else {}),
            "averages": {name: average.as_dict() for name, average in self.averages().items()},
            "resources": dict(self.resources),
            "groups": dict(self.groups),
            "directions": {str(score.direction): score.to_dict() for score in self.directions},
        }
        return json.dumps(value, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str, empty: bool = False) -> ScoreTable:
        """Read the output of :meth:`to_json`. Averages and the lists of signatures are computed again.

        Scores of earlier versions do not record which directions were asked for; the scored ones are assumed.
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
            task = value.get("task", "translate")
            if task not in TASKS:
                raise ValueError(f"the task {task!r} is none of {', '.join(TASKS)}")
            scored = tuple(
                DirectionScore.from_dict(task, Direction.parse(name), score)
                for name, score in value["directions"].items()
            )
            search = value if task == "translate" else {"beam": BEAM, "length_penalty": PENALTY}
            asked = value.get("asked", [str(score.direction) for score in scored])
            return cls(
                name=str(value["name"]),
                step=int(value["step"]),
                split=str(value["split"]),
                beam=int(search["beam"]),
                length_penalty=float(search["length_penalty"]),
                directions=scored,
                resources=resources,
                groups=groups,
                route=str(value.get("route", "specific")),
                limit=None if value.get("limit") is None else int(value["limit"]),
                tokenize=None if value.get("tokenize") is None else str(value["tokenize"]),
                asked=None if asked is None else tuple(map(Direction.parse, asked)),
                skipped=tuple(map(Direction.parse, value.get("skipped", ()))),
                comet=None if value.get("comet") is None else str(value["comet"]),
                task=task,
                average=read_average(str(value.get("average", 1))),
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"these scores cannot be read: {error}") from None
        except KeyError as error:
            raise UserError(f"these scores cannot be read: {error} is missing") from None

    def write(self, path: Path) -> None:
        """Write the JSON completely or not at all."""
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
        title, scoring = f"{self.name}: {self.question}", self.scoring
        copied = any(score.copy is not None for score in self.directions)
        table = Table(title=title, caption="in parentheses: copying the source" if copied else None)
        table.add_column(scoring.unit)
        comets = ["COMET"] if self.comet else []
        for column in (*scoring.titles.values(), *comets, f"{scoring.item}s"):
            table.add_column(column, justify="right")
        for score in self.directions:
            comet = [] if self.comet is None else [f"{score.comet:.4f}" if score.comet is not None else ""]
            table.add_row(score.direction.label, *self._cells(score), *comet, f"{score.sentences:,}")
        table.add_section()
        for name, average in self.averages().items():
            comet = [] if self.comet is None else [""]
            table.add_row(
                scoring.averages[name],
                *self._cells(average),
                *comet,
                counted(average.directions, scoring.unit),
            )
        return table

    def _cells(self, score: DirectionScore | Average) -> list[str]:
        copied = {name: f" ({value:.1f})" for name, value in score.copy.values.items()} if score.copy else {}
        return [f"{score.metrics[name]:.1f}{copied.get(name, '')}" for name in self.scoring.titles]


def _name_directions(directions: Iterable[Direction]) -> str:
    """Name directions, in any order: ``de-en+en-de``, or if that is too long their number and a checksum."""
    names = sorted(direction.label for direction in directions)
    joined = "+".join(names)
    if len(joined) <= LONGEST_NAME:
        return joined
    return f"{len(names)}-directions-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"

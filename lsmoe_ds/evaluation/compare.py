"""``lsmoe compare``: test whether the scores of several systems differ, from their stored translations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lsmoe_ds.config.codes import read_directions
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.metrics import METRICS, Tokenizer, make_metrics
from lsmoe_ds.evaluation.parts import RECIPE, find_home
from lsmoe_ds.evaluation.score_folder import SCORES, ScoreFolder, fullest
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.evaluation.significance import TRIALS, Outcome, Trials, run_trials

TEXT = ("split", "limit")  # must be the same, otherwise scores cannot be compared
SEARCH = ("route", "beam", "length_penalty")  # must be the same, unless the user names records
BYTES = 10 * 8 + 24 * 4  # per line and resample: ten randomizations, and the n-gram counts of chrF++

Found = dict[str, list[Outcome]]  # by metric, one outcome for each system


@dataclass(frozen=True)
class System:
    """The stored translations of a system. ``named``: the user named the record rather than its run."""

    path: Path
    folder: ScoreFolder
    table: ScoreTable
    named: bool

    @property
    def directions(self) -> list[Direction]:
        return [score.direction for score in self.table.directions]


@dataclass(frozen=True)
class Comparison:
    """The outcomes by direction and for the mean over ``directions``; the first system is the baseline."""

    systems: tuple[System, ...]
    directions: dict[Direction, Found]
    mean: Found
    signatures: dict[str, list[str]]
    samples: int
    seed: int

    @property
    def labels(self) -> list[str]:
        """Name the systems by run, by the last part of their paths, or by path: the first that differ."""
        choices = [
            [system.table.name for system in self.systems],
            [system.path.name for system in self.systems],
        ]
        return next(
            (names for names in choices if len(set(names)) == len(names)),
            [str(system.path) for system in self.systems],
        )

    @property
    def rows(self) -> list[tuple[str, Found]]:
        """Return (title, outcomes) of each direction and, if there are several, of their mean."""
        mean = [(f"mean of {len(self.directions)} directions", self.mean)] if len(self.directions) > 1 else []
        return [*((str(direction), found) for direction, found in self.directions.items()), *mean]

    def to_dict(self) -> dict[str, Any]:
        def shown(found: Found) -> dict[str, list[dict[str, float]]]:
            return {metric: [outcome.to_dict() for outcome in outcomes] for metric, outcomes in found.items()}

        baseline = self.systems[0].table
        return {
            "systems": [
                {
                    "path": str(s.path),
                    "name": s.table.name,
                    "step": s.table.step,
                    "question": s.table.question,
                }
                for s in self.systems
            ],
            "split": baseline.split,
            "limit": baseline.limit,
            "seed": self.seed,
            "bootstrap_resamples": self.samples,
            "randomization_trials": TRIALS * self.samples,
            "signatures": self.signatures,
            "directions": {str(direction): shown(found) for direction, found in self.directions.items()},
            "mean": shown(self.mean),
        }

    def table(self) -> Table:
        """Make a table for a terminal: a line for each direction and system."""
        first = self.systems[0]
        trials = (
            f"{self.samples:,} bootstrap resamples, {TRIALS * self.samples:,} randomizations, seed "
            f"{self.seed}"
        )
        legend = (
            "difference from the baseline [its 95 % interval], p by paired bootstrap / approximate "
            "randomization"
        )
        others = [
            f"{label}: {system.table.question}"
            for label, system in zip(self.labels[1:], self.systems[1:], strict=True)
            if system.table.question != first.table.question
        ]
        table = Table(
            title=escape("; ".join([f"baseline: {self.labels[0]} ({first.table.question})", *others])),
            caption=f"{escape(legend)}; * both below 0.05; {trials}",
        )
        table.add_column("direction")
        table.add_column("system", overflow="fold")
        for name in METRICS.values():
            table.add_column(name)
        for title, found in self.rows:
            table.add_section()
            for index in range(len(self.systems)):
                cells = [_cell(found[metric][index]) for metric in METRICS]
                table.add_row(
                    "" if index else title, escape(self.labels[index]) if index else "baseline", *cells
                )
        return table


def _cell(outcome: Outcome) -> str:
    if outcome.difference is None:
        return f"{outcome.score:.1f} ± {outcome.ci:.1f}"
    between = f"[{outcome.low:+.2f}, {outcome.high:+.2f}]"
    text = f"{outcome.difference:+.2f} {between}  p {outcome.p_bootstrap:.4f} / {outcome.p_randomization:.4f}"
    return escape(text) + (" *" if outcome.differs else "")


def compare_runs(
    paths: Sequence[str | Path],
    directions: Sequence[str] | None = None,
    tokenize: str | None = None,
    samples: int = 1000,
    seed: int = 12345,
    progress: bool = True,
) -> Comparison:
    """Test the systems at ``paths`` against the first one, by direction and over all directions.

    A path is a run (which means its complete evaluation, or else the fullest), a checkpoint in it, or a
    record in RUN/scores. Raises UserError, which names the difference, unless the scores of all systems
    answer the same question on the same text.
    """
    if len(paths) < 2:
        raise UserError("there is nothing to compare: name two runs or more, the baseline first")
    systems = tuple(find_system(Path(path)) for path in paths)
    if other := [system for system in systems if not system.table.translates]:
        raise UserError(
            f"{other[0].path} has scores of the task {other[0].table.task}: only translations are compared; "
            "`lsmoe study` compares other tasks over seeds"
        )
    baseline = systems[0]
    for system in systems[1:]:
        _check_question(baseline, system, tokenize is not None)
    chosen = _choose(systems, directions)
    _tell_steps(systems)
    tokenizer = _find_tokenizer(baseline.table.tokenize, tokenize)
    texts = {direction: _read(systems, direction) for direction in chosen}
    _check_memory(max(len(references) for _, references in texts.values()), samples)
    found: dict[Direction, dict[str, list[Trials]]] = {}
    signatures: dict[str, list[str]] = {name: [] for name in METRICS}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    shown = progress and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task("comparing", total=len(texts))
        for direction, (hypotheses, references) in texts.items():
            bar.update(task, description=f"comparing {direction}")
            found[direction], signed = run_trials(
                hypotheses, references, make_metrics(direction.target, tokenizer), samples, seed
            )
            for name, signature in signed.items():
                signatures[name] += [signature] if signature not in signatures[name] else []
            bar.update(task, advance=1)
    means = {
        m: [Trials.mean(list(each)) for each in zip(*(trials[m] for trials in found.values()), strict=True)]
        for m in METRICS
    }
    by_direction = {direction: _outcomes(trials) for direction, trials in found.items()}
    return Comparison(systems, by_direction, _outcomes(means), signatures, samples, seed)


def _outcomes(trials: dict[str, list[Trials]]) -> Found:
    return {metric: [each[0].baseline(), *(one.outcome() for one in each)] for metric, each in trials.items()}


def find_system(path: Path) -> System:
    """Find the stored translations that a path names. Raises UserError if there are none."""
    record = path.with_name(f"{path.name}.json") if path.is_dir() and path.parent.name == "scores" else path
    if record.is_file():
        home = record.parent.parent if record.parent.name == "scores" else record.parent
        return System(path, ScoreFolder(home), ScoreTable.read(record), named=record.name != SCORES)
    if not path.is_dir() and not path.parent.is_dir():
        raise UserError(f"there is no run {path}")
    home, step = find_home(path)
    folder = ScoreFolder(home)
    languages = load_recipe(home / RECIPE).languages.directions if (home / RECIPE).is_file() else ()
    tables = [table for table in folder.tables() if step in (None, table.step)]
    every = languages or tuple(
        dict.fromkeys(score.direction for table in tables for score in table.directions)
    )
    best = fullest(tables, every)
    if best is None:
        raise UserError(f"there are no scores of {path}: `lsmoe evaluate {path}` writes them")
    return System(path, folder, best, named=False)


def _check_question(first: System, second: System, tokenized: bool) -> None:
    """Raise UserError, which names the first difference, if two systems answer different questions."""
    keys = [*TEXT, *(() if tokenized else ("tokenize",)), *(() if first.named or second.named else SEARCH)]
    for key in keys:
        one, other = getattr(first.table, key), getattr(second.table, key)
        if one != other:
            raise UserError(
                f"{first.path} and {second.path} were not asked the same question: {key.replace('_', ' ')} is"
                f" {one or 'none'} in the first and {other or 'none'} in the second ({first.table.question}, "
                f"{second.table.question}): evaluate them alike, or name records in RUN/scores"
            )


def _tell_steps(systems: Sequence[System]) -> None:
    """Say on standard error which steps are compared, if they differ and not all records were named."""
    steps = [system.table.step for system in systems]
    if len(set(steps)) > 1 and not all(system.named for system in systems):
        found = ", ".join(
            f"{system.path} of step {step:,}" for system, step in zip(systems, steps, strict=True)
        )
        print(f"lsmoe: the scores are of different steps: {found}", file=sys.stderr, flush=True)


def _choose(systems: Sequence[System], asked: Sequence[str] | None) -> list[Direction]:
    """Choose the directions to compare. Raises UserError if a system lacks one."""
    own = {code for direction in systems[0].directions for code in (direction.source, direction.target)}
    chosen = systems[0].directions if asked is None else read_directions(asked, own)
    if not chosen:
        raise UserError("--directions names no direction: write them as en-de,de-en")
    for system in systems:
        if missing := [str(direction) for direction in chosen if direction not in system.directions]:
            raise UserError(
                f"{system.path} has no scores of {', '.join(missing)}: name directions that all have with "
                "--directions"
            )
        if asked is None and (
            extra := [str(direction) for direction in system.directions if direction not in chosen]
        ):
            raise UserError(
                f"{systems[0].path} has no scores of {', '.join(extra)}: name directions that all have with "
                "--directions"
            )
    return list(dict.fromkeys(chosen))


def _find_tokenizer(recorded: str | None, tokenize: str | None) -> Tokenizer | None:
    """Read the tokenizer that ``--tokenize`` names, or else the one that the scores were made with."""
    if tokenize is None and recorded is not None and recorded.startswith("spm-"):
        raise UserError(
            f"the scores were made with the sentencepiece model {recorded}: give that file with --tokenize "
            "spm:FILE"
        )
    name = tokenize if tokenize is not None else recorded
    return Tokenizer.parse(name) if name is not None else None


def _read(systems: Sequence[System], direction: Direction) -> tuple[list[list[str]], list[str]]:
    """Read the translations of each system, and the references.

    Raises UserError if the references or the sources of two systems differ.
    """
    texts = [system.folder.read_text(system.table.question, direction) for system in systems]
    for system, text in zip(systems[1:], texts[1:], strict=True):
        for side, first, second in (("sources", texts[0][0], text[0]), ("references", texts[0][2], text[2])):
            if first != second:
                line = next(
                    (n for n, (a, b) in enumerate(zip(first, second, strict=False), 1) if a != b),
                    min(len(first), len(second)) + 1,
                )
                raise UserError(
                    f"the {side} of {direction} in {systems[0].path} and {system.path} differ, first in line "
                    f"{line} (of {len(first)} and {len(second)}): scores on other text do not compare"
                )
    return [hypotheses for _, hypotheses, _ in texts], texts[0][2]


def _check_memory(lines: int, samples: int) -> None:
    needed, free = BYTES * lines * samples, psutil.virtual_memory().available
    if needed > free:
        most = max(100, int(free / (BYTES * lines)))
        raise UserError(
            f"{samples:,} resamples of {lines:,} lines need {needed / 2**30:.1f} GiB of memory, "
            f"{free / 2**30:.1f} are free: take --samples {most}"
        )

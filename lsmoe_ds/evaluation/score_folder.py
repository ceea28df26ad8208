"""The layout of a scores folder: one record and one folder of text for each question.

::

    scores/step-200.test.beam-5.json                 a ScoreTable
    scores/step-200.test.beam-5/en-de.source         plain lines, as many in each of the three files
    scores/step-200.test.beam-5/en-de.hypothesis
    scores/step-200.test.beam-5/en-de.reference
    scores/step-200.test.beam-5/routing.json         expert shares on held-out text, of a model with experts
    scores/step-200.test.beam-5/part-3-of-8.json     of `lsmoe evaluate --part 3/8`
    scores.json, routing.json                        of the complete evaluation, for other programs

``scores.json`` is replaced only by a complete evaluation (all directions, the whole test set, the specific
route) of the same or a later step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.folders import check_can_write, explain_errors, locked, read_json, write_whole

SIDES = ("source", "hypothesis", "reference")
SCORES, ROUTING, RECIPE = "scores.json", "routing.json", "recipe.yaml"
OWNER = "model.json"  # names the model, if the folder is not its own


@dataclass(frozen=True)
class ScoreFolder:
    """The folder that holds ``scores.json``: a run, a converted folder, or the one that ``--out`` names."""

    home: Path

    def record(self, question: str) -> Path:
        return self.home / "scores" / f"{question}.json"

    def folder(self, question: str) -> Path:
        return self.home / "scores" / question

    def text(self, question: str, direction: Direction, side: str) -> Path:
        return self.folder(question) / f"{direction}.{side}"

    def part(self, question: str, part: Part) -> Path:
        return self.folder(question) / f"part-{part.number}-of-{part.count}.json"

    def check(self) -> None:
        """Raise UserError unless scores can be written here; makes ``home``."""
        for folder in (self.home, *([self.home / "scores"] if (self.home / "scores").exists() else [])):
            check_can_write(folder, "give a folder for the scores with --out DIR")

    def claim(self, model: Path) -> None:
        """Record which model the scores in this folder are of, if it is not the model's own (``--out``).

        Raises UserError if they are another model's, whose scores on the same question would be replaced.
        """
        noted = self.home / "scores" / OWNER
        owner = (read_json(noted) or {}).get("model")
        if owner is None and ((self.home / RECIPE).exists() or (self.home / SCORES).exists()):
            owner = str(self.home)
        if owner not in (None, str(model.resolve())):
            raise UserError(
                f"{self.home} holds the scores of {owner}: give those of {model} another folder with "
                "--out DIR"
            )
        with explain_errors(noted):
            noted.parent.mkdir(parents=True, exist_ok=True)
        write_whole(noted, json.dumps({"model": str(model.resolve())}) + "\n")

    def make(self, question: str) -> None:
        """Make the folder of a question."""
        with explain_errors(self.folder(question)):
            self.folder(question).mkdir(parents=True, exist_ok=True)

    def write_text(self, question: str, direction: Direction, *sides: Sequence[str]) -> None:
        """Write the lines of :data:`SIDES`, each file completely or not at all."""
        for side, lines in zip(SIDES, sides, strict=True):
            write_whole(self.text(question, direction, side), "".join(f"{line}\n" for line in lines))

    def read_text(self, question: str, direction: Direction) -> tuple[list[str], list[str], list[str]]:
        """Read the lines of :data:`SIDES`. Raises UserError if a file is missing or line counts differ."""
        source, hypothesis, reference = (_read_lines(self.text(question, direction, side)) for side in SIDES)
        if not len(source) == len(hypothesis) == len(reference):
            counts = ", ".join(
                f"{len(lines)} {side}"
                for lines, side in zip((source, hypothesis, reference), SIDES, strict=True)
            )
            raise UserError(
                f"{self.folder(question)} is damaged: {direction} has {counts} lines: evaluate it again"
            )
        return source, hypothesis, reference

    def write(self, table: ScoreTable, directions: Sequence[Direction]) -> None:
        """Write the record of a question, and ``scores.json`` if it is a complete evaluation.

        It is complete if it covers the system's ``directions``, by the specific route, with the weights as
        they were trained.
        """
        table.write(self.record(table.question))
        if table.route != "specific" or table.average != 1 or not table.covers(directions):
            return
        with locked(self.home / SCORES, wait=True):
            before = self._read(self.home / SCORES)
            if (
                before is not None
                and before.covers(directions)
                and before.route == "specific"
                and _rank(before) > _rank(table)
            ):
                return
            if before is not None:
                self._keep(before, directions)
            table.write(self.home / SCORES)

    def _keep(self, before: ScoreTable, directions: Sequence[Direction]) -> None:
        """Before ``scores.json`` is replaced, write its record if an earlier version wrote none."""
        before = replace(before, asked=None) if before.covers(directions) else before
        if not self.record(before.question).exists():
            before.write(self.record(before.question))

    def write_routing(self, table: ScoreTable, routing: dict[str, Any]) -> None:
        """Write the expert shares of a question on held-out text.

        Also writes ``routing.json`` if they are those of the specific route on the test set, at the same or a
        later step than before; the shares depend on nothing else.
        """
        text = json.dumps({"step": table.step, "route": table.route, **routing}) + "\n"
        write_whole(self.folder(table.question) / ROUTING, text)
        if (table.route, table.split, table.average) != ("specific", "test", 1):
            return
        with locked(self.home / ROUTING, wait=True):
            before = read_json(self.home / ROUTING) or {}
            step = before.get("step")
            if not isinstance(step, int) or step <= table.step:
                write_whole(self.home / ROUTING, text)

    def tables(self) -> list[ScoreTable]:
        """Read ``scores.json`` and the record of every question. Raises UserError if one is damaged."""
        paths = [self.home / SCORES, *sorted((self.home / "scores").glob("step-*.json"))]
        return [ScoreTable.read(path) for path in paths if path.is_file()]

    def best(
        self,
        directions: Sequence[Direction],
        route: str | None = None,
        step: int | None = None,
        average: Averaging | None = None,
    ) -> ScoreTable | None:
        """Choose the :func:`fullest` of the scores here, or of those with this ``route`` and ``average``."""
        tables = [table for table in self.tables() if route in (None, table.route)]
        return fullest([table for table in tables if average in (None, table.average)], directions, step)

    def parts(self, count: int) -> Iterator[tuple[str, list[Part]]]:
        """Yield each question that has scored parts of ``count``, and these parts."""
        for folder in sorted((self.home / "scores").glob("step-*/")):
            names = [re.fullmatch(rf"part-([0-9]+)-of-{count}\.json", path.name) for path in folder.iterdir()]
            found = sorted(int(name[1]) for name in names if name)
            if found:
                yield folder.name, [Part(number, count) for number in found]

    def _read(self, path: Path) -> ScoreTable | None:
        try:
            return ScoreTable.read(path)
        except UserError:
            return None


def fullest(
    tables: Iterable[ScoreTable], directions: Sequence[Direction], step: int | None = None
) -> ScoreTable | None:
    """Choose the complete evaluation of ``directions``, or else the one with most of them, or None.

    Among complete ones it prefers, in this order: the specific route, weights without averaging, ``step``,
    the latest step, and the usual search.
    """
    wanted = set(directions)

    def fullness(table: ScoreTable) -> tuple[Any, ...]:
        scored = [score.sentences for score in table.directions if score.direction in wanted]
        complete = table.covers(directions)
        sizes = (0, 0) if complete else (len(scored), sum(scored))
        usual = complete, table.route == "specific", table.average == 1, table.split == "test"
        return (bool(scored), *usual, *sizes, table.step == step, *_rank(table))

    best = max(tables, key=fullness, default=None)  # the first of equals
    return best if best is not None and fullness(best)[0] else None


def _rank(table: ScoreTable) -> tuple[int, bool]:
    return table.step, table.usual_search


def _read_lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:  # a carriage return does not end a line
            return file.read().split("\n")[:-1]
    except FileNotFoundError:
        raise UserError(
            f"there is no text {path}: `lsmoe evaluate` of this version keeps it beside the scores"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None

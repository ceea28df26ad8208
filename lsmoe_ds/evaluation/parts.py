"""Merge the scores of parts, into which several processes divide the directions.

Merging needs no model and no torch. A part's record is the :class:`ScoreTable` of every N-th direction, in
the folder of its question. No two parts write the same file, so machines that share the folder can score them
at the same time. A part that is evaluated again replaces its earlier record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.run_folder import step_of
from lsmoe_ds.config.codes import read_directions
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.direction_scores import DirectionScore
from lsmoe_ds.evaluation.metrics import Tokenizer
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.score_folder import ScoreFolder
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.evaluation.texts import OWN, read_own

RECIPE = "recipe.yaml"


def choose_directions(
    asked: Sequence[str] | None,
    languages: Languages,
    untrained: bool = False,
    default: Sequence[Direction] | None = None,
) -> list[Direction]:
    """List the requested directions, each once; by default those of ``default``, or all of the system.

    ``untrained`` also allows directions between the system's languages on which it was not trained. Raises
    UserError for any other direction.
    """
    if asked is None:
        return list(languages.directions if default is None else default)
    alone = languages.directions[0].alone
    chosen = read_directions(asked, languages.codes, of_system=True, alone=alone)
    untrained = untrained and not alone
    if untrained:
        for direction in chosen:
            languages.id(direction.source), languages.id(direction.target)
    else:
        chosen = [languages.find(direction) for direction in chosen]
    if not chosen:
        raise UserError("--directions names no direction: write them as en-de,de-en")
    return list(dict.fromkeys(chosen))


def check_held_out(directions: Sequence[Direction], languages: Languages) -> None:
    """Raise UserError for a direction that is not in the system, for which prepared data have no text."""
    for direction in directions:
        if direction not in languages.directions:
            raise UserError(
                f"direction {direction} is not in this system, so no held-out text of it is scored: {OWN}"
            )


def merge(
    run: str | Path,
    count: int,
    directions: Sequence[str] | None = None,
    beam: int = 5,
    length_penalty: float = 1.0,
    split: str = "test",
    limit: int | None = None,
    route: str = "specific",
    test: Sequence[str] = (),
    tokenize: str | None = None,
    out: str | Path | None = None,
    comet: str | Path | None = None,
    average: Averaging = 1,
) -> ScoreTable:
    """Merge ``count`` parts into the same scores that one evaluation with these options would write.

    The parts are those of the latest step for which all exist; their records stay. Raises UserError if a part
    is missing or damaged, and unless each direction is scored once.
    """
    home, step = find_home(Path(run))
    recipe = load_recipe(home / RECIPE)
    chosen = choose_directions(directions, recipe.languages, untrained=True, default=recipe.trained)
    if not test:
        check_held_out(chosen, recipe.languages)
    asked = None if set(chosen) == set(recipe.trained) else tuple(chosen)
    named = read_own(test, split, chosen).split if test else split
    words = Tokenizer.parse(tokenize).name if tokenize is not None else None
    judge = _name_comet(comet)
    wanted = ScoreTable(
        "",
        0,
        named,
        beam,
        length_penalty,
        (),
        {},
        route,
        limit,
        words,
        asked,
        (),
        judge,
        task=recipe.model.task,
        average=average,
    )
    folder = ScoreFolder(Path(out) if out is not None else home)
    question, parts = _find_parts(folder, wanted, step, count, run)
    tables = {part: ScoreTable.read(folder.part(question, part), empty=True) for part in parts}
    first = tables[parts[0]]
    for part, table in tables.items():
        same = {field: getattr(first, field) for field in ("name", "resources", "groups", "skipped")} | {
            "question": question
        }
        for field, expected in same.items():
            if (found := getattr(table, field)) != expected:
                raise UserError(
                    f"part {part} in {folder.folder(question)} has {field} {_show(found)} instead of "
                    f"{_show(expected)}: score it again"
                )
    scores = _by_direction(tables)
    wanted_scores = [direction for direction in chosen if direction not in first.skipped]
    if unscored := [str(direction) for direction in wanted_scores if direction not in scores]:
        raise UserError(
            f"no part in {folder.folder(question)} scores {', '.join(unscored)}: score the parts again"
        )
    merged = replace(first, directions=tuple(scores[direction] for direction in wanted_scores))
    folder.write(merged, recipe.trained)
    return merged


def _show(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _name_comet(path: str | Path | None) -> str | None:
    """Return the name of a COMET checkpoint without loading it."""
    from lsmoe_ds.evaluation.comet import Comet

    return None if path is None else Comet.find(path).name


def _find_parts(
    folder: ScoreFolder, wanted: ScoreTable, step: int | None, count: int, run: str | Path
) -> tuple[str, list[Part]]:
    """Find the question, at ``step`` or the latest step for which all parts exist, and its parts.

    Raises UserError if there is none.
    """
    found: dict[int, list[Part]] = {}
    others = []
    for question, parts in folder.parts(count):
        number = int(question.split(".")[0].removeprefix("step-"))
        if question == replace(wanted, step=number).question:
            if step in (None, number):
                found[number] = parts
        else:
            others.append(question)
    whole = [number for number, parts in found.items() if len(parts) == count]
    if whole:
        return replace(wanted, step=max(whole)).question, found[max(whole)]
    if found:
        latest = max(found)
        missing = [
            str(part) for number in range(1, count + 1) if (part := Part(number, count)) not in found[latest]
        ]
        place = folder.folder(replace(wanted, step=latest).question)
        raise UserError(
            f"{place} lacks {', '.join(missing)}: `lsmoe evaluate {run} --part I/N` writes a part"
        )
    there = f": there are parts of {', '.join(others)}" if others else ""
    raise UserError(
        f"{folder.home / 'scores'} has no part of {count} that answers this question{there}; `lsmoe evaluate "
        f"{run} --part I/N` writes a part, with the same options as --merge"
    )


def _by_direction(tables: dict[Part, ScoreTable]) -> dict[Direction, DirectionScore]:
    found: dict[Direction, DirectionScore] = {}
    by: dict[Direction, Part] = {}
    for part, table in tables.items():
        for score in table.directions:
            if score.direction in by:
                raise UserError(
                    f"{score.direction} is scored by part {by[score.direction]} and by part {part}: score the"
                    " parts again"
                )
            found[score.direction], by[score.direction] = score, part
    return found


def find_home(run: Path) -> tuple[Path, int | None]:
    """Return the folder to which scores are written, and the step if ``run`` is a checkpoint.

    ``run`` is a run, a checkpoint in it or a converted folder. The checkpoint may have been removed since.
    """
    checkpoints = run.resolve().parent
    if checkpoints.name == "checkpoints" and not (run / RECIPE).is_file():
        return checkpoints.parent, (
            step_of(run.resolve()) if run.resolve().name.removeprefix("step-").isdecimal() else None
        )
    return run, None

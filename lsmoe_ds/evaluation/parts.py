"""Scores of the directions of a run that several processes share: what each wrote, put together. Needs no model and no torch.

``RUN/scores/part-I-of-N.json`` is the :class:`ScoreTable` of every N-th direction. No two parts write the same file, so that they
can be scored at the same time on any machines that share the run folder. A part is scored anew whenever it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lsmoe_ds.codes import read_directions
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.scores import DirectionScore, ScoreTable
from lsmoe_ds.languages import Direction, Languages
from lsmoe_ds.part import Part
from lsmoe_ds.recipe_file import load_recipe

RECIPE = "recipe.yaml"


def part_file(home: Path, part: Part) -> Path:
    return home / "scores" / f"part-{part.number}-of-{part.count}.json"


def choose_directions(asked: Sequence[str] | None, languages: Languages) -> list[Direction]:
    """Those asked for, each once, or all of the system. Raises UserError for one that it lacks."""
    if not asked:
        return list(languages.directions)
    chosen = list(dict.fromkeys(read_directions(asked, languages)))
    if not chosen:
        raise UserError("--directions names no direction: write them as en-de,de-en")
    return chosen


def merge(
    run: str | Path,
    count: int,
    directions: Sequence[str] | None = None,
    beam: int = 5,
    length_penalty: float = 1.0,
    split: str = "test",
    limit: int | None = None,
    route: str = "specific",
) -> ScoreTable:
    """Writes ``scores.json`` out of ``count`` parts, as :func:`lsmoe_ds.evaluation.evaluate.evaluate` would with the same options
    at once; the parts stay.

    Raises UserError if a part is missing or damaged, is of another step than the first or of other options than these, and unless
    each direction is scored once.
    """
    home = _home(Path(run))
    chosen = choose_directions(directions, load_recipe(home / RECIPE).languages)
    parts = [Part(number, count) for number in range(1, count + 1)]
    if missing := [str(part) for part in parts if not part_file(home, part).is_file()]:
        raise UserError(f"{part_file(home, parts[0]).parent} lacks {', '.join(missing)}: `lsmoe evaluate {run} --part I/N` writes a part")
    tables = {part: ScoreTable.read(part_file(home, part), empty=True) for part in parts}
    first = tables[parts[0]]
    of_first = {"name": first.name, "step": first.step, "resources": first.resources}
    options = {"split": split, "beam": beam, "length_penalty": length_penalty, "limit": limit, "route": route}
    for part, table in tables.items():
        for field, wanted in {**of_first, **options}.items():
            if (found := getattr(table, field)) != wanted:
                other = f"part {parts[0]} has" if field in of_first else "--merge was given"
                raise UserError(f"part {part} of {home} has {field.replace('_', ' ')} {found}, but {other} {wanted}: they must be the same")
    scores = _by_direction(tables)
    if extra := [str(direction) for direction in scores if direction not in chosen]:
        raise UserError(f"the parts of {home} score {', '.join(extra)} too: give --merge the same --directions as the parts")
    if unscored := [str(direction) for direction in chosen if direction not in scores]:
        raise UserError(f"no part of {home} scores {', '.join(unscored)}: give --merge the same --directions as the parts")
    merged = replace(first, directions=tuple(scores[direction] for direction in chosen))
    merged.write(home / "scores.json")
    return merged


def _by_direction(tables: dict[Part, ScoreTable]) -> dict[Direction, DirectionScore]:
    found: dict[Direction, DirectionScore] = {}
    by: dict[Direction, Part] = {}
    for part, table in tables.items():
        for score in table.directions:
            if score.direction in by:
                raise UserError(
                    f"{score.direction} is scored by part {by[score.direction]} and by part {part}: give all parts the same --directions"
                )
            found[score.direction], by[score.direction] = score, part
    return found


def _home(run: Path) -> Path:
    """The folder that scores of a run, a checkpoint in it or a converted folder are written to; the checkpoint may be gone since."""
    checkpoints = run.resolve().parent
    return checkpoints.parent if checkpoints.name == "checkpoints" and not (run / RECIPE).is_file() else run

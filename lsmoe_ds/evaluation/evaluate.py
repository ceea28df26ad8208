"""Scores a model on the held-out text, and writes down which experts each task uses."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lsmoe_ds.analysis.measuring import measure_routing
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.groups import resource_groups
from lsmoe_ds.evaluation.parts import choose_directions, part_file
from lsmoe_ds.evaluation.scores import DirectionScore, ScoreTable, score_direction
from lsmoe_ds.folders import explain_errors, write_whole
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import Engine, load_engine
from lsmoe_ds.inference.load import Loaded
from lsmoe_ds.inference.translate import translate_all
from lsmoe_ds.part import Part

SPLITS = ("test", "dev")


def evaluate(
    run: str | Path,
    directions: Sequence[str] | None = None,
    beam: int = 5,
    length_penalty: float = 1.0,
    split: str = "test",
    limit: int | None = None,
    progress: bool = True,
    route: str = "specific",
    part: Part | None = None,
) -> ScoreTable:
    """Translates the held-out text of every direction and scores it; writes ``scores.json`` and, for a model with
    experts, ``routing.json`` beside its recipe.

    ``run`` is a run folder, a checkpoint in it or a converted folder; ``limit`` takes the first so many sentences of each
    direction; ``route`` "shared" goes by the matrices that all languages share. Of a ``part`` of the directions the scores go
    where :mod:`lsmoe_ds.evaluation.parts` finds them, and the first part writes ``routing.json``. Raises UserError for directions or
    a route that the model lacks, and for prepared data that is not the run's.
    """
    if split not in SPLITS:
        raise UserError(f"'{split}' is no held-out text: choose {' or '.join(SPLITS)}")
    search = Search(beam, length_penalty)
    loaded = load_engine(run, route)
    chosen = choose_directions(directions, loaded.languages)
    chosen = part.of(chosen) if part else chosen
    data = open_data(loaded)
    texts = {direction: [side[:limit] for side in data.text(direction, split)] for direction in chosen}
    scores: list[DirectionScore] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task("translating", total=sum(len(source) for source, _ in texts.values()), rate="")
        began, translated = time.perf_counter(), 0

        def advance(count: int) -> None:
            nonlocal translated
            translated += count
            bar.update(task, advance=count, rate=f"{translated / (time.perf_counter() - began):.0f} sentences/s")

        for direction, (sources, references) in texts.items():
            bar.update(task, description=f"translating {direction}")
            start = time.perf_counter()
            hypotheses = translate_all(loaded, direction, sources, search, advance=advance)
            scores.append(score_direction(direction, sources, hypotheses, references, time.perf_counter() - start))
    pairs = {bitext: splits["train"]["pairs"] for bitext, splits in data.manifest["bitexts"].items()}
    resources = resource_groups(pairs, loaded.recipe.data.groups)
    table = ScoreTable(loaded.recipe.name, loaded.step, split, beam, length_penalty, tuple(scores), resources, loaded.route, limit)
    path = part_file(loaded.home, part) if part else loaded.home / "scores.json"
    with explain_errors(path):
        path.parent.mkdir(exist_ok=True)
    table.write(path)
    first = part is None or part.number == 1
    if first and isinstance(loaded, Loaded) and any(loaded.recipe.model.moe_layers()):
        write_whole(loaded.home / "routing.json", json.dumps(measure_routing(loaded, data, split).to_dict()) + "\n")
    return table


def open_data(loaded: Engine) -> PreparedData:
    """Open the prepared data of a model. Raises UserError if they were prepared anew since it was trained."""
    return PreparedData.of(loaded.recipe, loaded.home)

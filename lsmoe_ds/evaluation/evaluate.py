"""Score a model on text, keep every translation, and record which experts each task uses."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lsmoe_ds.analysis.measuring import measure_routing
from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.stored import Stored, find_model
from lsmoe_ds.data.prepared import PreparedData, open_data
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.comet import Comet
from lsmoe_ds.evaluation.direction_scores import DirectionScore, score_direction
from lsmoe_ds.evaluation.groups import resource_groups
from lsmoe_ds.evaluation.labelled import readable, score_language
from lsmoe_ds.evaluation.metrics import Tokenizer
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.parts import check_held_out, choose_directions
from lsmoe_ds.evaluation.score_folder import ScoreFolder
from lsmoe_ds.evaluation.scores import BEAM, PENALTY, ScoreTable
from lsmoe_ds.evaluation.texts import Texts, check_split, read_held_out, read_own, tell_skipped
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import Engine, say_untrained
from lsmoe_ds.inference.label import Labeller, label_all
from lsmoe_ds.inference.load import Loaded, check_direction, check_route, with_direction
from lsmoe_ds.inference.translate import translate_all
from lsmoe_ds.notices import LINE_EVERY


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
    test: Sequence[str] = (),
    tokenize: str | None = None,
    out: str | Path | None = None,
    comet: str | Path | None = None,
    held_out: PreparedData | None = None,
    average: Averaging = 1,
) -> ScoreTable:
    """Translate (or label, if that is the model's task) and score the held-out text, or the user's own
    ``test`` set, in every direction or language.

    Scores and text are written as described in :mod:`lsmoe_ds.evaluation.score_folder`, to ``out`` or else to
    the run folder. ``run`` is a run folder, a checkpoint in it or a converted folder. ``limit`` scores only
    the first sentences of each direction. ``route`` "shared" uses only parameters that all languages share.
    ``average`` chooses the weights of a run. ``tokenize`` chooses BLEU's tokenizer. ``held_out`` is read
    instead of the run's prepared data. With a ``part``, only this share of the directions is scored; part 1
    measures the routing. Directions without sentences are named on standard error and skipped.

    Everything is checked before the first translation. Raises UserError for directions, a route, a text, a
    tokenizer or a COMET checkpoint that do not exist, for prepared data that are not the run's, and if scores
    cannot be written.
    """
    search, tokenizer = (
        Search(beam, length_penalty),
        Tokenizer.parse(tokenize) if tokenize is not None else None,
    )
    check_split(split)
    stored = find_model(run)
    check_route(route, stored.recipe)
    languages = stored.recipe.trained
    asked = choose_directions(directions, stored.recipe.languages, untrained=True, default=languages)
    if (task := stored.recipe.model.task) != "translate":
        options = {"--test": bool(test), "--tokenize": tokenize is not None, "--comet": comet is not None}
        options |= {"--beam": beam != BEAM, "--length-penalty": length_penalty != PENALTY}
        for option, given in options.items():
            if given:
                raise UserError(f"{option} is for translations, but the task of the model is to {task}")
    for direction in asked:
        if test:
            with_direction(stored.recipe, stored.kind, direction)
        elif direction not in stored.recipe.languages.directions:
            check_direction(stored.recipe, stored.kind, direction)  # raises if the model cannot translate it
            check_held_out([direction], stored.recipe.languages)
    data = None if test else held_out or open_data(stored)
    whole = read_held_out(data, split, asked) if data else read_own(test, split, asked)
    folder = ScoreFolder(Path(out) if out is not None else stored.home)
    folder.check()
    if folder.home.resolve() != stored.home.resolve():
        folder.claim(stored.home)
    judge = Comet.open(comet) if comet is not None else None
    tell_skipped(whole)
    loaded = load_engine(run, route, average=average)
    untrained = [direction for direction in whole.by_direction if direction not in languages]
    if untrained and loaded.step:  # nothing is known about the training of an imported model
        say_untrained(untrained)
    resources, groups = _groups(stored, data)
    table = ScoreTable(
        loaded.recipe.name,
        loaded.step,
        whole.split,
        beam,
        length_penalty,
        (),
        resources,
        loaded.route,
        limit,
        tokenizer.name if tokenizer else None,
        None if set(asked) == set(languages) else tuple(asked),
        whole.skipped,
        judge.name if judge else None,
        groups,
        loaded.recipe.model.task,
        average,
    )
    texts = _deal(whole, part).first(limit)
    table = replace(
        table,
        directions=tuple(_score(loaded, texts, search, tokenizer, judge, folder, table.question, progress)),
    )
    if part:
        table.write(folder.part(table.question, part))
    else:
        folder.write(table, languages)
    _tell_place(folder, table, part, data)
    if (
        data
        and (part is None or part.number == 1)
        and isinstance(loaded, Loaded)
        and any(loaded.recipe.model.moe_layers())
    ):
        folder.write_routing(table, measure_routing(loaded, data, split).to_dict())
    return table


def _deal(texts: Texts, part: Part | None) -> Texts:
    """Keep the part's share of the directions that have text."""
    if part is None:
        return texts
    return replace(
        texts,
        by_direction={
            direction: texts.by_direction[direction] for direction in part.of(list(texts.by_direction))
        },
    )


def _score(
    loaded: Engine,
    texts: Texts,
    search: Search,
    tokenizer: Tokenizer | None,
    judge: Comet | None,
    folder: ScoreFolder,
    question: str,
    progress: bool,
) -> list[DirectionScore]:
    """Translate and score each direction.

    The text of a direction is written as soon as it is translated, so that a killed job loses little.
    """
    scores: list[DirectionScore] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    shown = progress and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        alone = any(direction.alone for direction in texts.by_direction)
        bars = bar.add_task("labelling" if alone else "translating", total=texts.sentences, rate="")
        began, translated = time.perf_counter(), 0
        said = began

        def advance(count: int) -> None:
            nonlocal translated, said
            translated += count
            now = time.perf_counter()
            rate = f"{translated / (now - began):.0f} sentences/s"
            bar.update(bars, advance=count, rate=rate)
            if progress and not shown and now - said >= LINE_EVERY:
                said = now
                print(
                    f"{'labelled' if alone else 'translated'} {translated:,} of {texts.sentences:,} "
                    f"sentences · {rate}",
                    file=sys.stderr,
                    flush=True,
                )

        folder.make(question)
        for direction, (sources, references) in texts.by_direction.items():
            doing = "labelling" if alone else "translating"
            bar.update(bars, description=f"{doing} {direction.label}")
            start = time.perf_counter()
            if (task := loaded.recipe.model.task) != "translate":
                assert isinstance(loaded, Labeller)
                hypotheses = label_all(loaded, direction, sources, advance)
                seconds = time.perf_counter() - start
                sources, references = readable(task, sources, references)
                folder.write_text(question, direction, sources, hypotheses, references)
                scores.append(score_language(task, direction, sources, hypotheses, references, seconds))
                continue
            hypotheses = translate_all(loaded, direction, sources, search, advance=advance)
            seconds = time.perf_counter() - start
            folder.write_text(question, direction, sources, hypotheses, references)
            score = score_direction(direction, sources, hypotheses, references, seconds, tokenizer=tokenizer)
            scores.append(judge.add(score, sources, hypotheses, references) if judge else score)
    return scores


def _groups(stored: Stored, data: PreparedData | None) -> tuple[dict[str, str], dict[str, str]]:
    """Find the resource groups of the bitexts and of the languages.

    Without prepared data, which the user's own set does not need, only groups that the recipe lists are
    known.
    """
    recipe = stored.recipe
    if recipe.model.task != "translate":
        return {}, dict(recipe.languages.groups)
    if data is None:
        with suppress(UserError):
            data = open_data(stored)
    if data is None:
        listed = dict(recipe.languages.groups)
        bitexts = [direction.bitext for direction in recipe.languages.directions] if listed else []
        return resource_groups(dict.fromkeys(bitexts, 0), recipe.data.groups), listed
    pairs = {bitext: splits["train"]["pairs"] for bitext, splits in data.manifest["bitexts"].items()}
    return resource_groups(pairs, recipe.data.groups), data.language_groups()


def _tell_place(folder: ScoreFolder, table: ScoreTable, part: Part | None, data: PreparedData | None) -> None:
    """Print on standard error where the scores and the text are, and which held-out set was scored."""
    path = folder.part(table.question, part) if part else folder.record(table.question)
    held_out = f", {table.split} set of {data.folder}" if data else ""
    print(
        f"lsmoe: scores in {path}, text in {folder.folder(table.question)}{held_out}",
        file=sys.stderr,
        flush=True,
    )

"""``lsmoe study``: train and evaluate the members of a study one by one, and keep the tables up to date.

``OUT/MEMBER-seedN/`` are run folders, which also hold ``scores-ROUTE.json``; ``OUT/recipes/`` holds the whole
recipe of each run; ``OUT/study.json``, ``study.md``, ``study.html`` and its picture ``study.svg`` are
rewritten after each member. Several processes may work on one study if each takes its own part.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lsmoe_ds.analysis.heat_map import as_file
from lsmoe_ds.checkpoint.run_folder import check_run, has_ended, list_checkpoints, newest_whole, step_of
from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.config.layout import check_layout
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepared import MANIFEST, PreparedData
from lsmoe_ds.directions import Direction
from lsmoe_ds.distill.command import Distillation, complete, make_parts
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.export.translations import How
from lsmoe_ds.folders import explain_errors, locked, write_whole
from lsmoe_ds.inference.load import check_route
from lsmoe_ds.languages import nearest
from lsmoe_ds.launch import processes as launch
from lsmoe_ds.launch.processes import smallest_world
from lsmoe_ds.notices import counted
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.report.progress import Progress, read_progress
from lsmoe_ds.study.comparing import compare
from lsmoe_ds.study.page import draw_picture, render_page
from lsmoe_ds.study.settings import Study, load_study
from lsmoe_ds.study.table import Comparison, Costs, Spread
from lsmoe_ds.training.engine import check_precision

T = TypeVar("T", str, int)
# Not passed on to training: its processes belong together, whatever launcher started this one.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def run_study(
    file: str | Path,
    out: Path | None = None,
    members: Sequence[str] = (),
    seeds: Sequence[int] = (),
    processes: int | None = None,
    part: Part | None = None,
) -> Comparison:
    """Train and evaluate what is missing, and return the comparison of the whole study.

    ``members`` and ``seeds`` default to all; ``part`` takes a share of their pairs. Raises UserError for a
    bad study and, before the first training, for runs that cannot be trained. Also raises UserError if a
    training fails; finished runs are kept.
    """
    study = load_study(file)
    chosen_members = _choose(members, list(study.settings.members), "member")
    chosen_seeds = _choose(seeds, study.settings.seeds, "seed")
    pairs = [
        (member, seed)
        for seed in chosen_seeds
        for member in chosen_members
        if seed in study.settings.seeds_of(member)
    ]
    pairs = part.of(pairs) if part else pairs
    runs = Runs(study, out or Path("runs") / study.settings.name)
    for member, seed in pairs:
        runs.check(member, seed, processes)
    runs.compare()  # rejects runs of another study before the first training, not after it
    for member, seed in pairs:
        runs.train(member, seed, processes)
        for route in study.settings.members[member].routes:
            runs.evaluate(member, seed, route)
        runs.write_tables()
    return runs.compare()


def _choose(asked: Sequence[T], known: Sequence[T], kind: str) -> list[T]:
    for one in asked:
        if one not in known:
            guess = nearest(one, map(str, known)) if isinstance(one, str) else ""
            raise UserError(f"{kind} {one} is not in the study{guess}: it has {', '.join(map(str, known))}")
    return [one for one in known if one in asked or not asked]


class Runs:
    """The folder of a study."""

    def __init__(self, study: Study, out: Path) -> None:
        if not (study.prepared / MANIFEST).is_file():
            raise UserError(
                f"there is no prepared data in {study.prepared}: run 'lsmoe data prepare {study.base}'"
            )
        self.study, self.out, self.prepared = (
            study,
            out,
            PreparedData.of(study.recipes[study.settings.baseline]),
        )
        self.plans = {member: plan(recipe) for member, recipe in study.recipes.items()}

    def folder(self, member: str, seed: int, alone: Direction | None = None) -> Path:
        """Return the run folder of a member; the model of a direction ``alone`` has a subfolder of it.

        A member that is not trained has one folder for all seeds.
        """
        whole = self.out / (f"{member}-seed{seed}" if self.is_to_train(member) else member)
        return whole if alone is None else whole / str(alone)

    def recipe(self, member: str, seed: int, alone: Direction | None = None) -> Recipe:
        """Return the whole recipe of one run; a student's recipe includes its teacher."""
        recipe = self.study.recipe(member, seed, alone)
        if (asked := self._distillation(member)) is None:
            return recipe
        teacher, student = self._teacher(member, seed), self.folder(member, seed, alone)
        name = "-".join((self.study.settings.name, *student.relative_to(self.out).parts))
        return complete(recipe, asked, teacher, teacher / "vocabulary.model", student, name)

    def _vocabulary(self, member: str, recipe: Recipe) -> Path:
        """Return the vocabulary in the prepared data of a run; a student has its own data."""
        of_student = self._distillation(member) is not None
        return (recipe.prepared if of_student else self.prepared.folder) / "vocabulary.model"

    def _distillation(self, member: str) -> Distillation | None:
        told = self.study.settings.members[member].distill
        if told is None:
            return None
        return Distillation(told.level, told.experts, told.limit, How(told.beam))

    def _teacher(self, member: str, seed: int) -> Path:
        """Return the folder of the model that a student learns from."""
        told = self.study.settings.members[member].distill
        assert told is not None
        folder = self.folder(told.of, seed)
        return folder if self.is_to_train(told.of) else _start_of(self.study.recipe(told.of, seed))

    def models(self, member: str) -> list[Direction | None]:
        """List the directions with training text for which a member has its own model; None means all."""
        bitexts = self.prepared.manifest["bitexts"]
        return [
            alone
            for alone in self.study.models(member)
            if alone is None or bitexts[alone.bitext]["train"]["pairs"]
        ]

    def _is_scored(self, direction: Direction) -> bool:
        """Tell whether a direction has text to score."""
        return bool(self.prepared.lines(direction, self.study.settings.evaluate.split))

    def is_to_train(self, member: str) -> bool:
        return self.study.settings.members[member].trained

    def check(self, member: str, seed: int, processes: int | None) -> None:
        """Raise UserError for anything that training or evaluation would reject later."""
        recipe = self.recipe(member, seed)
        if not self.is_to_train(member):
            find_model(_start_of(recipe))
            return
        world = processes or smallest_world(recipe)
        try:
            for route in self.study.settings.members[member].routes:
                check_route(route, recipe)
            check_layout(recipe, world)
            check_precision(recipe)
        except UserError as error:
            raise UserError(f"member '{member}': {error}") from None
        for alone in self.models(member):
            own, folder = self.recipe(member, seed, alone), self.folder(member, seed, alone)
            check_run(own, folder, self._vocabulary(member, own))
            self.is_trained(member, seed, alone)

    def is_there(self, member: str, seed: int, alone: Direction | None = None) -> bool:
        """Tell whether a run was started. Raises UserError if it belongs to another recipe."""
        folder = self.folder(member, seed, alone)
        if not (folder / "recipe.yaml").exists():  # the last file that a new run writes
            return False
        recipe = self.recipe(member, seed, alone)
        check_run(recipe, folder, self._vocabulary(member, recipe))
        return True

    def steps(self, member: str) -> int:
        """Return the steps of each training of a member."""
        return self.study.settings.members[member].each_direction or self.study.steps

    def is_trained(self, member: str, seed: int, alone: Direction | None = None) -> bool:
        folder, steps = self.folder(member, seed, alone), self.steps(member)
        found, _ = newest_whole(folder)
        if found is not None and step_of(found) > steps:
            trained = counted(step_of(found), "step")
            raise UserError(
                f"{folder} was trained for {trained}, the study takes {steps:,}: write to another folder with"
                " --out"
            )
        return found is not None and has_ended(found, steps, self._patience(member))

    def _patience(self, member: str) -> int | None:
        stopping = self.study.recipes[member].training.early_stopping
        return None if stopping is None else stopping.patience

    def last_step(self, member: str, seed: int, alone: Direction | None = None) -> int:
        """Return the step with which a training ends: the last one, or the one at which it stopped early."""
        steps, patience = self.steps(member), self._patience(member)
        found = [] if patience is None else list_checkpoints(self.folder(member, seed, alone))
        return step_of(found[-1]) if found and has_ended(found[-1], steps, patience) else steps

    def train(self, member: str, seed: int, processes: int | None) -> None:
        """Train what is missing of a member, after training its teacher."""
        if (told := self.study.settings.members[member].distill) is not None:
            self.train(told.of, seed, processes)
        if self.is_to_train(member):
            for alone in self.models(member):
                self._train(member, seed, alone, processes)

    def _train(self, member: str, seed: int, alone: Direction | None, processes: int | None) -> None:
        """Train in separate processes, so that their memory and process groups end with them."""
        name, folder = _name(member, seed, alone), self.folder(member, seed, alone)
        if self.is_trained(member, seed, alone):
            return _say(f"{name}: trained already")
        if (asked := self._distillation(member)) is not None:
            _say(f"{name}: taught by {self._teacher(member, seed)}")
            before, made = self.study.recipe(member, seed, alone), self.recipe(member, seed, alone)
            make_parts(before, made, asked, self._teacher(member, seed), folder)
        _say(f"{name}: training {folder}")
        recipe = self.out / "recipes" / f"{'-'.join(folder.relative_to(self.out).parts)}.yaml"
        with explain_errors(recipe):
            recipe.parent.mkdir(parents=True, exist_ok=True)
        write_whole(recipe, self.recipe(member, seed, alone).to_yaml())
        command = [sys.executable, "-m", "lsmoe_ds", "train", str(recipe), "--out", str(folder)]
        command += ["--nproc", str(processes)] if processes else []
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
        status = launch.run(command, env=environment, stdout=2)  # standard output is for the table
        if status or not self.is_trained(member, seed, alone):
            raise UserError(
                f"training {name} ended with status {status}; what was done is in {self.out}, and the same "
                "command resumes"
            )

    def evaluate(self, member: str, seed: int, route: str) -> None:
        """Score what is missing of a member."""
        for alone in self.models(member):
            if alone is None or self._is_scored(alone):
                self._evaluate(member, seed, alone, route)

    def _evaluate(self, member: str, seed: int, alone: Direction | None, route: str) -> None:
        name, options = f"{_name(member, seed, alone)}, {route} route", self.study.settings.evaluate
        if self._scores(member, seed, alone, route) is not None:
            return _say(f"{name}: evaluated already")
        _say(f"{name}: evaluating")
        folder = self.folder(member, seed, alone)
        of_base = not self.is_to_train(member)
        table = evaluate(
            _start_of(self.recipe(member, seed)) if of_base else folder,
            [str(d) for d in self.study.scored(member) if alone in (None, d)],
            options.beam,
            options.length_penalty,
            options.split,
            options.limit,
            route=route,
            out=folder if of_base else None,
            held_out=self.prepared if of_base else None,
        )
        table.write(folder / f"scores-{route}.json")

    def scores(self, member: str, seed: int, route: str) -> ScoreTable | None:
        """Return the scores of all models of a member, at their last step and with the study's options.

        None if some are missing. Raises UserError if a run belongs to another recipe.
        """
        scored = [alone for alone in self.models(member) if alone is None or self._is_scored(alone)]
        tables = [self._scores(member, seed, alone, route) for alone in scored]
        found = [table for table in tables if table is not None]
        if len(found) < len(tables) or not found:
            return None
        return replace(found[0], directions=tuple(score for table in found for score in table.directions))

    def _scores(self, member: str, seed: int, alone: Direction | None, route: str) -> ScoreTable | None:
        folder, options = self.folder(member, seed, alone), self.study.settings.evaluate
        path = folder / f"scores-{route}.json"
        if not path.is_file() or (self.is_to_train(member) and not self.is_there(member, seed, alone)):
            return None
        table = ScoreTable.read(path)
        step = self.last_step(member, seed, alone) if self.is_to_train(member) else table.step
        found, wanted = (table.step, table.route, table.split), (step, route, options.split)
        search = (table.beam, table.length_penalty) == (options.beam, options.length_penalty)
        held_out = {
            str(d): self.prepared.lines(d, options.split)
            for d in self.study.scored(member)
            if alone in (None, d)
        }
        counts = {
            direction: min(count, options.limit or count) for direction, count in held_out.items() if count
        }
        return (
            table
            if found == wanted
            and (search or not table.translates)
            and counts == {str(s.direction): s.sentences for s in table.directions}
            else None
        )

    def costs(self, member: str, route: str) -> Costs:
        """Return the planned parameters, and the speed and time of the runs that are fully trained."""
        planned, models = self.plans[member], self.models(member)
        serving = planned.routes.get(route, planned.routes.get("specific", planned.parameters))
        minutes, speeds = [], []
        for seed in self.study.settings.seeds_of(member):
            of_seed = {alone: self._progress(member, seed, alone) for alone in models}
            finished = [
                each for alone, each in of_seed.items() if each.steps >= self.last_step(member, seed, alone)
            ]
            if len(finished) == len(models):
                minutes.append(sum(each.seconds for each in finished) / 60)
            known = [each.tokens_per_second for each in finished if each.tokens_per_second is not None]
            if known:
                speeds.append(sum(known) / len(known))
        return Costs(
            parameters=planned.trained * len(models) if self.is_to_train(member) else 0,
            serving_all=serving.whole.total * len(models),
            serving_one=planned.serving.whole.total,
            tokens_per_second=Spread.of(speeds),
            minutes=Spread.of(minutes),
            serving_at_most=planned.serving_at_most,
        )

    def _progress(self, member: str, seed: int, alone: Direction | None) -> Progress:
        path = self.folder(member, seed, alone) / "metrics.jsonl"
        there = self.is_to_train(member) and self.is_there(member, seed, alone) and path.is_file()
        return read_progress(path) if there else Progress()

    def compare(self) -> Comparison:
        """Compare the scores that exist."""
        study, settings = self.study, self.study.settings
        scores = {}
        for member, route in study.rows():
            found = {seed: self.scores(member, seed, route) for seed in settings.seeds_of(member)}
            scores[member, route] = {seed: table for seed, table in found.items() if table is not None}
        return compare(
            name=settings.name,
            steps=study.steps,
            stops_early=any(self._patience(member) is not None for member in study.recipes),
            seeds=settings.seeds,
            wanted={member: settings.seeds_of(member) for member in settings.members},
            evaluate=settings.evaluate.model_dump(),
            baseline=(settings.baseline, settings.members[settings.baseline].routes[0]),
            titles={row: study.title(*row) for row in study.rows()},
            costs={row: self.costs(*row) for row in study.rows()},
            scores=scores,
            task=study.recipes[settings.baseline].model.task,
            teachers={
                name: (member.distill.of, settings.members[member.distill.of].routes[0])
                for name, member in settings.members.items()
                if member.distill is not None
            },
        )

    def write_tables(self) -> None:
        """Write the tables.

        A lock covers reading and writing: if two processes finish at once, the later one includes the other's
        scores.
        """
        with locked(self.out / "study.json", wait=True):
            comparison = self.compare()
            write_whole(
                self.out / "study.json", json.dumps(comparison.to_dict(), ensure_ascii=False, indent=1) + "\n"
            )
            write_whole(self.out / "study.md", comparison.to_markdown())
            write_whole(self.out / "study.html", render_page(comparison))
            if (picture := draw_picture(comparison)) is not None:
                write_whole(self.out / "study.svg", as_file(picture))


def _start_of(recipe: Recipe) -> Path:
    """Return the folder ``training.start_from`` of a member that is not trained."""
    assert recipe.training.start_from is not None  # checked when the study was read
    return recipe.training.start_from


def _name(member: str, seed: int, alone: Direction | None) -> str:
    return f"{member}, seed {seed}" + (f", {alone}" if alone else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

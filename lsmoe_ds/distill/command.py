"""``lsmoe distill``: make everything that a student needs from its teacher before training.

It writes beside the student's run folder ``OUT``

- ``OUT-corpus/``: the teacher's translations of its training sources (:mod:`lsmoe_ds.export.translations`),
- ``OUT-start/``: the student's first weights (:mod:`lsmoe_ds.distill.start`),
- ``OUT-recipe.yaml``: the student's recipe, which names them.

Parts that already exist, from the same teacher and settings, are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from pydantic import ValidationError

from lsmoe_ds.checkpoint.run_folder import choose_run, find_changes
from lsmoe_ds.checkpoint.stored import (
    PROVENANCE,
    READABLE,
    Stored,
    Weights,
    find_model,
    read_weights,
    write_folder,
)
from lsmoe_ds.config.explain import explain
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.notices import CHOOSE
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.sources import PROVENANCE as CORPUS_PROVENANCE
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.distill.start import first_weights
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.kept_experts import SAID, One
from lsmoe_ds.export.translations import Asked, How, settings_of, translate_corpus
from lsmoe_ds.folders import check_can_write, damage, explain_errors, locked, read_json, resolved, write_whole
from lsmoe_ds.inference.load import check_direction
from lsmoe_ds.notices import notice

Level = Literal["sequence", "word", "both"]
LEVELS: tuple[Level, ...] = ("sequence", "word", "both")
WRITTEN = "# Written by lsmoe distill.\n"
DIGEST = "distilled_from"  # in the provenance of the first weights
SHOWN = 60  # characters of a setting's value in an error


@dataclass(frozen=True)
class Distillation:
    """How a student learns: the ``level``, the teacher's expert with which its feed-forwards start, the
    number of lines translated in each direction, and how they are translated.
    """

    level: Level = "sequence"
    experts: One = "mean"
    limit: int | None = None
    how: How = field(default_factory=How)

    @classmethod
    def parse(cls, level: str, experts: str, limit: int | None, how: How) -> Distillation:
        """Read the options of the command. Raises UserError for an unknown level or choice of experts."""
        for option, given, known in (("--level", level, LEVELS), ("--experts", experts, tuple(SAID))):
            if given not in known:
                raise UserError(f"{option} is {given!r}: choose {', '.join(known[:-1])} or {known[-1]}")
        return cls(level, experts, limit, how)  # type: ignore[arg-type]


def distill(
    run: Path,
    into: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    asked: Distillation | None = None,
    workers: int | None = None,
) -> tuple[Path, Path]:
    """Make everything that the student of the recipe ``into`` needs (:func:`make_parts`); return its complete
    recipe and its run folder.

    Raises UserError, before anything is written, if the teacher lacks one of the student's directions.
    """
    asked = asked or Distillation()
    teacher = find_model(run)
    recipe = _load(into, overrides, teacher)
    student = choose_run(into, recipe, out)
    if resolved(student) in (resolved(teacher.home), resolved(into).parent):
        raise UserError(
            f"the student would be written to {student}, which is another model's: give it a folder with "
            "--out, or another name with --set name=student"
        )
    own = recipe.training.teacher
    if asked.level != "sequence" and own is not None and resolved(own.model) != resolved(run):
        raise UserError(
            f"'training.teacher.model' of {into} is {own.model}, but the teacher given is {run}: leave one "
            "out, or distill by --level sequence, which keeps both"
        )
    made = complete(recipe, asked, run, teacher.vocabulary, student, student.name)
    if resolved(made.prepared) == resolved(teacher.recipe.prepared):
        raise UserError(
            f"the student's data would be prepared to {made.prepared}, which are its teacher's: give it "
            "another name with --out"
        )
    file = _beside(student, "recipe.yaml")
    if file.exists() and not file.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN):
        raise UserError(f"{file} was not written by `lsmoe distill`: choose another folder with --out")
    check_can_write(student.absolute().parent, "choose another folder with --out")
    make_parts(recipe, made, asked, run, student, workers)
    with explain_errors(file):
        write_whole(file, f"{WRITTEN}{made.to_yaml()}")
    return file, student


def complete(
    recipe: Recipe, asked: Distillation, run: Path, vocabulary: Path, student: Path, name: str
) -> Recipe:
    """Return the recipe of the run ``student``, completed with the settings for learning from the teacher
    ``run``.

    Both have the same ``vocabulary``. ``name`` names the student's prepared data, which are not the
    teacher's. Raises UserError if the recipe and these settings contradict each other.
    """
    value: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
    data, training = value["data"], value["training"]
    data["name"], data["vocabulary"]["file"] = name, str(vocabulary)
    if asked.level != "word":
        data["train_on"] = "translated"
        translated = {"path": str(_beside(student, "corpus")), "format": "translated"}
        data["corpora"] = [*data["corpora"], translated]
    if asked.level != "sequence":
        training["teacher"] = {**training.get("teacher", {}), "model": str(run)}
    training.setdefault("start_from", str(_beside(student, "start")))
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise UserError(explain(error, Recipe, value, Path("the student's complete recipe"), {})) from None


def make_parts(
    recipe: Recipe, made: Recipe, asked: Distillation, run: Path, student: Path, workers: int | None = None
) -> None:
    """Translate, write the first weights, and prepare the data of a student; ``made`` is its ``recipe``,
    completed.

    Raises UserError, before anything is changed, if the student has begun to train with other settings, and
    if all translations are empty.
    """
    teacher, corpus = find_model(run), _beside(student, "corpus")
    _check_begun(teacher, recipe, made, asked, student)
    if asked.level != "word":
        notice(f"translating what {teacher.recipe.name} was trained on to {corpus}")
        done = translate_corpus(run, corpus, _asked(recipe, asked), asked.how, workers)
        if not any(done["pairs"].values()):
            raise UserError(
                f"all translations of {teacher.recipe.name} are empty, so that nothing can be learned from "
                "them: train it longer"
            )
    if recipe.training.start_from is None:
        # A process that helps to translate gets here at the same time, but only one may write.
        with locked(_beside(student, "start.making"), wait=True):
            _write_start(teacher, recipe, made, _beside(student, "start"), asked)
    prepare(made, processes=workers or None)


def _asked(recipe: Recipe, asked: Distillation) -> Asked:
    """Return the text for the teacher to translate: training sources of the student's directions."""
    return Asked(tuple(recipe.trained), limit=asked.limit)


def _check_begun(teacher: Stored, recipe: Recipe, made: Recipe, asked: Distillation, student: Path) -> None:
    """Raise UserError if a student that has begun to train did so with other settings than these."""
    stored = student / "recipe.yaml"
    if not stored.is_file():
        return
    advice = "set it back, or write to another folder with --out"
    begun = load_recipe(stored)
    if (level := _level(begun)) != _level(made):
        raise UserError(f"the student {student} was started with --level {level}: {advice}")
    for key, before, now in find_changes(begun, made):
        was, is_now = (shorten(str(value), SHOWN, placeholder=" ...") for value in (before, now))
        raise UserError(f"the student {student} was started with {key} {was}, it is now {is_now}: {advice}")
    weights = read_weights(teacher, asked.how.average)
    known = (read_json(_beside(student, "corpus") / CORPUS_PROVENANCE) or {}).get("settings")
    if asked.level != "word" and known is not None:
        wanted = json.loads(json.dumps(settings_of(teacher, weights, _asked(recipe, asked), asked.how)))
        for key in sorted(wanted):
            if known.get(key) != wanted[key]:
                what = f"{key} {known.get(key)}"
                if key == "model":
                    before = known.get(key) or {}
                    same = before.get("name") == wanted[key]["name"]
                    what = f"another {'step of its ' if same else ''}teacher"
                raise UserError(
                    f"the student {student} was started on translations with {what}, not those that are "
                    f"asked for now: {advice}"
                )
    if recipe.training.start_from is None:
        noted = (read_json(_beside(student, "start") / PROVENANCE) or {}).get(DIGEST)
        if noted not in (None, _digest(weights, recipe, asked)):
            raise UserError(
                f"the student {student} was started with other first weights (--experts, --average, or "
                f"another step of its teacher): {advice}"
            )


def _level(recipe: Recipe) -> str:
    """Return the ``--level`` for which a student's complete recipe was made."""
    if recipe.data.train_on is None:
        return "word"
    return "sequence" if recipe.training.teacher is None else "both"


def _digest(weights: Weights, recipe: Recipe, asked: Distillation) -> str:
    """Return a checksum of everything on which a student's first weights depend."""
    settings = [
        *(weights.files, asked.how.average, asked.experts, recipe.training.seed),
        *(recipe.model.model_dump(mode="json"), list(map(str, recipe.trained))),
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _beside(student: Path, part: str) -> Path:
    """Return the path of a part beside the student's run folder."""
    return student.with_name(f"{student.name}-{part}")


def _load(into: Path, overrides: Sequence[str], teacher: Stored) -> Recipe:
    """Load the student's recipe with the vocabulary and the tags of its teacher. Raises UserError unless the
    teacher translates in all directions that the student is trained on.
    """
    if teacher.kind not in READABLE or teacher.recipe.model.huggingface is not None:
        raise UserError(
            f"{teacher.home} cannot be a teacher: give a run, or a folder made with --as consolidated"
        )
    vocabulary = Vocabulary.load(teacher.vocabulary)
    theirs = {"file": teacher.vocabulary, "size": vocabulary.size, "type": vocabulary.type}
    own = [f"data.vocabulary.{key}={value}" for key, value in theirs.items()]
    recipe = load_recipe(into, [*overrides, *own, f"data.tags={teacher.recipe.data.tags}"])
    if recipe.model.huggingface is not None:
        raise UserError(f"the model of {into} has a vocabulary of its own, in which no teacher speaks")
    for direction in recipe.trained:
        check_direction(teacher.recipe, teacher.kind, direction)
    return recipe


def _write_start(teacher: Stored, recipe: Recipe, made: Recipe, start: Path, asked: Distillation) -> None:
    """Write the student's first weights, unless they exist."""
    average, whole = asked.how.average, read_weights(teacher, asked.how.average)
    size = Vocabulary.load(teacher.vocabulary).size
    digest = _digest(whole, recipe, asked)
    known = read_json(start / PROVENANCE) or {}
    if known.get(DIGEST) == digest:
        if (wrong := damage(start, known.get("files"), verify=True)) is None:
            return notice(f"the first weights are in {start} already")
        notice(f"{wrong}: the first weights are written again")
    weights, said = first_weights(teacher, whole, recipe, size, asked.experts, average)
    provenance = {"kind": "consolidated", **said, DIGEST: digest}
    write_folder(start, weights, _of_start(teacher, recipe, made), teacher.vocabulary, provenance)
    notice(f"{start}: {said['approximates']}")


def _of_start(teacher: Stored, recipe: Recipe, made: Recipe) -> Recipe:
    """Return the recipe of the first weights.

    It keeps the settings that chose the teacher's held-out sentences, so that preparing the data can warn if
    the student's are different.
    """
    data = {key: getattr(teacher.recipe.data, key) for key in CHOOSE if key != "directions"}
    translated = [each for each in made.data.corpora if each not in recipe.data.corpora]
    data["corpora"] = [*data["corpora"], *translated]
    training = recipe.training.model_copy(update={"teacher": None, "directions": None})
    return recipe.model_copy(update={"training": training, "data": recipe.data.model_copy(update=data)})

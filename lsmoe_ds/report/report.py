"""The report of a run: one self-contained HTML page from the files of the run folder.

It reads ``recipe.yaml`` (required), ``metrics.jsonl``, the fullest scores that exist, ``routing.json``,
``conversions/*.json``, ``timings.json`` and the provenance of the fetched corpora. A section whose file is
absent says so in one line. Parts that the model does not have, such as experts, have no section.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from lsmoe_ds.analysis.findings import draw, find_all
from lsmoe_ds.analysis.heat_map import heat_map, largest_share
from lsmoe_ds.analysis.page import measures_table, reading
from lsmoe_ds.analysis.plots import number
from lsmoe_ds.analysis.routing import read_routing, task_name
from lsmoe_ds.checkpoint.averages import Averaging, describe_average
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.comparison import find_directory
from lsmoe_ds.data.sources import PROVENANCE, corpus_folder
from lsmoe_ds.directions import GROUPS, Direction, task_order
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.direction_scores import DirectionScore
from lsmoe_ds.evaluation.groups import CLASSES
from lsmoe_ds.evaluation.metrics import TASKS, WEAK
from lsmoe_ds.evaluation.score_folder import ScoreFolder
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.folders import check_can_write, write_whole
from lsmoe_ds.languages import is_english, language_name, script
from lsmoe_ds.notices import counted
from lsmoe_ds.pages import duration, open_template
from lsmoe_ds.report.progress import Progress, draw_charts, read_progress

T = TypeVar("T")
SOFTWARE = ("lsmoe_ds", "torch", "deepspeed", "megatron-core", "sentencepiece", "sacrebleu")
SHORT_TRAINING = 2 * 3600
USABLE = 0.1
OPEN_SAMPLES = 5
GRIDS = 2  # shown for each of a method's findings in the weights


KIND_NAMES = {"dense": "dense", "huggingface": "Hugging Face", "ctranslate2": "CTranslate2", "peft": "PEFT"}


class Conversion(BaseModel):
    """A record of ``lsmoe convert``: a converted model compared with its run."""

    kind: str = "dense"
    quantization: str | None = None
    vocabulary_map: dict[str, float | str] | None = None
    direction: str
    route: str = "specific"
    step: int | None = None
    average: Averaging = 1
    sparse_parameters: int
    dense_parameters: int
    largest_logit_difference: float | None = None
    same_translations: int | None = None
    same_labels: int | None = None
    same_answers: int | None = None
    sentences: int | None = None
    questions: int | None = None
    dense_bytes: int | None = None
    seconds: float | None = None
    dense_folder: str | None = None
    not_checked: str | None = None
    date: str | None = None

    @property
    def same(self) -> int | None:
        """Return how many results were the same, for any task."""
        found = (self.same_translations, self.same_labels, self.same_answers)
        return next((count for count in found if count is not None), None)

    @property
    def compared(self) -> int | None:
        """Return how many sentences or questions were compared."""
        return self.sentences if self.sentences is not None else self.questions

    @property
    def quantized(self) -> bool:
        return self.quantization not in (None, "float32")

    @property
    def made(self) -> str:
        """Describe the conversion: ``2026-01-02, of step 100, in 3.0 s``."""
        parts = [self.date and self.date[:10], None if self.step is None else f"of step {self.step:,}"]
        parts.append(None if self.seconds is None else f"in {duration(self.seconds)}")
        return ", ".join(part for part in parts if part)

    @property
    def title(self) -> str:
        """Describe the converted model: ``CTranslate2, int8, shared route``."""
        parts = [
            KIND_NAMES.get(self.kind, self.kind),
            self.quantization,
            None if self.vocabulary_map is None else "vocabulary map",
            "shared route" if self.route == "shared" else None,
        ]
        parts.append(describe_average(self.average).removeprefix("the ") if self.average != 1 else None)
        return ", ".join(part for part in parts if part)


def write_report(
    run_folder: str | Path, out: str | Path | None = None, scores: str | Path | None = None
) -> Path:
    """Write the page, by default as ``report.html`` of the run, and return its path.

    ``scores`` is the folder to which `lsmoe evaluate --out` wrote, if not the run. Raises UserError if the
    run has no recipe, if ``scores`` has no scores, or if a file cannot be read.
    """
    run = Path(run_folder)
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run folder: it holds no recipe.yaml")
    path = Path(out) if out is not None else run / "report.html"
    check_can_write(path.absolute().parent, "choose another file with --out", make=False)
    write_whole(path, render_report(run, Path(scores) if scores is not None else None))
    return path


def render_report(run: Path, scores_in: Path | None = None) -> str:
    """Return the page as text. The template escapes everything that comes from data."""
    recipe = load_recipe(run / "recipe.yaml")
    progress = _if_there(run / "metrics.jsonl", read_progress)
    folder = ScoreFolder(scores_in if scores_in is not None else run)
    scores = folder.best(recipe.trained)
    if scores is None and scores_in is not None:
        raise UserError(
            f"--scores {scores_in} holds no scores of this run's directions: `lsmoe evaluate {run} --out DIR`"
            " writes them"
        )
    layers = _if_there(folder.home / "routing.json", read_routing)
    conversions = _conversions(run)
    timings = _if_there(run / "timings.json", lambda path: _read(path, TypeAdapter(dict[str, float])))
    findings = find_all(run, recipe)
    full, task = largest_share(layers or []), TASKS[recipe.model.task]
    averages = scores.averages() if scores else {}
    classes = {CLASSES[name]: average for name, average in averages.items() if name in CLASSES}
    return open_template("lsmoe_ds.report", "template.html", number=number, counted=counted).render(
        direction_name=lambda direction: task_name(str(direction)),
        recipe=recipe,
        summary=_summary(recipe, progress),
        progress=progress,
        curves=draw_charts(progress, recipe, task.learned) if progress else None,
        findings=[(each, [(grid, draw(grid)) for grid in each.grids[:GRIDS]]) for each in findings],
        scores=scores,
        question=_question(scores, progress, recipe) if scores else "",
        # If nothing is held out by choice, there may be no test set: only the corpora decide that.
        evaluation="lsmoe evaluate" if recipe.data.held_out.test else "lsmoe evaluate --test FILES",
        averages={name: average for name, average in averages.items() if name not in CLASSES},
        classes=classes,
        class_groups=[group for group in GROUPS if any(group in between for between in classes)],
        scoring=task,
        shown=_shown(scores) if scores else "",
        copied=scores is not None and scores.translates,
        samples_title="Sample translations" if recipe.model.task == "translate" else "Samples",
        extraction="dense" if recipe.model.huggingface is None else "huggingface",
        caveat=_caveat(scores, progress) if scores else None,
        sides=_sides(scores) if scores else [],
        bar_scale=_bar_scale(scores) if scores else 0,
        open_samples=_open_samples(scores) if scores else set(),
        maps=[(layer, heat_map(layer, full), reading(layer)) for layer in layers or []],
        full=full,
        has_experts=any(recipe.model.moe_layers()),
        measures=measures_table(layers or []),
        conversions=conversions,
        inconvertible=_inconvertible(recipe) if not conversions else None,
        timings=timings,
        corpora=_corpora(recipe, run),
        versions=_versions(),
    )


def _if_there(path: Path, read: Callable[[Path], T]) -> T | None:
    return read(path) if path.is_file() else None


def _question(scores: ScoreTable, progress: Progress | None, recipe: Recipe) -> str:
    """Describe the question of the scores, and whether training has continued since."""
    said = scores.describe(recipe.trained)
    if progress is not None and progress.steps > scores.step:
        said += f" Training has gone on to step {progress.steps:,} since."
    return said


def _shown(scores: ScoreTable) -> str:
    """Return the metric of the bars: chrF, the scale of :data:`WEAK`, or the main one of another task."""
    return "chrf" if scores.translates else scores.scoring.main


def _bar_scale(scores: ScoreTable) -> float:
    """Return the width of a bar, in percent, of the score 1; the longest bar leaves room for its number."""
    bars = [bar for score in scores.directions for bar in (score.metrics, score.copy) if bar is not None]
    return 85 / max(1.0, *(bar[_shown(scores)] for bar in bars))


def _inconvertible(recipe: Recipe) -> str | None:
    """Return the reason why a run cannot be converted to a dense model; None if it can."""
    from lsmoe_ds.export.subnetwork import check_convertible

    try:
        check_convertible(recipe, recipe.languages.directions[0])
    except UserError as error:
        return str(error)
    return None


def _conversions(run: Path) -> list[Conversion]:
    """Return the records of all conversions, dense ones first. A run of an earlier version has only one."""
    paths = sorted((run / "conversions").glob("*.json")) or [
        path for path in [run / "conversion.json"] if path.is_file()
    ]
    found = [_read(path, TypeAdapter(Conversion)) for path in paths]
    return sorted(
        found,
        key=lambda each: list(KIND_NAMES).index(each.kind) if each.kind in KIND_NAMES else len(KIND_NAMES),
    )


def _read(path: Path, kind: TypeAdapter[T]) -> T:
    try:
        return kind.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} cannot be read: {key + ': ' if key else ''}{first['msg']}") from None


def _summary(recipe: Recipe, progress: Progress | None) -> str:
    """Describe in one line which model was trained, on how many languages and directions."""
    model, languages = recipe.model, recipe.languages
    unit = {"target": "target language", "source": "source language", "pair": "language pair"}
    mixtures = {
        (side, moe.experts, moe.top_k, unit[moe.task] if moe.by_task else moe.routing)
        for side, _, moe in model.moe_layers()
    }
    sparse = [
        f"{experts} experts in each sparse layer of the {side}, {top_k} of them used for each {by}"
        for side, experts, top_k, by in sorted(mixtures, reverse=True)
    ]
    if len(sparse) == 2 and sparse[0].replace("encoder", "decoder") == sparse[1]:
        sparse = [sparse[0].replace("the encoder", "encoder and decoder")]
    parts = [*sparse, *(method.describe() for method in model.methods)]
    what = f"{model.preset or 'transformer'} {'with ' + ' and '.join(parts) if parts else 'without experts'}"
    steps = f", trained for {progress.steps:,} steps" if progress and progress.steps else ""
    if base := recipe.training.start_from:
        steps += f", starting from {Path(base).name}"
    translates = not all(direction.alone for direction in languages.directions)
    directions = f" in {len(languages.directions)} directions" if translates else ""
    return f"{len(languages.codes)} languages{directions}: {what}{steps}."


def _caveat(scores: ScoreTable, progress: Progress | None) -> str | None:
    """Describe, in its own figures, what a short training achieved.

    None if the training was long, if its translations are good nevertheless, if the scores are of an earlier
    step, or if nothing was translated.
    """
    if (
        progress is None
        or not 0 < progress.seconds < SHORT_TRAINING
        or scores.share("weak") < USABLE
        or scores.step < progress.steps
    ):
        return None
    average = scores.averages()["all"]
    if average.copy is None:
        return None
    ahead = average.metrics["chrf"] - average.copy["chrf"]
    compared = (
        f"{abs(ahead):.1f} chrF {'above' if ahead > 0 else 'below'}"
        if abs(ahead) >= 0.05
        else "the same chrF as"
    )
    exact, weak = scores.share("exact"), scores.share("weak")
    return (
        f"After {duration(progress.seconds)} of training the model scores {compared} copying the source. Of "
        f"its {scores.sentences:,} {scores.split} translations {exact:.0%} are word for word the reference, "
        f"and {weak:.0%} score under {WEAK:.0f} chrF, where a translation is seldom of use: the model is not "
        "a translator yet."
    )


@dataclass(frozen=True)
class SideScores:
    """The directions of one group, ordered so that related languages are neighbors."""

    title: str
    group: str
    scores: list[DirectionScore]

    def label(self, direction: Direction) -> str:
        """Return the name of the language that is not English, or of both."""
        return {
            "into_english": language_name(direction.source),
            "out_of_english": language_name(direction.target),
        }.get(self.group, task_name(str(direction)))


def _sides(scores: ScoreTable) -> list[SideScores]:
    def of(title: str, group: str, wanted: Callable[[Direction], bool]) -> SideScores:
        found = [score for score in scores.directions if wanted(score.direction)]
        return SideScores(title, group, sorted(found, key=lambda score: task_order(str(score.direction))))

    if not scores.translates:
        return [of("Languages", "all", lambda _: True)]
    sides = [
        of("Into English", "into_english", lambda d: is_english(d.target)),
        of("Out of English", "out_of_english", lambda d: is_english(d.source)),
        of("Between others", "between_others", lambda d: not (is_english(d.source) or is_english(d.target))),
    ]
    return [side for side in sides if side.scores]


def _open_samples(scores: ScoreTable) -> set[str]:
    """Return the directions whose samples are shown open.

    They are one into English and one into each other script, up to a limit.
    """
    shown: dict[str, str] = {}
    for score in sorted(scores.directions, key=lambda score: task_order(str(score.direction))):
        target = score.direction.target
        shown.setdefault(
            "into English" if is_english(target) else script(target) or target, str(score.direction)
        )
    return set(list(shown.values())[:OPEN_SAMPLES])


class Provenance(BaseModel):
    """The fields of a fetched corpus' ``PROVENANCE.json`` that the page shows."""

    name: str
    package: str
    version: str
    license: str
    date: str


def _corpora(recipe: Recipe, run: Path) -> list[Provenance]:
    paths = [
        corpus_folder(name, find_directory(recipe, run)) / PROVENANCE
        for name in recipe.data.corpora
        if isinstance(name, str)
    ]
    found = [_if_there(path, lambda path: _read(path, TypeAdapter(Provenance))) for path in paths]
    return [corpus for corpus in found if corpus is not None]


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for name in SOFTWARE:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

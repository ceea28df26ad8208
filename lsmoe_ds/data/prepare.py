"""Prepare the data of a recipe, as the leading process or as its helper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.bitext import LATER
from lsmoe_ds.data.comparison import MANIFEST, differences, settings_of
from lsmoe_ds.data.fingerprints import State, state_of
from lsmoe_ds.data.preparation import Preparation
from lsmoe_ds.data.prepare_labelled import LabelledPreparation
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.shards import FUNCTIONS
from lsmoe_ds.data.stages import Work, lead_or_help
from lsmoe_ds.data.workers import Workers, cores
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import replaced, write_json
from lsmoe_ds.notices import counted


def prepare(recipe: Recipe, force: bool = False, processes: int | None = None) -> PreparedData:
    """Prepare the data of a recipe, unless they are up to date.

    ``processes`` is the number of workers, by default one for each core. While another process, on this or
    another machine, prepares the same data, this one helps it, and takes over if it dies. Prints why data are
    prepared again, and the notices. If it is killed, earlier data stay, and the next call repeats nothing
    that is finished. Raises UserError for corpora that are missing, damaged, badly encoded or too small, and
    while another process prepares the data with other settings.
    """
    console, folder = (
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False),
        recipe.prepared,
    )
    work, before = Work(folder, FUNCTIONS), _written(folder)
    if not force and (state := state_of(recipe)).reason is None:
        return _up_to_date(recipe, state, console)

    def lead() -> PreparedData:
        again = force and _written(folder) == before
        state = State("it was asked for") if again else state_of(recipe)
        if state.reason is None:
            work.finish()
            return _up_to_date(recipe, state, console)
        console.print(f"preparing {folder}{' again' if folder.exists() else ''}: {state.reason}")
        return _lead(recipe, work, console, processes)

    return lead_or_help(
        work,
        folder,
        lead,
        lambda: Workers(cores() if processes is None else processes),
        lambda theirs: _check_same(recipe, theirs),
        lambda: console.print(f"another process is preparing {folder}: this one helps"),
    )


def _written(folder: Path) -> int | None:
    """Return when prepared data were written, or None."""
    try:
        return (folder / MANIFEST).stat().st_mtime_ns
    except OSError:
        return None


def _check_same(recipe: Recipe, theirs: dict[str, Any] | None) -> None:
    """Raise UserError if another process prepares the data of a recipe with other settings."""
    if theirs is None or theirs == settings_of(recipe):
        return
    if (found := next(differences(recipe.prepared, theirs, recipe), None)) is not None:
        other, own = found.values()
        raise UserError(
            f"another process is preparing {recipe.prepared} with another recipe, of which '{found.key}' is "
            f"{other} where this one has {own}: wait for it, stop it, or give this recipe a 'data.name' of "
            "its own"
        )


def _lead(recipe: Recipe, work: Work, console: Console, processes: int | None) -> PreparedData:
    """Prepare the data under their lock."""
    folder = recipe.prepared
    try:
        with replaced(folder) as new:
            work.lead(settings_of(recipe))
            if recipe.data.task == "translate":
                manifest = Preparation(recipe, new, work, console, processes).run()
            else:
                manifest = LabelledPreparation(recipe, new, console).run()
            write_json(new / MANIFEST, manifest)
    except BaseException:
        if done := work.finished("clean", "encode"):
            console.print(
                f"{counted(done, 'finished shard')} {'is' if done == 1 else 'are'} kept in {work.folder}: "
                "the same command resumes; to free the disk space, remove the folder"
            )
        else:
            work.finish()
        raise
    work.finish()
    for notice in manifest["notices"]:
        console.print(notice)
    pairs = sum(splits["train"]["pairs"] for splits in manifest["bitexts"].values())
    if recipe.data.task != "translate":
        examples = sum(splits["train"]["examples"] for splits in manifest["bitexts"].values())
        console.print(
            f"prepared {folder}: {counted(examples, 'training example')} in "
            f"{counted(len(manifest['bitexts']), 'language')}, {counted(pairs, 'sequence')}"
        )
        return PreparedData.of(recipe)
    console.print(
        f"prepared {folder}: {counted(pairs, 'training pair')} in "
        f"{counted(len(manifest['bitexts']), 'bitext')}"
    )
    console.print(_cleaned(manifest["cleaning"].values()))
    if left_out := sum(counts.get("held out", 0) for counts in manifest["cleaning"].values()):
        are, its = ("is", "it") if left_out == 1 else ("are", "them")
        console.print(
            f"{counted(left_out, 'more pair')} {are} not trained on, because a side of {its} is a dev or test"
            " sentence, or nearly"
        )
    return PreparedData.of(recipe)


def _cleaned(counts: Iterable[Mapping[str, int]]) -> str:
    """Describe how many pairs were read and how many each rule has dropped, in decreasing order."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    read = total.pop("read", 0)
    rules = [f"{name} {count:,}" for name, count in total.most_common() if count and name not in LATER]
    return (
        f"of {counted(read, 'pair')} that {'was' if read == 1 else 'were'} read, cleaning has dropped: "
        f"{', '.join(rules) or 'none'}"
    )


def _up_to_date(recipe: Recipe, state: State, console: Console) -> PreparedData:
    console.print(f"prepared data is up to date ({recipe.prepared})")
    for remark in state.remarks:
        console.print(remark)
    return PreparedData.of(recipe)

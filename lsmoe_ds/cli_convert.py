"""The verb ``lsmoe convert``, which has the most options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lsmoe_ds.cli_options import NPROC, AsJson, AverageOption, Route, Run, direction_of
from lsmoe_ds.config.codes import read_code
from lsmoe_ds.console import print_json, show_table
from lsmoe_ds.errors import UserError

LABELS = {
    "references_covered": "pieces of the references among the candidates, %",
    "sparse_parameters": "parameters of the whole model",  # which may be dense
    "padded_parameters": "parameters of the folder, padded to one width a side and number of experts",
    "dense_bytes": "bytes of its weight files",  # rounded, padded, or with a table of positions
    "dense_folder": "folder",
}


def write_layout(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint or a consolidated folder.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder that is being written.")],
) -> None:
    """Write one rank's part of a run in another layout; started by ``lsmoe convert --as layout`` on every
    rank.
    """
    from lsmoe_ds.convert.layout import write_layout as write_own_part

    write_own_part(source, run)


def convert(
    run: Run,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="KIND",
            help=(
                "dense: the plain model of one direction; huggingface, ctranslate2: the same, as these "
                "libraries load it; peft: a base, and the matrices of one direction or of each as LoRA; "
                "hybrid: layers routed by token or sentence keep their experts; "
                "consolidated: the whole model in safetensors, also from a Hugging Face folder; grown: "
                "consolidated with more experts, languages or methods; layout: a run for another number of "
                "processes."
            ),
        ),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(
            "--direction",
            metavar="A-B",
            help=(
                "The direction to extract, as in en-de; of an encoder that has tags of languages, a "
                "language; peft: without it, each."
            ),
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="LANGUAGE", help="Language of the input, if not in --direction."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", metavar="LANGUAGE", help="Language of the output.")
    ] = None,
    route: Route = "specific",
    check: Annotated[
        int, typer.Option(min=0, help="Compare both models on so many held-out sentences; 0: do not.")
    ] = 100,
    average: AverageOption = "1",
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="ctranslate2 only: store weights as float32 (the default), int8 or int8_float32.",
        ),
    ] = None,
    vocabulary_map: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="ctranslate2 only: score the N target pieces alone that go with each source piece.",
        ),
    ] = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="consolidated only: keep the optimizer's state.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="layout, grown and imports only: change a key of the recipe; may be repeated.",
        ),
    ] = None,
    like_language: Annotated[
        str | None,
        typer.Option(metavar="LANGUAGE", help="grown only: new languages begin as copies of this one."),
    ] = None,
    like_expert: Annotated[
        int | None, typer.Option(min=0, help="grown only: new experts begin as copies of this one.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="peft only: refer to this base, which has the same weights."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE",
            help=(
                "hybrid, huggingface only: keep the N experts of each layer which the direction uses most, "
                "or as many as cover a share of the use, as in 0.95."
            ),
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="used|mean",
            help=(
                "dense only: where tokens choose their experts, the most used one or the weighted mean "
                "stands for all: a start for distilling."
            ),
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--nproc", min=1, help=f"layout only: {NPROC.lower()}")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Extract the sub-network of one direction from a sparse model, or write the whole model in another
    form.
    """
    from lsmoe_ds.checkpoint.averages import read_average
    from lsmoe_ds.convert.command import KINDS
    from lsmoe_ds.convert.command import convert as convert_run
    from lsmoe_ds.export.grown import Likeness
    from lsmoe_ds.export.peft import size_table

    if kind is None and target in KINDS:
        raise UserError(f"--to is a language, as in `lsmoe translate`: write --as {target}")
    if kind is None:
        raise UserError(
            f"nothing says what to make of it: add --as with {', '.join(KINDS[:-1])} or {KINDS[-1]}"
        )
    chosen = direction_of(direction, source, target, "--to")
    like_language = None if like_language is None else read_code(like_language, of_system=True)
    like = None if like_language is None and like_expert is None else Likeness(like_expert, like_language)
    options = {
        "quantization": quantization,
        "vocabulary_map": vocabulary_map,
        "optimizer": optimizer,
        "nproc": processes,
        "base": base,
        "keep": keep,
        "experts": experts,
    }
    weights = read_average(average)
    summary = convert_run(run, kind, chosen, out, check, route, weights, overrides or (), like, **options)
    if as_json:
        print_json(summary)
    else:
        labels = dict(LABELS)
        if adapters := summary.pop("adapters", None):
            show_table(size_table(adapters))
            if len(adapters) > 1:
                labels["dense_parameters"] = "parameters of the base and its largest adapter"
        summary |= summary.pop("vocabulary_map", {})
        for name, value in summary.items():
            print(f"{labels.get(name, name.replace('_', ' '))}: {value}")

"""``lsmoe plan``: what a recipe costs, and which layouts of it fit into given GPUs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lsmoe_ds.cli_options import AsJson, Overrides, RecipeFile
from lsmoe_ds.console import print_json, show_table
from lsmoe_ds.errors import UserError


def plan(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    world: Annotated[
        int | None,
        typer.Option("--world", min=1, help="Processes to plan for; by default as few as the layout needs."),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Find the layouts that fit into --gpus, and their step time.")
    ] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many GPUs, for --fit.")] = None,
    device: Annotated[str, typer.Option(help="The kind of GPU, such as A100, for --fit.")] = "H100",
    memory: Annotated[
        str | None, typer.Option(help="The memory of each GPU, as in 40GB, if it is another, for --fit.")
    ] = None,
    node: Annotated[int, typer.Option(min=1, help="GPUs in a machine, for --fit.")] = 8,
    network: Annotated[
        str, typer.Option(help="Bytes a second of each GPU between machines, as in 50GB, for --fit.")
    ] = "50GB",
    efficiency: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="The share of the peak FLOP/s that is reached, for --fit."),
    ] = 0.4,
    out: Annotated[
        Path | None, typer.Option(help="A new file for the recipe in the fastest layout, for --fit.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show parameters by part, memory of each rank, bytes exchanged and FLOPs, before anything is trained."""
    from lsmoe_ds.checkpoint.run_folder import check_start, choose_run
    from lsmoe_ds.config.host import tell_missing_weights
    from lsmoe_ds.convert.recipes import open_recipe
    from lsmoe_ds.data.vocabulary import read_vocabulary
    from lsmoe_ds.folders import check_can_write, write_whole
    from lsmoe_ds.planning.devices import DEVICES
    from lsmoe_ds.planning.fit import find_fits, table_of
    from lsmoe_ds.planning.plan import plan as make_plan
    from lsmoe_ds.planning.times import Cluster

    if fit != (gpus is not None):
        raise UserError("--fit and --gpus go together: lsmoe plan RECIPE --fit --gpus 64")
    if fit and world is not None:
        raise UserError("--world is for a plan of the recipe's own layout: leave it out with --fit")
    for option in () if fit else ("device", "memory", "node", "network", "efficiency", "out"):
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"--{option} is for --fit: give both or none")
    if out is not None and out.exists():
        raise UserError(f"{out} exists: name a file that does not")
    if out is not None:
        check_can_write(out.absolute().parent, "name a file in another folder with --out", make=False)
    loaded = open_recipe(recipe, overrides or ())
    if (start := loaded.training.start_from) is not None:  # which may be on another machine
        try:
            check_start(start)
        except UserError as error:
            raise UserError(f"'training.start_from' is {start}: {error}") from None
    vocabulary = loaded.data.vocabulary
    if vocabulary.file is not None and vocabulary.file.is_file() and loaded.model.huggingface is None:
        read_vocabulary(vocabulary, loaded.languages.codes)  # which may lack a language's tag
    if gpus is None:
        made = make_plan(loaded, world)
        tell_missing_weights(loaded.model.huggingface)
        if as_json:
            print_json({"run": str(choose_run(recipe, loaded, None)), **made.to_dict()})
        else:
            show_table(made.table())
        return
    kinds = {name.lower(): kind for name, kind in DEVICES.items()}
    if (kind := kinds.get(device.lower())) is None:
        raise UserError(f"--device is {device!r}, but known are {', '.join(DEVICES)}")
    if memory is not None:
        kind = replace(kind, memory=read_bytes("--memory", memory))
    cluster = Cluster(gpus, node, kind, read_bytes("--network", network), efficiency)
    found = find_fits(loaded, cluster)
    if out is not None:
        write_whole(out, found[0].recipe.to_yaml())
    if as_json:
        print_json({"layouts": [each.to_dict() for each in found]})
    else:
        show_table(table_of(found, cluster))
        if out is not None:
            print(out)


def read_bytes(option: str, text: str) -> float:
    """Read ``80GB``, ``1.5TB`` or ``512MB`` as bytes. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])B", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UserError(f"{option} is {text!r}: write a number of bytes as in 80GB")
    scale: dict[str, Any] = {"M": 1e6, "G": 1e9, "T": 1e12}
    return float(match[1]) * scale[match[2].upper()]

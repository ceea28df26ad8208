"""``lsmoe analyze``: look into a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lsmoe_ds.cli_options import AsJson, Beam, Folder, Route, Run, Split, direction_of
from lsmoe_ds.console import print_json

analyze_app = typer.Typer(no_args_is_help=True, help="Look into a trained model.")


@analyze_app.command("routing")
def analyze_routing(
    run: Run,
    out: Folder,
    split: Split = "test",
    route: Route = "specific",
    as_json: AsJson = False,
) -> None:
    """Measure which experts each task uses, in every layer: maps, balance, entropy, similarity of tasks; as
    pages, CSV and JSON.
    """
    from lsmoe_ds.analysis.command import analyze_routing as analyze

    summary = analyze(run, out, split, route)
    if as_json:
        print_json(summary)
    else:
        print(out / "index.html")


def _analyze_weights(run: Path, kind: str, out: Path, as_json: bool) -> None:
    from lsmoe_ds.analysis.findings import analyze_weights

    summary = analyze_weights(run, kind, out)
    if as_json:
        print_json(summary)
    else:
        print(summary["said"])
        for name in ("index.html", "recipe.yaml"):
            if name in summary["files"]:
                print(out / name)


@analyze_app.command("structure")
def analyze_structure(run: Run, out: Folder, as_json: AsJson = False) -> None:
    """Draw by which language each layer has learned to choose its matrices, and write the recipe that has
    chosen; of modular LoRA, how each direction has learned to weight both.
    """
    _analyze_weights(run, "structure", out, as_json)


@analyze_app.command("subspaces")
def analyze_subspaces(run: Run, out: Folder, as_json: AsJson = False) -> None:
    """Measure by what was pruned how large a subspace each language needs beside each linear layer."""
    _analyze_weights(run, "subspaces", out, as_json)


@analyze_app.command("neurons")
def analyze_neurons(
    run: Run,
    out: Folder,
    split: Split = "dev",
    share: Annotated[float, typer.Option(help="Percent of the activations that the units cover.")] = 95.0,
    per: Annotated[
        Literal["sentence", "token"], typer.Option(help="Count a unit once a sentence, or at each token.")
    ] = "sentence",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Read the first N pairs of each direction.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Record which hidden units each direction activates, in every layer, and draw what directions share."""
    from lsmoe_ds.analysis.neurons import analyze_neurons as analyze

    summary = analyze(run, out, split, share, per, limit)
    if as_json:
        print_json(summary)
    else:
        print(summary["said"])
        print(out / "index.html")


@analyze_app.command("experts")
def analyze_experts(
    run: Run,
    out: Folder,
    direction: Annotated[str, typer.Option("--direction", metavar="A-B", help="From A to B, as in en-de.")],
    keep: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Keep N experts a layer; may be repeated. By default all, half, and so on.",
        ),
    ] = None,
    split: Split = "dev",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Translate the first N sentences.")
    ] = None,
    beam: Beam = 5,
    as_json: AsJson = False,
) -> None:
    """Score a direction with fewer and fewer experts, the most used ones, where tokens choose them: what
    'convert --as hybrid --keep N' would lose and save.
    """
    from lsmoe_ds.evaluation.kept_experts import analyze_experts as analyze

    chosen = direction_of(direction, None, None, "--to")
    assert chosen is not None
    summary = analyze(run, chosen, out, split, limit, keep or (), beam)
    if as_json:
        print_json(summary)
    else:
        print(summary["said"])
        print(out / "index.html")

"""Options that several verbs share: one concept, one name, one help text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from lsmoe_ds.config.codes import asked_direction, read_direction
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.part import Part

RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A recipe in YAML, or the name of one that comes with lsmoe_ds: demo."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the recipe, as in training.steps=100; may be repeated.",
    ),
]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, a checkpoint in it, or a converted folder.")
]
Route = Annotated[
    str,
    typer.Option(
        metavar="specific|shared",
        help=(
            "shared: use only what all languages share (models with a shared route); specific: use the "
            "languages' own."
        ),
    ),
]
AverageOption = Annotated[
    str,
    typer.Option(
        "--average",
        metavar="N|ema",
        help=(
            "Take the mean of the last N checkpoints of a run; ema: the moving average of the weights that "
            "training.ema keeps."
        ),
    ),
]
Beam = Annotated[int, typer.Option(min=1, help="Hypotheses kept at each step of the search.")]
LengthPenalty = Annotated[float, typer.Option(help="Scores are divided by length to this power.")]
Split = Annotated[str, typer.Option(metavar="test|dev", help="The held-out set to use.")]
InOneWord = Annotated[
    str | None, typer.Option("--direction", metavar="A-B", help="From A to B, as in en-de, or a language.")
]
PartOption = Annotated[
    Part | None,
    typer.Option(
        "--part", metavar="I/N", parser=Part.parse, help="Do only part I of N of the work, counted from 1."
    ),
]
Tokenize = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=(
            "BLEU's tokenizer: 13a, zh, ja-mecab, ko-mecab, char, intl, flores101, flores200, or spm:FILE for"
            " a sentencepiece model; by default that of the target language."
        ),
    ),
]
CometFile = Annotated[
    Path | None,
    typer.Option(
        "--comet",
        metavar="PATH",
        help="A checkpoint of COMET.",
        hidden=importlib.util.find_spec("comet") is None,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="The run folder; by default runs/NAME, or for the recipe.yaml of a run that run's own folder.",
    ),
]
Folder = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")]
NPROC = "Processes on this machine; by default as few as the layout needs."


def direction_of(word: str | None, source: str | None, target: str | None, to: str) -> Direction | None:
    """Return the direction that options name, in one word or in two; None if they name none. ``to`` is the
    option of the target.
    """
    if word is not None:
        if source is not None or target is not None:
            raise UserError(f"--direction {word} names both languages: leave out --from and {to}")
        # A system that labels text knows single languages, such as de.
        return read_direction(word, of_system=True, alone="-" not in word)
    if (source is None) != (target is None):
        raise UserError(f"--from and {to} name a direction together: give both or neither")
    return None if source is None or target is None else asked_direction(source, target)

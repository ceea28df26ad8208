"""The verbs ``lsmoe evaluate``, ``score`` and ``compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lsmoe_ds.cli_options import (
    AsJson,
    AverageOption,
    Beam,
    CometFile,
    LengthPenalty,
    PartOption,
    Route,
    Run,
    Split,
    Tokenize,
)
from lsmoe_ds.console import print_json, show_table
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.part import MOST


def evaluate(
    run: Run,
    directions: Annotated[
        str | None, typer.Option(metavar="A-B,...", help="Directions or languages to score; all by default.")
    ] = None,
    beam: Beam = 5,
    length_penalty: LengthPenalty = 1.0,
    split: Split = "test",
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Score only the first N sentences of each direction."),
    ] = None,
    route: Route = "specific",
    average: AverageOption = "1",
    test: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR_OR_FILES",
            help=(
                "A test set of your own: a folder (Moses files, FLORES, NTREX-128), a TSV file, the common "
                "part of file names (mytest "
                "for mytest.de and mytest.en), or CODE=FILE, repeated for each language."
            ),
        ),
    ] = None,
    tokenize: Tokenize = None,
    comet: CometFile = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where scores and text are written; RUN by default."),
    ] = None,
    part: PartOption = None,
    merge: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=MOST, help="Put together N parts that were scored with the same options."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Translate held-out text, or a test set of your own, and score it: BLEU, chrF and chrF++, beside copying
    the source. Or label held-out text: F1 of names, F1 and exact match of answers.

    Scores and text are kept in RUN/scores, in files named after the question (step, text, search,
    directions).
    """
    from lsmoe_ds.checkpoint.averages import read_average

    named, weights = directions.split(",") if directions is not None else None, read_average(average)
    if merge is not None:
        from lsmoe_ds.evaluation.parts import merge as merge_parts

        if part is not None:
            raise UserError("--merge puts parts together and --part scores one: give one of them")
        table = merge_parts(
            run,
            merge,
            named,
            beam,
            length_penalty,
            split,
            limit,
            route,
            test or (),
            tokenize,
            out,
            comet,
            weights,
        )
    else:
        from lsmoe_ds.evaluation.evaluate import evaluate as score

        options: dict[str, Any] = {
            "route": route,
            "average": weights,
            "part": part,
            "test": test or (),
            "tokenize": tokenize,
            "out": out,
            "comet": comet,
        }
        table = score(run, named, beam, length_penalty, split, limit, **options)
    if as_json:
        print(table.to_json())
    else:
        show_table(table.render())


def score(
    hypothesis: Annotated[Path, typer.Option(metavar="FILE", help="Translations, one a line.")],
    reference: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE", help="What they should be, line by line; may be repeated for several references."
        ),
    ],
    source: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What was translated: scored, too, as a copy.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="LANGUAGE", help="Language of the translations.")
    ] = None,
    tokenize: Tokenize = None,
    comet: CometFile = None,
    as_json: AsJson = False,
) -> None:
    """Score a file of translations, whoever made them: BLEU, chrF and chrF++ with their signatures."""
    from lsmoe_ds.evaluation.score_files import score_files

    found = score_files(hypothesis, reference, source, to, tokenize, comet)
    if as_json:
        print_json(found.to_dict())
    else:
        show_table(found.table())


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN...", help="Runs, or records in RUN/scores; the first is the baseline."
        ),
    ],
    directions: Annotated[
        str | None, typer.Option(metavar="A-B,...", help="Directions to compare; all by default.")
    ] = None,
    tokenize: Tokenize = None,
    samples: Annotated[
        int, typer.Option(min=100, help="Bootstrap resamples; ten times as many randomization trials.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=1, help="The seed of the random resampling.")] = 12345,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="An HTML page with the picture and all numbers."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Test whether systems differ, by direction and over all: paired bootstrap and approximate
    randomization.
    """
    from lsmoe_ds.evaluation.compare import compare_runs
    from lsmoe_ds.evaluation.compare_page import check_place, write_page

    if out is not None:
        check_place(out)
    found = compare_runs(
        runs, directions.split(",") if directions is not None else None, tokenize, samples, seed
    )
    if out is not None:
        write_page(found, out)
    print(
        f"lsmoe: {f'the picture is in {out}' if out else '--out FILE.html draws the differences'}",
        file=sys.stderr,
        flush=True,
    )
    if as_json:
        print_json(found.to_dict())
    else:
        show_table(found.table())

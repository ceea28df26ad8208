"""The verbs ``lsmoe translate`` and ``label``, which answer standard input line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lsmoe_ds.cli_options import AverageOption, Beam, InOneWord, LengthPenalty, Route, Run, direction_of
from lsmoe_ds.console import standard_input
from lsmoe_ds.errors import UserError


def translate(
    run: Run,
    source: Annotated[
        str | None, typer.Option("--from", metavar="LANGUAGE", help="Language of the input.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", metavar="LANGUAGE", help="Language of the output.")
    ] = None,
    direction: InOneWord = None,
    beam: Beam = 5,
    length_penalty: LengthPenalty = 1.0,
    route: Route = "specific",
    average: AverageOption = "1",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="torch|ctranslate2",
            help="By default ctranslate2 for a folder converted to it, otherwise torch.",
        ),
    ] = None,
    n_best: Annotated[
        int | None,
        typer.Option(
            "--n-best",
            min=1,
            metavar="N",
            help=(
                "Print the N best translations of each line as LINE ||| TRANSLATION ||| SCORE, with lines "
                "counted from 0; for --corpus: write N pairs for each line."
            ),
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help=(
                "Translate the sources of the model's training text instead, of a direction or of all, into "
                "this new corpus, on which another model is trained."
            ),
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For --corpus: translate these lines, in one direction."),
    ] = None,
    back: Annotated[
        bool,
        typer.Option("--back", help="For --corpus: translations become the sources of the other direction."),
    ] = False,
    tag: Annotated[
        str | None,
        typer.Option(metavar="WORD", help="For --back: put this word before each source, such as BT."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--sample",
            metavar="TEMPERATURE",
            help="For --corpus: sample translations instead of searching; 1.0 is the model's distribution.",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="For --sample: only from so many of the most probable tokens.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="For --sample: so many translations of each line.")
    ] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="For --sample: another gives others.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="For --corpus: translate so many lines of each direction.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="For --corpus: processes; by default one for each core, or on a GPU 0, which is this one.",
        ),
    ] = None,
) -> None:
    """Translate standard input to standard output, line by line, as lines come; both are UTF-8. An empty line
    stays empty.

    With --corpus, translate text into a corpus; it resumes, and the same command, started again elsewhere,
    helps.
    """
    chosen = direction_of(direction, source, target, "--to")
    if corpus is not None:
        from lsmoe_ds.checkpoint.averages import read_average
        from lsmoe_ds.export.translations import Asked, How, translate_corpus

        how = How(
            beam, length_penalty, route, engine, read_average(average), temperature, top_k, seed, n_best or 1
        )
        asked = Asked(() if chosen is None else (chosen,), text, limit, back, samples, tag)
        made = translate_corpus(run, corpus, asked, how, workers)
        pairs = ", ".join(f"{name} {count:,}" for name, count in made["pairs"].items())
        print(f"{corpus}: {pairs}")
        return
    for name, value, default in (
        ("--text", text, None),
        ("--back", back, False),
        ("--tag", tag, None),
        ("--sample", temperature, None),
        ("--top-k", top_k, None),
        ("--samples", samples, 1),
        ("--seed", seed, None),
        ("--limit", limit, None),
        ("--workers", workers, None),
    ):
        if value != default:
            raise UserError(f"{name} is for --corpus, the folder of a corpus that is to be written")
    if chosen is None:
        raise UserError("name the languages: --from en --to de, or --direction en-de")
    from lsmoe_ds.inference.beam_search import Search

    search = Search(beam, length_penalty, n_best=n_best or 1)
    stream = standard_input("one sentence a line, as in 'lsmoe translate ... < text'")
    from lsmoe_ds.checkpoint.averages import read_average
    from lsmoe_ds.export.engine import load_engine
    from lsmoe_ds.inference.engine import find_direction
    from lsmoe_ds.inference.stream import read_chunks
    from lsmoe_ds.inference.translate import translate_chunks

    loaded = load_engine(run, route, engine, chosen, read_average(average))
    chosen = find_direction(loaded, chosen)
    for number, found in enumerate(translate_chunks(loaded, chosen, read_chunks(stream), search)):
        if n_best is None:
            lines = [found[0].text]
        else:
            lines = [f"{number} ||| {each.text} ||| {each.score:.4f}" for each in found]
        print("\n".join(lines), flush=True)


def label(
    run: Run,
    language: Annotated[
        str | None, typer.Option("--language", metavar="LANGUAGE", help="Language of the text.")
    ] = None,
    route: Route = "specific",
    average: AverageOption = "1",
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print an object in JSON for each line: words, tags and names, or answer, score and place.",
        ),
    ] = False,
) -> None:
    """Label standard input line by line, as lines come; both are UTF-8. An empty line stays empty.

    Where the model tags, a line is a sentence, with spaces between words and punctuation marks, and becomes
    their tags. Where it answers, a line is a question and its context with a tab between, or a JSON object of
    "question" and "context", and becomes the answer.
    """
    if language is None:
        raise UserError("name the language of the text: --language de")
    text = standard_input("a sentence, or a question and its context, in each line")
    from lsmoe_ds.checkpoint.averages import read_average
    from lsmoe_ds.config.codes import read_code
    from lsmoe_ds.export.engine import load_engine
    from lsmoe_ds.inference.label_lines import label_chunks
    from lsmoe_ds.inference.stream import read_chunks

    code = read_code(language, of_system=True)
    loaded = load_engine(run, route, average=read_average(average))
    for found in label_chunks(loaded, code, read_chunks(text)):
        print(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else found.shown, flush=True)

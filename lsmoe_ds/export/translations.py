"""Translate a model's training text, or other text, into a corpus that trains another model: the student of a
teacher, or by back-translation a model of the other direction.

Chunks of lines are translated by any number of processes (:mod:`lsmoe_ds.data.stages`). A translation depends
on nothing but the lines of its chunk, so their number and interruptions change nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lsmoe_ds import __version__
from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.stored import Stored, Weights, find_model, read_weights
from lsmoe_ds.console import progress
from lsmoe_ds.data.lines import read_lines
from lsmoe_ds.data.prepared import PreparedData, open_data
from lsmoe_ds.data.sources import PROVENANCE
from lsmoe_ds.data.stages import Function, Record, Task, Work, lead_or_help
from lsmoe_ds.data.workers import Workers, cores
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.folders import describe_files, read_json, replaced, resolved, write_json, write_whole
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import Engine
from lsmoe_ds.inference.load import check_direction, check_route, known_direction
from lsmoe_ds.inference.translate import translate_all
from lsmoe_ds.languages import UNK
from lsmoe_ds.notices import notice

CHUNK = 256  # lines of a task
LINES, TEXT = "lines.txt", "text"  # in the folder of a task, and in the work folder


@dataclass(frozen=True)
class How:
    """How lines are translated."""

    beam: int = 5
    length_penalty: float = 1.0
    route: str = "specific"
    engine: str | None = None
    average: Averaging = 1


@dataclass(frozen=True)
class Asked:
    """What is to be translated: the training sources of ``directions``, or a ``text`` in one direction.

    At most ``limit`` lines of each direction. ``back``: translations become the sources of the other
    direction.
    """

    directions: tuple[Direction, ...] = ()
    text: Path | None = None
    limit: int | None = None
    back: bool = False


def translate_corpus(
    run: str | Path, out: Path, asked: Asked, how: How, processes: int | None = None
) -> dict[str, Any]:
    """Write the corpus ``out``, a folder of ``SOURCE-TARGET.tsv``, and return its provenance.

    With ``processes`` 0 this one translates; by default that is so on a GPU, and otherwise there is one for
    each core. While another process writes the same corpus, this one helps it. An interrupted translation
    resumes. Raises UserError for a direction that the model lacks or whose text is empty, and for a folder
    that holds something else.
    """
    out = Path(out)
    _check_ours(out)
    stored = find_model(run)
    directions = asked.directions or tuple(stored.recipe.trained)
    if asked.text is not None and len(directions) != 1:
        raise UserError("--text is in one language: name the direction, as in --direction en-de")
    weights = read_weights(stored, how.average)
    settings = settings_of(stored, weights, asked, how)
    if processes is None:
        processes = 0 if torch.cuda.is_available() else cores()
    work = Work(out, FUNCTIONS)

    def lead() -> dict[str, Any]:
        done = read_json(out / PROVENANCE)
        if done is not None and done.get("settings") == settings:
            notice(f"the corpus {out} is there already")
            work.finish()
            return done
        return _lead(stored, directions, out, asked, how, settings, work, Workers(processes))

    def check(theirs: dict[str, Any] | None) -> None:
        if theirs is not None and theirs != settings:
            raise UserError(f"another process is writing {out} with other settings: choose another folder")

    return lead_or_help(
        work,
        out,
        lead,
        lambda: Workers(processes),
        check,
        lambda: notice(f"another process is writing {out}: this one helps"),
    )


def settings_of(stored: Stored, weights: Weights, asked: Asked, how: How) -> dict[str, Any]:
    """Return all that a corpus depends on, which its provenance has as ``settings``."""
    return {
        "model": {"name": stored.recipe.name, "step": weights.step, "files": weights.files},
        "directions": [str(each) for each in asked.directions or tuple(stored.recipe.trained)],
        "text": None if asked.text is None else _digest(asked.text),  # whose name may be another
        "limit": asked.limit,
        "back": asked.back,
        **asdict(how),
    }


def _digest(text: Path) -> str:
    """Return a checksum of a file's lines. Raises UserError for a file that cannot be read."""
    found = hashlib.sha256()
    for line in read_lines(text):
        found.update(f"{line}\n".encode())
    return found.hexdigest()


def _check_ours(out: Path) -> None:
    """Raise UserError if a path holds anything but such a corpus."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose a folder for --corpus")
    if out.is_dir() and any(out.iterdir()) and "translated_by" not in (read_json(out / PROVENANCE) or {}):
        raise UserError(
            f"{out} is not empty and was not made by `lsmoe translate --corpus`: choose another folder"
        )


def _lead(
    stored: Stored,
    directions: Sequence[Direction],
    out: Path,
    asked: Asked,
    how: How,
    settings: dict[str, Any],
    work: Work,
    workers: Workers,
) -> dict[str, Any]:
    """Translate all chunks, together with all processes that help, and write the corpus."""
    own = [known_direction(stored.recipe, stored.kind, each) for each in directions]
    for direction in own:
        check_direction(stored.recipe, stored.kind, direction)
    check_route(how.route, stored.recipe)
    data = None if asked.text is not None else open_data(stored)
    work.lead(settings)
    texts, left_out = {}, 0
    for direction in own:
        texts[direction], missing = _source_lines(data, direction, asked)
        left_out += missing
    (work.folder / TEXT).mkdir(exist_ok=True)
    tasks = {
        direction: list(_tasks(stored, direction, lines, how, settings["model"], work))
        for direction, lines in texts.items()
    }
    with workers, progress("translating", sum(map(len, texts.values()))) as advance:
        for _, record in work.do([task for each in tasks.values() for task in each], workers):
            advance(record["lines"])
    pairs: dict[str, int] = {}
    with replaced(out) as new:
        for direction, lines in texts.items():
            parts = [work.folder / task.name / LINES for task in tasks[direction]]
            name = str(direction.reverse if asked.back else direction)
            pairs[name] = _write(new / f"{name}.tsv", lines, parts, asked.back)
        provenance = {
            "translated_by": stored.recipe.name,
            "version": __version__,
            "date": datetime.date.today().isoformat(),
            "settings": settings,
            "pairs": pairs,
            "empty": sum(map(len, texts.values())) - sum(pairs.values()),
            "left_out": left_out,
            "files": describe_files(new, sorted(path.name for path in new.iterdir())),
        }
        write_json(new / PROVENANCE, provenance)
    work.finish()
    return provenance


def _write(path: Path, lines: Sequence[str], parts: Sequence[Path], back: bool) -> int:
    """Write the lines and their translations, which lie in ``parts``, to a table; return how many pairs it
    has. Pairs of which a side is empty are left out.
    """
    translated = [line for part in parts for line in part.read_text("utf-8").split("\n")[:-1]]
    pairs = [pair for pair in zip(lines, translated, strict=True) if all(side.strip() for side in pair)]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines("\t".join(reversed(pair) if back else pair) + "\n" for pair in pairs)
    return len(pairs)


def _source_lines(data: PreparedData | None, direction: Direction, asked: Asked) -> tuple[list[str], int]:
    """Return the lines to translate, and how many training sentences are left out, because the vocabulary
    lacks some of their characters. Raises UserError if there is no line.
    """
    missing = 0
    if data is None:
        assert asked.text is not None
        lines = [" ".join(line.split()) for line in islice(read_lines(asked.text), asked.limit)]
    else:
        source, lines = data.tokens(direction, "train").source, []
        for index in range(len(source)):
            if asked.limit is not None and len(lines) == asked.limit:
                break
            ids = source[index].tolist()
            if UNK in ids:
                missing += 1
            else:
                lines.append(" ".join(data.vocabulary.decode(ids).split()))
    if not lines:
        where = asked.text if data is None else f"the training text in {data.folder}"
        raise UserError(f"there is nothing to translate for {direction}: {where} has no line")
    return lines, missing


def _tasks(
    stored: Stored, direction: Direction, lines: Sequence[str], how: How, model: dict[str, Any], work: Work
) -> Iterator[Task]:
    """Yield a task for each chunk of lines; all of them are written to the work folder."""
    path = Path(TEXT, f"{direction}.txt")
    write_whole(work.folder / path, "".join(f"{line}\n" for line in lines))
    for first in range(0, len(lines), CHUNK):
        own = lines[first : first + CHUNK]
        digest = hashlib.sha256("\n".join(own).encode()).hexdigest()
        depends = {"model": model, "how": asdict(how), "direction": str(direction), "text": digest}
        arguments = {
            "run": str(resolved(stored.weights_in)),
            "how": asdict(how),
            "direction": str(direction),
            "text": str(path),
            "first": first,
            "count": len(own),
        }
        yield Task("translate", depends, arguments)


def translate_chunk(
    folder: Path, work: Path, run: str, how: dict[str, Any], direction: str, text: str, first: int, count: int
) -> Record:
    """Translate ``count`` lines of a text from line ``first``, counted from 0."""
    given, chosen = How(**how), Direction.parse(direction)
    with (work / text).open(encoding="utf-8", newline="\n") as file:
        lines = [line.removesuffix("\n") for line in islice(file, first, first + count)]
    engine = _engine(run, json.dumps(how), direction if given.engine == "ctranslate2" else None)
    search = Search(given.beam, given.length_penalty)
    found = translate_all(engine, chosen, lines, search, advance=lambda lines: None)
    (folder / LINES).write_text("".join(f"{line}\n" for line in found), encoding="utf-8", newline="\n")
    return {"lines": count}


@lru_cache(maxsize=1)
def _engine(run: str, how: str, direction: str | None) -> Engine:
    """Load a model once in each process."""
    given = How(**json.loads(how))
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # one for each worker; the same in all, as sums depend on their number
    chosen = None if direction is None else Direction.parse(direction)
    return load_engine(run, given.route, given.engine, chosen, given.average)


FUNCTIONS: dict[str, Function] = {"translate": translate_chunk}

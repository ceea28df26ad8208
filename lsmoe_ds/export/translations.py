"""Translate training text or other text into a corpus that trains another model: a student, or, by
back-translation, a model of the reverse direction.

Any number of processes translate chunks of lines (:mod:`lsmoe_ds.data.stages`). A translation depends only on
the lines of its chunk, so neither the number of processes nor interruptions change it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice, product
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
from lsmoe_ds.folders import (
    check_nothing_lost,
    damage,
    describe_files,
    read_json,
    replaced,
    resolved,
    write_json,
    write_whole,
)
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import Engine, warn_if_untrained
from lsmoe_ds.inference.load import check_direction, check_route, known_direction
from lsmoe_ds.inference.sampling import Sampling
from lsmoe_ds.inference.translate import translate_lines
from lsmoe_ds.languages import UNK
from lsmoe_ds.notices import notice

CHUNK = 1024  # lines of a task
LINES, TEXT = "lines.txt", "text"  # translations in a task's folder; sources in the work folder
ADDED = {"temperature": None, "top_k": None, "seed": None, "n_best": 1}  # fields of :class:`How`


@dataclass(frozen=True)
class How:
    """How lines are translated: by a search for the ``n_best``, or with a ``temperature`` by sampling
    (:class:`Sampling`).
    """

    beam: int = 5
    length_penalty: float = 1.0
    route: str = "specific"
    engine: str | None = None
    average: Averaging = 1
    temperature: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n_best: int = 1

    def search(self, draw: int = 0) -> Search:
        """Return the settings of a search, or of one draw. Raises UserError for values out of range."""
        if self.temperature is None:
            return Search(self.beam, self.length_penalty, n_best=self.n_best)
        return Sampling(
            length_penalty=self.length_penalty,
            n_best=self.n_best,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=1 if self.seed is None else self.seed,
            draw=draw,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, without those of :data:`ADDED` that are not given: older corpora lack them."""
        return {
            name: value for name, value in asdict(self).items() if name not in ADDED or value != ADDED[name]
        }


@dataclass(frozen=True)
class Asked:
    """The text to translate: the training sources of ``directions``, or a ``text`` in one direction.

    At most ``limit`` lines of each direction are translated, each ``samples`` times. With ``back``,
    translations become sources of the reverse direction, each after the word ``tag``.
    """

    directions: tuple[Direction, ...] = ()
    text: Path | None = None
    limit: int | None = None
    back: bool = False
    samples: int = 1
    tag: str | None = None

    def check(self, how: How) -> None:
        """Raise UserError unless these go together and with how lines are translated."""
        if how.temperature is None and (self.samples > 1 or how.top_k is not None or how.seed is not None):
            raise UserError("--samples, --top-k and --seed are for sampled translations: add --sample")
        if how.temperature is not None and how.n_best > 1:
            raise UserError("--n-best is for a search: choose --samples with --sample")
        if self.tag is not None and not self.back:
            raise UserError("--tag marks sources that are translations: it is for --back")
        if self.tag is not None and self.tag.split() != [self.tag]:
            raise UserError(f"--tag is {self.tag!r}: it must be one word, such as BT")
        how.search()


def translate_corpus(
    run: str | Path, out: Path, asked: Asked, how: How, processes: int | None = None
) -> dict[str, Any]:
    """Write the corpus ``out``, a folder of ``SOURCE-TARGET.tsv``, and return its provenance.

    ``processes`` is the number of workers; 0 means this process. The default is 0 on a GPU, and otherwise one
    for each core. While another process writes the same corpus, this one helps it. An interrupted translation
    resumes. Raises UserError if the model lacks a direction, if there is nothing to translate, or if another
    thing is in the folder.
    """
    out = Path(out)
    asked.check(how)
    _check_ours(out)
    stored = find_model(run)
    if how.temperature is not None and (
        "ctranslate2" in (how.engine, stored.kind) or stored.recipe.model.huggingface is not None
    ):
        raise UserError("--sample is for models that lsmoe_ds translates with in torch: leave it out")
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
            if (wrong := damage(out, done.get("files"), verify=True)) is None:
                notice(f"the corpus {out} is there already")
                work.finish()
                return done
            notice(f"{wrong}: everything is translated again")
        elif done is not None:
            before = done.get("settings", {})
            changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
            other = f"{out} has a corpus with other settings ({', '.join(changed)})"
            notice(f"{other}: it is replaced once this one is complete")
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
    """Return everything on which a corpus depends: ``settings`` in its provenance."""
    return {
        "model": {"name": stored.recipe.name, "step": weights.step, "files": weights.files},
        "directions": [str(each) for each in asked.directions or tuple(stored.recipe.trained)],
        "text": None if asked.text is None else _digest(asked.text),  # the file may be renamed
        "limit": asked.limit,
        "back": asked.back,
        **({"samples": asked.samples} if asked.samples > 1 else {}),
        **({"tag": asked.tag} if asked.tag is not None else {}),
        **how.to_dict(),
    }


def _digest(text: Path) -> str:
    """Return a checksum of a file's lines. Raises UserError for a file that cannot be read."""
    found = hashlib.sha256()
    for line in read_lines(text):
        found.update(f"{line}\n".encode())
    return found.hexdigest()


def _check_ours(out: Path) -> None:
    """Raise UserError if a path holds anything but a corpus written here."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose a folder for --corpus")
    if out.is_dir() and any(out.iterdir()):
        provenance = read_json(out / PROVENANCE) or {}
        if "translated_by" not in provenance:
            raise UserError(
                f"{out} is not empty and was not made by `lsmoe translate --corpus`: choose another folder"
            )
        check_nothing_lost(out, [*(provenance.get("files") or ()), PROVENANCE], "choose another folder")


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
    if settings["model"]["step"]:  # of an imported model, it is not known
        warn_if_untrained(stored.recipe, stored.home, own)
    data = None if asked.text is not None else open_data(stored)
    texts, left_out = {}, 0
    for direction in own:
        lines, missing = _source_lines(data, direction, asked)
        left_out += missing
        if any(lines):
            texts[direction] = lines
    if not texts:
        where = asked.text if data is None else f"the training text in {data.folder}"
        raise UserError(f"there is nothing to translate for {', '.join(map(str, own))}: {where} has no line")
    if none := [str(each) for each in own if each not in texts]:
        notice(f"there is no training text to translate for {', '.join(none)}")
    work.lead(settings)
    (work.folder / TEXT).mkdir(exist_ok=True)
    tasks = {
        direction: list(_tasks(stored, direction, lines, asked.samples, how, settings["model"], work))
        for direction, lines in texts.items()
    }
    translated = asked.samples * sum(map(len, texts.values()))
    with workers, progress("translating", translated) as advance:
        for _, record in work.do([task for each in tasks.values() for task in each], workers):
            advance(record["lines"])
    pairs: dict[str, int] = {}
    empty = 0
    with replaced(out) as new:
        for direction, lines in texts.items():
            parts = [work.folder / task.name / LINES for task in tasks[direction]]
            name = str(direction.reverse if asked.back else direction)
            pairs[name], without = _write(new / f"{name}.tsv", lines * asked.samples, parts, asked)
            empty += without
        provenance = {
            "translated_by": stored.recipe.name,
            "version": __version__,
            "date": datetime.date.today().isoformat(),
            "settings": settings,
            "pairs": pairs,
            "empty": empty,
            "left_out": left_out,
            "files": describe_files(new, sorted(path.name for path in new.iterdir())),
        }
        write_json(new / PROVENANCE, provenance)
    work.finish()
    return provenance


def _write(path: Path, lines: Sequence[str], parts: Sequence[Path], asked: Asked) -> tuple[int, int]:
    """Write the lines and their translations in ``parts`` to a table, without pairs that have an empty side;
    return the numbers of pairs that are written and that are left out.
    """
    before = "" if asked.tag is None else f"{asked.tag} "
    translated = [line.split("\t") for part in parts for line in part.read_text("utf-8").split("\n")[:-1]]
    both = [(line, each) for line, found in zip(lines, translated, strict=True) for each in found]
    pairs = [pair for pair in both if all(side.strip() for side in pair)]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for line, translation in pairs:
            file.write(f"{before}{translation}\t{line}\n" if asked.back else f"{line}\t{translation}\n")
    return len(pairs), len(both) - len(pairs)


def _source_lines(data: PreparedData | None, direction: Direction, asked: Asked) -> tuple[list[str], int]:
    """Return the lines to translate, and the number of training sentences left out because the vocabulary
    lacks some of their characters. A direction without training text (zero-shot) has no lines.
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
    return lines, missing


def _tasks(
    stored: Stored,
    direction: Direction,
    lines: Sequence[str],
    samples: int,
    how: How,
    model: dict[str, Any],
    work: Work,
) -> Iterator[Task]:
    """Yield a task for each chunk of lines, for each of the ``samples``; all lines are written to the work
    folder.
    """
    path = Path(TEXT, f"{direction}.txt")
    write_whole(work.folder / path, "".join(f"{line}\n" for line in lines))
    for draw, first in product(range(samples), range(0, len(lines), CHUNK)):
        own = lines[first : first + CHUNK]
        digest = hashlib.sha256("\n".join(own).encode()).hexdigest()
        depends: dict[str, Any] = {
            "model": model,
            "how": how.to_dict(),
            "direction": str(direction),
            "text": digest,
        }
        depends |= {"draw": draw} if draw else {}
        arguments = {
            "run": str(resolved(stored.weights_in)),
            "how": how.to_dict(),
            "draw": draw,
            "direction": str(direction),
            "text": str(path),
            "first": first,
            "count": len(own),
        }
        yield Task("translate", depends, arguments)


def translate_chunk(
    folder: Path,
    work: Path,
    run: str,
    how: dict[str, Any],
    draw: int,
    direction: str,
    text: str,
    first: int,
    count: int,
) -> Record:
    """Translate ``count`` lines of a text from line ``first``, counted from 0; sample them by one draw.

    A line of the file :data:`LINES` has the different translations of one, best first, with tabs between.
    """
    given, chosen = How(**how), Direction.parse(direction)
    with (work / text).open(encoding="utf-8", newline="\n") as file:
        lines = [line.removesuffix("\n") for line in islice(file, first, first + count)]
    engine = _engine(run, json.dumps(how), direction if given.engine == "ctranslate2" else None)
    found = translate_lines(engine, chosen, lines, given.search(draw), advance=lambda lines: None)
    rows = ["\t".join(dict.fromkeys(each.text for each in translations)) for translations in found]
    (folder / LINES).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8", newline="\n")
    return {"lines": count}


@lru_cache(maxsize=1)
def _engine(run: str, how: str, direction: str | None) -> Engine:
    """Load a model once in each process."""
    given = How(**json.loads(how))
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the same in all workers, because sums depend on the number of threads
    chosen = None if direction is None else Direction.parse(direction)
    return load_engine(run, given.route, given.engine, chosen, given.average)


FUNCTIONS: dict[str, Function] = {"translate": translate_chunk}

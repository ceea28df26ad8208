"""Label a user's lines: sentences, or questions and contexts separated by a tab."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lsmoe_ds.config.host import Task
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.engine import Engine, say_untrained
from lsmoe_ds.inference.label import Answer, Labeller, Reading
from lsmoe_ds.inference.stream import convert_lines, telling

QUESTION = 'QUESTION<TAB>CONTEXT or {"question": "...", "context": "..."}'
WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Tagged:
    """A line with the tags of its words, which spaces separate."""

    line: str
    tags: tuple[str, ...]

    @property
    def shown(self) -> str:
        return " ".join(self.tags)

    def to_dict(self) -> dict[str, Any]:
        """Return the words, their tags and the names; a name's ``start`` and ``end`` are characters."""
        words = list(WORD.finditer(self.line))
        spans = [(kind, words[first].start(), words[last].end()) for kind, first, last in names_of(self.tags)]
        return {
            "words": [word[0] for word in words],
            "tags": list(self.tags),
            "names": [
                {"type": kind, "text": self.line[start:end], "start": start, "end": end}
                for kind, start, end in spans
            ],
        }


def label_chunks(engine: Engine, language: str, chunks: Iterable[Sequence[str]]) -> Iterator[Tagged | Answer]:
    """Yield the labels of each line of each chunk; the lines of a chunk are read together.

    A blank line has no labels. Raises UserError at once for a model that does not label, and for a language
    that its system lacks. A line that is no question with a context raises it after the earlier answers.
    """
    task = engine.recipe.model.task
    if task == "translate":
        raise UserError("the task of the model is to translate: use `lsmoe translate`")
    assert isinstance(engine, Labeller)
    direction = engine.languages.find(Direction(language, language))
    if direction not in engine.recipe.trained and engine.step:
        say_untrained([direction])
    return _label(Reading.of(engine, direction), convert_lines(chunks, partial(_source_of, task)))


def _label(reading: Reading, chunks: Iterable[Sequence[tuple[str, str]]]) -> Iterator[Tagged | Answer]:
    """Yield the labels of (line, source line) pairs, chunk by chunk."""
    for chunk in chunks:
        sources = [source for _, source in chunk if source]
        if reading.form.tags:
            tags = iter(reading.tag(sources, telling("labelled", len(sources), "sentences")))
            yield from (Tagged(line, tuple(next(tags)) if source else ()) for line, source in chunk)
        else:
            answers = iter(reading.answer(sources, telling("answered", len(sources), "questions")))
            yield from (next(answers) if source else Answer() for _, source in chunk)


def _source_of(task: Task, line: str, number: int) -> tuple[str, str]:
    """Return a line and its source line (see :mod:`lsmoe_ds.data.labels`), empty for a blank one."""
    if task == "tag" or not line.strip():
        return line, " ".join(line.split())
    if line.lstrip().startswith("{"):
        try:
            value = json.loads(line)
            asked = [value["question"], value["context"]]
            "".join(asked).encode()  # raises for a value that is no text, and for half of a surrogate pair
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _no_question(line, number) from None
    else:
        asked = line.split("\t", 1)
        if len(asked) != 2 or not all(map(str.strip, asked)):
            raise _no_question(line, number)
    return line, json.dumps(dict(zip(("question", "context"), asked, strict=True)), ensure_ascii=False)


def _no_question(line: str, number: int) -> UserError:
    return UserError(
        f"line {number}: a question and its context were expected, as {QUESTION}; found {line[:40]!r}"
    )


def names_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the type, first word and last word of each name marked by tags of the BIO scheme.

    As in scoring, an ``I-`` after another type, or after no name, begins a name.
    """
    found: list[tuple[str, int, int]] = []
    for i, tag in enumerate(tags):
        scheme, _, kind = tag.partition("-")
        if scheme == "I" and found and found[-1][0] == kind and found[-1][2] == i - 1:
            found[-1] = (kind, found[-1][1], i)
        elif scheme != "O":
            found.append((kind, i, i))
    return found

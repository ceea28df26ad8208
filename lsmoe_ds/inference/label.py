"""Label lines with an encoder: tags for words, answers for questions; one line out for each line in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from lsmoe_ds.data.batches import Batch
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.labels import NOWHERE, Labels, Window, read_question
from lsmoe_ds.directions import Direction
from lsmoe_ds.inference.engine import Ready

BATCH_TOKENS = 4096
LONGEST_ANSWER = 30  # tokens, as usual for SQuAD


@runtime_checkable
class Labeller(Ready, Protocol):
    """A model ready to label."""

    @property
    def device(self) -> torch.device: ...

    def logits_of(self, batch: Batch) -> torch.Tensor:
        """Return the logits of a batch, as :class:`lsmoe_ds.model.host.LabellingModel` does."""
        ...


@dataclass(frozen=True)
class Answer:
    """The best span of a context: characters ``start`` to ``end``; the score is the sum of the logits of both
    ends, or None for a context without tokens.
    """

    text: str = ""
    score: float | None = None
    start: int = 0
    end: int = 0

    @classmethod
    def at(cls, context: str, score: float | None, start: int, end: int) -> Answer:
        """Make the answer of a span, without surrounding spaces: tokens of some tokenizers begin with a
        space.
        """
        span = context[start:end]
        text = span.strip()
        start += len(span) - len(span.lstrip())
        return cls(text, score, start, start + len(text))

    @property
    def shown(self) -> str:
        """The text on one line."""
        return " ".join(self.text.split())

    def to_dict(self) -> dict[str, Any]:
        """Return text, score and characters; null where there is no answer."""
        span = {"start": self.start, "end": self.end} if self.text else {"start": None, "end": None}
        return {"answer": self.text, "score": self.score and round(self.score, 4), **span}


def label_all(
    engine: Labeller,
    direction: Direction,
    lines: Sequence[str],
    advance: Callable[[int], None] = lambda lines: None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """Label source lines (see :mod:`lsmoe_ds.data.labels`) in a language. Each label is one line: the tags of
    the words, separated by spaces, or the text of the answer.
    """
    reading = Reading.of(engine, direction, batch_tokens)
    if reading.form.tags:
        return [" ".join(tags) for tags in reading.tag(lines, advance)]
    return [answer.shown for answer in reading.answer(lines, advance)]


@dataclass(frozen=True)
class Reading:
    """Label lines of one language with a model."""

    engine: Labeller
    form: Labels
    number: int  # the id of the language's direction
    batch_tokens: int

    @classmethod
    def of(cls, engine: Labeller, direction: Direction, batch_tokens: int = BATCH_TOKENS) -> Reading:
        form = form_of(engine.recipe.data, engine.languages, engine.vocabulary)
        assert isinstance(form, Labels)
        return cls(engine, form, engine.languages.direction_id(direction), batch_tokens)

    def tag(self, lines: Sequence[str], advance: Callable[[int], None]) -> list[list[str]]:
        """Return the tags of the words of each source line. ``advance`` gets the number of lines done."""
        pieces = [(i, piece) for i, line in enumerate(lines) for piece in self.form.pieces(line)]
        found: list[list[str]] = [[] for _ in pieces]
        targets = [self.form.target_of(piece, ["O"] * len(piece.starts)) for _, piece in pieces]
        sequences = [(line, piece.ids, target) for (line, piece), target in zip(pieces, targets, strict=True)]
        for at, logits in self._logits(sequences, advance):
            best = logits.argmax(1)
            starts = pieces[at][1].starts
            found[at] = ["O" if start < 0 else self.form.tags[best[start]] for start in starts]
        tags: list[list[str]] = [[] for _ in lines]
        for (line, _), part in zip(pieces, found, strict=True):
            tags[line] += part
        return tags

    def answer(self, lines: Sequence[str], advance: Callable[[int], None]) -> list[Answer]:
        """Return the answer to each source line, the best of its windows; see :meth:`tag`."""
        windows = [(i, window) for i, line in enumerate(lines) for window in self.form.windows(line)]
        best: dict[int, tuple[float, tuple[int, int]]] = {}
        sequences = [(line, each.ids, [each.context, NOWHERE, NOWHERE]) for line, each in windows]
        for at, logits in self._logits(sequences, advance):
            number, window = windows[at]
            if (found := best_span(logits, window)) is not None:
                best[number] = max(best.get(number, found), found)
        answers = []
        for number, line in enumerate(lines):
            score, (start, end) = best.get(number, (None, (0, 0)))
            answers.append(Answer.at(read_question(line)[1], score, start, end))
        return answers

    @torch.inference_mode()
    def _logits(
        self, sequences: Sequence[tuple[int, list[int], list[int]]], advance: Callable[[int], None]
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the index and the logits of each sequence, in batches of like length.

        A sequence is (number of its line, ids, target); sequences of a line are neighbors.
        """
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][1]))
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and len(sequences[order[end]][1]) * (end + 1 - start) <= self.batch_tokens:
                end += 1
            part = order[start:end]
            _, ids, targets = zip(*(sequences[i] for i in part), strict=True)
            batch = self.form.collate(ids, targets, [self.number] * len(part))
            logits = self.engine.logits_of(batch.to(self.engine.device)).float().cpu().numpy()
            for i, of_sequence in zip(part, logits, strict=True):
                yield i, of_sequence
                is_last = i + 1 == len(sequences) or sequences[i + 1][0] != sequences[i][0]
                advance(int(is_last))
            start = end


def best_span(logits: NDArray[Any], window: Window) -> tuple[float, tuple[int, int]] | None:
    """Return the best sum of the logits [2, T] of both ends, and its characters; None without context tokens.

    An answer has at most LONGEST_ANSWER tokens.
    """
    count = len(window.spans)
    if not count:
        return None
    first, last = logits[:, window.context : window.context + count]
    tokens = np.arange(count) - np.arange(count)[:, None]  # from the first (row) to the last (column)
    sums = np.where((tokens >= 0) & (tokens < LONGEST_ANSWER), first[:, None] + last, -np.inf)
    begin, end = np.unravel_index(int(sums.argmax()), sums.shape)
    return float(sums[begin, end]), (window.spans[begin][0], window.spans[end][1])

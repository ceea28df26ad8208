"""Text with labels, for encoders: sentences whose words have tags, and questions on a context.

An example is a source line and a target line. For the task ``tag`` they are the words of a sentence,
separated by spaces, and their tags. For ``answer`` they are JSON: ``{"question", "context"}`` and ``[{"text",
"start"}, ...]``, where ``start`` counts characters of the context. B sequences, T positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from lsmoe_ds.config.data import Data
from lsmoe_ds.data.batches import IGNORED, SequenceBatch
from lsmoe_ds.data.shuffling import Integers
from lsmoe_ds.directions import Languages
from lsmoe_ds.errors import UserError

if TYPE_CHECKING:
    from lsmoe_ds.data.host_tokenizer import HostTokenizer

OUTSIDE = -1e4  # the logit of either end of an answer at padding
NOWHERE = 0  # both ends of an answer that a window lacks: the position of the token before the text


class Piece(NamedTuple):
    """A sentence, or a part of a long one."""

    ids: list[int]  # with the special tokens that the model expects around a text
    starts: list[int]  # position of the first sub-word of each word, -1 for a word without one


class Window(NamedTuple):
    """A question with a part of its context."""

    ids: list[int]
    context: int  # position of the first token of the context
    spans: list[tuple[int, int]]  # (start, end) characters of each context token
    first: int  # the window holds characters first to end of the context
    end: int


def read_question(line: str) -> tuple[str, str]:
    """Return question and context of a source line."""
    value = json.loads(line)
    return value["question"], value["context"]


def content_of(line: str) -> str:
    """Return a source line without the id of a question, so that lines of the same content are equal."""
    return "\n".join(read_question(line)) if line.startswith('{"id"') else line


def places_of(window: Window, start: int, text: str) -> tuple[int, int]:
    """Return the first and last token of an answer in a window, or NOWHERE twice unless all of it is there.

    Several tokens may belong to one character; all of them belong to the answer.
    """
    start, text = start + len(text) - len(text.lstrip()), text.strip()
    end = start + len(text)
    inside = [i for i, (begin, stop) in enumerate(window.spans) if begin < end and stop > start]
    if not inside or start < window.first or end > window.end:
        return NOWHERE, NOWHERE
    return window.context + inside[0], window.context + inside[-1]


@dataclass(frozen=True, eq=False)
class Labels:
    """Turn text with labels into batches; see :class:`lsmoe_ds.data.batches.Form`.

    The target of a sequence to ``tag`` has, for each word, (position of its first sub-word) x (number of
    tags) + tag. The target of a question is the positions of the first token of the context, and of the first
    and last token of the answer.
    """

    source_language: Integers  # [directions]
    target_language: Integers  # [directions]
    tags: tuple[str, ...]  # none if the task is to answer
    longest: int  # tokens
    stride: int
    tokenizer: HostTokenizer
    settings: dict[str, Any]

    @classmethod
    def of(cls, data: Data, languages: Languages, tokenizer: HostTokenizer) -> Labels:
        """Make the form for the languages of a model.

        Raises UserError for a tokenizer that would join the words of a sentence.
        """
        if data.task == "tag" and tokenizer.joins_words:
            raise UserError(
                "the tokenizer of 'model.huggingface' reads words as parts of one: save it with "
                "AutoTokenizer.from_pretrained(FOLDER, add_prefix_space=True).save_pretrained(FOLDER)"
            )
        numbers = np.array([languages.id(d.source) for d in languages.directions], dtype=np.int64)
        settings = {f"data.{key}": getattr(data, key) for key in ("labels", "stride")}
        return cls(
            numbers,
            numbers,
            tuple(data.labels or ()),
            data.batch.max_length,
            data.stride or 0,
            tokenizer,
            settings,
        )

    @property
    def given(self) -> int:
        """Return 1 if the first number of a target tells where the context begins."""
        return 0 if self.tags else 1

    def overhead(self, direction: int) -> tuple[int, int]:
        """Return zeros: the stored tokens already include the special tokens around a text."""
        return 0, 0

    def read(self, source: str, target: str) -> Iterator[tuple[list[int], list[int]]]:
        """Yield token ids and target of each sequence of an example, for training.

        If there are several answers, the first one is learned.
        """
        if self.tags:
            tags = target.split(" ")
            for piece in self.pieces(source):
                yield piece.ids, self.target_of(piece, tags[: len(piece.starts)])
                tags = tags[len(piece.starts) :]
            return
        answer = json.loads(target)[0]
        for window in self.windows(source):
            yield window.ids, [window.context, *places_of(window, answer["start"], answer["text"])]

    def target_of(self, piece: Piece, tags: Sequence[str]) -> list[int]:
        """Return the target of a piece whose words have these tags."""
        labelled = zip(piece.starts, tags, strict=True)
        return [start * len(self.tags) + self.tags.index(tag) for start, tag in labelled if start >= 0]

    def pieces(self, source: str) -> list[Piece]:
        """Cut the words of a source line into pieces that the model can read, of one or more words."""
        return [Piece(*each) for each in self.tokenizer.encode_words(source.split(" "), self.longest)]

    def windows(self, source: str) -> list[Window]:
        """Cut the context of a question into windows that overlap by ``stride`` tokens."""
        question, context = read_question(source)
        found = list(self.tokenizer.encode_windows(question, context, self.longest, self.stride))
        return [
            Window(
                ids,
                begin,
                spans,
                first=0 if number == 0 or not spans else spans[0][0],
                end=len(context) if number + 1 == len(found) or not spans else spans[-1][1],
            )
            for number, (ids, begin, spans) in enumerate(found)
        ]

    def collate(
        self, sources: Sequence[ArrayLike], targets: Sequence[ArrayLike] | None, directions: ArrayLike
    ) -> SequenceBatch:
        """Make a batch of B sequences with their targets; ``directions`` are B direction ids."""
        assert targets is not None, "a target says which tokens are predicted at"
        chosen = np.asarray(directions, dtype=np.int64)
        rows = [np.asarray(each, dtype=np.int64) for each in sources]
        tokens = np.full((len(rows), max(map(len, rows))), self.tokenizer.padding, dtype=np.int64)
        real = np.zeros_like(tokens)
        labels = np.full(tokens.shape if self.tags else (len(rows), 2), IGNORED, dtype=np.int64)
        for i, (row, each) in enumerate(zip(rows, targets, strict=True)):
            target = np.asarray(each, dtype=np.int64)
            tokens[i, : len(row)], real[i, : len(row)] = row, 1
            if self.tags:
                places, numbers = np.divmod(target, len(self.tags))
                labels[i, places] = numbers
            else:
                real[i, int(target[0]) : len(row)] = 2
                labels[i] = target[1:]
        own = self.source_language[chosen]
        return SequenceBatch(*map(torch.from_numpy, (tokens, labels, real, own, own.copy(), chosen)))

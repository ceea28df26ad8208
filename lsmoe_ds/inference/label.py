"""Label lines with an encoder: tags for words, answers for questions; one line out for each line in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def label_all(
    engine: Labeller,
    direction: Direction,
    lines: Sequence[str],
    advance: Callable[[int], None] = lambda lines: None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """Label source lines (see :mod:`lsmoe_ds.data.labels`) in a language: the tags of the words between
    spaces, or the text of the answer.
    """
    form = form_of(engine.recipe.data, engine.languages, engine.vocabulary)
    assert isinstance(form, Labels)
    number = engine.languages.direction_id(direction)
    if form.tags:
        return _tag(engine, form, number, lines, advance, batch_tokens)
    return _answer(engine, form, number, lines, advance, batch_tokens)


def _tag(
    engine: Labeller,
    form: Labels,
    number: int,
    lines: Sequence[str],
    advance: Callable[[int], None],
    batch_tokens: int,
) -> list[str]:
    pieces = [(i, piece) for i, line in enumerate(lines) for piece in form.pieces(line)]
    found: dict[int, list[str]] = {}
    sequences = [(piece.ids, form.target_of(piece, ["O"] * len(piece.starts))) for _, piece in pieces]
    for at, logits in _logits(engine, form, number, sequences, batch_tokens):
        line, piece = pieces[at]
        best = logits.argmax(1)
        found[at] = ["O" if start < 0 else form.tags[best[start]] for start in piece.starts]
        advance(int(at + 1 == len(pieces) or pieces[at + 1][0] != line))
    tags: list[list[str]] = [[] for _ in lines]
    for at, (line, _) in enumerate(pieces):
        tags[line] += found[at]
    return [" ".join(each) for each in tags]


def _answer(
    engine: Labeller,
    form: Labels,
    number: int,
    lines: Sequence[str],
    advance: Callable[[int], None],
    batch_tokens: int,
) -> list[str]:
    windows = [(i, window) for i, line in enumerate(lines) for window in form.windows(line)]
    best: dict[int, tuple[float, tuple[int, int]]] = {}
    sequences = [(window.ids, [window.context, NOWHERE, NOWHERE]) for _, window in windows]
    for at, logits in _logits(engine, form, number, sequences, batch_tokens):
        number_of_line, window = windows[at]
        found = best_span(logits, window)
        if found is not None:
            best[number_of_line] = max(best.get(number_of_line, found), found)
        advance(int(at + 1 == len(windows) or windows[at + 1][0] != number_of_line))
    answers = []
    for i, line in enumerate(lines):
        start, end = best[i][1] if i in best else (0, 0)
        answers.append(" ".join(read_question(line)[1][start:end].split()))
    return answers


def best_span(logits: NDArray[Any], window: Window) -> tuple[float, tuple[int, int]] | None:
    """Return the best sum of the logits [2, T] of both ends, and the characters between; None of no context.

    An answer ends where it begins, or up to LONGEST_ANSWER tokens later.
    """
    count = len(window.spans)
    if not count:
        return None
    first, last = logits[:, window.context : window.context + count]
    tokens = np.arange(count) - np.arange(count)[:, None]  # from the first to the last
    sums = np.where((tokens >= 0) & (tokens < LONGEST_ANSWER), first[:, None] + last, -np.inf)
    begin, end = np.unravel_index(int(sums.argmax()), sums.shape)
    return float(sums[begin, end]), (window.spans[begin][0], window.spans[end][1])


@torch.inference_mode()
def _logits(
    engine: Labeller,
    form: Labels,
    number: int,
    sequences: Sequence[tuple[list[int], list[int]]],
    batch_tokens: int,
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield the index and the logits of each sequence, in batches of like length."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and len(sequences[order[end]][0]) * (end + 1 - start) <= batch_tokens:
            end += 1
        part = order[start:end]
        batch = form.collate(
            [sequences[i][0] for i in part], [sequences[i][1] for i in part], [number] * len(part)
        )
        logits = engine.logits_of(batch.to(engine.device)).float().cpu().numpy()
        yield from zip(part, logits, strict=True)
        start = end

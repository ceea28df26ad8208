"""The context that tells layers and methods the languages of a batch. B sentences, T positions, H hidden."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.methods.packing import Packing

SHARED = -1  # the "language" of sentences that use the parameters shared by all languages
# Which parameters a sentence uses. "specific": those of its languages. "shared": the shared ones. "both": the
# second half of the batch repeats the first and uses the shared ones. A method may define further routes.
Route = str
Notes = dict[str, list[Any]]  # one forward pass's notes by method, in the order in which the layers ran


T = TypeVar("T")


class Segment(NamedTuple):
    """Consecutive sentences of one language, from ``start`` to before ``stop``."""

    language: int  # its number, or SHARED
    start: int
    stop: int


class Chooser(Hashable, Protocol):
    """An object that chooses for each sentence a language, or SHARED."""

    def languages(self, context: LanguageContext) -> list[int]: ...


@dataclass
class LanguageContext:
    """Hold what the layers of one side need besides the hidden states of B sentences.

    With a ``packing`` each row of ``ids`` is one token; ``whole`` is the context of the B sentences.
    """

    ids: SentenceIds
    # [B, H]: in the decoder the mean of the encoder's output, for sentence routing
    summary: Tensor | None = None
    notes: Notes | None = None  # in training: what layers record for methods; see lsmoe_ds/methods/base.py
    route: Route = "specific"
    packing: Packing | None = None
    whole: LanguageContext | None = None
    _segments: dict[str | Chooser, list[Segment]] = field(default_factory=dict)
    _known: dict[Hashable, Any] = field(default_factory=dict)
    _places: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def select(self, index: Tensor) -> LanguageContext:
        """Return the context of the sentences in ``index``, in that order."""
        summary = None if self.summary is None else self.summary[index]
        return LanguageContext(self.ids.select(index), summary, self.notes, self.route)

    def pack(self, packing: Packing) -> LanguageContext:
        """Return the context of these sentences' real tokens, each as a row of its own."""
        ids = self.ids.select(packing.sentences)
        return LanguageContext(ids, self.summary, self.notes, self.route, packing, self)

    def note(self, method: str, value: Any) -> None:
        """Record a note for a method; does nothing outside training."""
        if self.notes is not None:
            self.notes.setdefault(method, []).append(value)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Call ``make`` once for each key and cache its result, for values that all layers share."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    def places(self, real: Tensor, sentences: int) -> Tensor:
        """Return the flat indices of the real positions in the first ``sentences`` rows of ``real`` [B, T].

        The first call for each ``real`` waits for the device; all layers of a side share its result.
        """
        if self.packing is not None:
            return self.once(("rows", sentences), lambda: torch.arange(sentences, device=real.device))
        held, found = self._places.get(sentences, (None, real))
        if held is not real:
            found = real[:sentences].reshape(-1).nonzero().squeeze(1)
            self._places[sentences] = real, found
        return found

    def sentences(self, rows: Tensor) -> Tensor:
        """Return the sentence of each of these rows of x [B, T, H], which with a packing are tokens."""
        return rows if self.packing is None else self.packing.sentences[rows]

    def sentence_count(self, rows: int) -> int:
        """Return how many sentences the first ``rows`` rows of x [B, T, H] are: all, or half of them."""
        return rows if self.packing is None else self.packing.sentence_count(rows)

    def mean(self, x: Tensor, real: Tensor) -> Tensor:
        """Average x [B, T, H] over the real positions of each sentence -> [B, H].

        ``x`` may be the first half of the rows.
        """
        return mean_of_real(x, real[: len(x)]) if self.packing is None else self.packing.mean(x)

    def spans(self, kind: str | Chooser, rows: int) -> list[Segment]:
        """Convert :meth:`segments` from sentences to token rows.

        ``rows`` is the number of rows of all sentences, which all have the same length.
        """
        segments = self.segments(kind)
        each = rows // segments[-1].stop if segments else 0
        return [Segment(language, start * each, stop * each) for language, start, stop in segments]

    def replay(self) -> AbstractContextManager[None]:
        """Return a context manager in which a layer can run a second time, for activation checkpointing.

        Inside, :meth:`once` knows what it knew before the first run, and notes are dropped, because the first
        run has recorded them. The second run reuses the result of :meth:`places`.
        """
        known = dict(self._known)

        @contextmanager
        def again() -> Iterator[None]:
            first = self.notes, self._known
            self.notes, self._known = None if self.notes is None else {}, known
            try:
                yield
            finally:
                self.notes, self._known = first

        return again()

    def segments(self, kind: str | Chooser) -> list[Segment]:
        """Split the batch into segments of consecutive sentences that use the same language.

        ``kind`` is the task that defines the language, such as "source" or "target", or a Chooser. The first
        call for each ``kind`` waits for the device.
        """
        if kind not in self._segments and self.packing is not None and self.whole is not None:
            starts, whole = self.packing.starts_on_host, self.whole.segments(kind)
            self._segments[kind] = [
                Segment(language, starts[start], starts[stop]) for language, start, stop in whole
            ]
        if kind not in self._segments:
            languages = self.ids.task(kind).tolist() if isinstance(kind, str) else kind.languages(self)
            specific = {"shared": 0, "both": len(languages) // 2}.get(self.route, len(languages))
            segments, start = [], 0
            for language, same in groupby(languages[:specific] + [SHARED] * (len(languages) - specific)):
                stop = start + sum(1 for _ in same)
                segments.append(Segment(language, start, stop))
                start = stop
            self._segments[kind] = segments
        return self._segments[kind]


def mean_of_real(x: Tensor, real: Tensor) -> Tensor:
    """Average x [B, T, H] over the positions where ``real`` [B, T] is true -> [B, H]; zero where none is.

    The result is at least float32, because routers read it.
    """
    total = (x * real[:, :, None]).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return total / real.sum(1, keepdim=True).clamp(min=1)

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

SHARED = -1  # stands for a language where the parameters shared by all languages are used
# Which parameters a sentence uses: "specific", those of its languages; "shared", the shared ones; "both": the
# second half of the sentences repeats the first and uses the shared ones; or one that a method knows.
Route = str
Notes = dict[str, list[Any]]  # of one forward pass, by method, in the order in which the layers ran


T = TypeVar("T")


class Segment(NamedTuple):
    """Consecutive sentences of one language, from ``start`` to before ``stop``."""

    language: int  # its number, or SHARED
    start: int
    stop: int


class Chooser(Hashable, Protocol):
    """What chooses a language for each sentence, or SHARED."""

    def languages(self, context: LanguageContext) -> list[int]: ...


@dataclass
class LanguageContext:
    """Hold what the layers of one side need besides the hidden states of B sentences."""

    ids: SentenceIds
    # [B, H]: in the decoder the mean of the encoder's output, for sentence routing
    summary: Tensor | None = None
    notes: Notes | None = None  # in training: what layers record for methods; see lsmoe_ds/methods/base.py
    route: Route = "specific"
    _segments: dict[str | Chooser, list[Segment]] = field(default_factory=dict)
    _known: dict[Hashable, Any] = field(default_factory=dict)
    _places: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def select(self, index: Tensor) -> LanguageContext:
        """Return the context of the sentences that ``index`` names, in that order."""
        summary = None if self.summary is None else self.summary[index]
        return LanguageContext(self.ids.select(index), summary, self.notes, self.route)

    def note(self, method: str, value: Any) -> None:
        """Record a note for a method; does nothing outside training."""
        if self.notes is not None:
            self.notes.setdefault(method, []).append(value)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` returned for this key first: what all layers find alike in the sentences."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    def places(self, real: Tensor, sentences: int) -> Tensor:
        """Return the index of the real positions among those of the first ``sentences`` of ``real`` [B, T].

        Waits for the device at the first call for each ``real``, which all layers of a side share.
        """
        held, found = self._places.get(sentences, (None, real))
        if held is not real:
            found = real[:sentences].reshape(-1).nonzero().squeeze(1)
            self._places[sentences] = real, found
        return found

    def spans(self, kind: str | Chooser, rows: int) -> list[Segment]:
        """Return the segments of :meth:`segments` as the rows of their tokens, of so many rows of all
        sentences, which have equally many each.
        """
        segments = self.segments(kind)
        each = rows // segments[-1].stop if segments else 0
        return [Segment(language, start * each, stop * each) for language, start, stop in segments]

    def replay(self) -> AbstractContextManager[None]:
        """Return a context inside which a layer that runs a second time finds what was known before its first
        run, and whose notes are dropped: it has left them the first time. Places of real positions are found
        once for both runs.
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
        """Split the batch into segments of equal "source" or "target" language, or of one that is chosen.

        Waits for the device at the first call for each ``kind``.
        """
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
    """Average [B, T, H] over the positions where ``real`` [B, T] is true -> [B, H]; zero where none is.

    In at least float32, as routers read it.
    """
    total = (x * real[:, :, None]).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return total / real.sum(1, keepdim=True).clamp(min=1)

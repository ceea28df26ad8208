"""Batches: the tensors of some sentence pairs, and the share of a step that a rank gets.

B sentences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lsmoe_ds.config.data import TagConvention
from lsmoe_ds.data.shuffling import Integers
from lsmoe_ds.directions import Languages, SentenceIds
from lsmoe_ds.languages import EOS, PAD

IGNORED = -100  # the label of a position of a sequence that is not learned


class Tags(Protocol):
    def tag_id(self, code: str, /) -> int: ...


class Batch:
    """Hold the int64 tensors that a model reads of B sentences; subclasses are frozen dataclasses.

    Ids of languages and directions are those of ``Languages``.
    """

    ignored: ClassVar[int]  # the label of what is not learned
    labels: torch.Tensor  # [B, T]
    source_language: torch.Tensor  # [B]
    target_language: torch.Tensor  # [B]
    direction: torch.Tensor  # [B]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments of the model's forward pass."""
        raise NotImplementedError

    @property
    def read(self) -> torch.Tensor:
        """Mask [B, T] of the positions at which predictions are made: true for tokens, false for padding."""
        raise NotImplementedError

    @property
    def source_read(self) -> torch.Tensor:
        """Mask [B, T] of the source positions: true for tokens, false for padding."""
        raise NotImplementedError

    @property
    def target_tokens(self) -> int:
        """Number of labels that are learned."""
        return int((self.labels != self.ignored).sum())

    @property
    def ids(self) -> SentenceIds:
        return SentenceIds(self.source_language, self.target_language, self.direction)

    def to(self, device: torch.device | str) -> Self:
        """Return the same on another device."""
        names = (field.name for field in fields(self))  # type: ignore[arg-type]
        return type(self)(**{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def pinned(self) -> Self:
        """Return the same in pinned memory."""
        names = (field.name for field in fields(self))  # type: ignore[arg-type]
        return type(self)(**{name: getattr(self, name).pin_memory() for name in names})

    def silent(self) -> Self:
        """Return a copy in which all labels are ignored, so that it adds nothing to the loss."""
        return replace(self, labels=torch.full_like(self.labels, self.ignored))  # type: ignore[type-var]


class Form(Protocol):
    """Turn sentence pairs into batches of a model, with the tokens that it needs around them."""

    @property
    def source_language(self) -> Integers:
        """Language ids [directions]."""
        ...

    @property
    def target_language(self) -> Integers: ...

    @property
    def given(self) -> int:
        """Number of target positions of each sentence that are given and not learned."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the recipe on which batches depend, by their keys."""
        ...

    def overhead(self, direction: int) -> tuple[int, int]:
        """Return how many positions a direction adds to the tokens of a source and of a target."""
        ...

    def collate(
        self, sources: Sequence[ArrayLike], targets: Sequence[ArrayLike] | None, directions: ArrayLike
    ) -> Batch:
        """Make a batch of B token sequences; ``directions`` are B direction ids.

        Without ``targets`` (translation) sequences end where the model begins to generate.
        """
        ...


@dataclass(frozen=True)
class PairBatch(Batch):
    """Sentence pairs of any directions for an encoder-decoder."""

    ignored = PAD

    source: torch.Tensor  # [B, Ts]  tag, tokens, EOS, PAD ...
    decoder_input: torch.Tensor  # [B, Tt]  EOS, given tag if any, tokens, PAD ...
    labels: torch.Tensor  # [B, Tt]  PAD for a given tag, tokens, EOS, PAD ...
    source_language: torch.Tensor  # [B]
    target_language: torch.Tensor  # [B]
    direction: torch.Tensor  # [B]

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SentenceIds]:
        return self.source, self.decoder_input, self.labels, self.ids

    @property
    def read(self) -> torch.Tensor:
        return self.decoder_input != PAD

    @property
    def source_read(self) -> torch.Tensor:
        return self.source != PAD


@dataclass(frozen=True)
class SequenceBatch(Batch):
    """Single sequences: prompts with their answers, or text with labels.

    They are padded at the end; prompts without answers, for translation, at the beginning.
    """

    ignored = IGNORED

    tokens: torch.Tensor  # [B, T]
    labels: torch.Tensor  # [B, T], or [B, 2]: first and last token of an answer
    real: torch.Tensor  # [B, T]: number of the segment, from 1; 0 at padding
    source_language: torch.Tensor  # [B]
    target_language: torch.Tensor  # [B]
    direction: torch.Tensor  # [B]

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SentenceIds]:
        return self.tokens, self.labels, self.real, self.ids

    @property
    def read(self) -> torch.Tensor:
        return self.labels != IGNORED

    @property
    def source_read(self) -> torch.Tensor:
        return self.real > 0


@dataclass(frozen=True)
class Step:
    """Hold one rank's share of a step, and the totals of the whole step over all ranks.

    The totals count tags and EOS, not padding. ``target_tokens`` counts the labels; ``given_tokens`` counts
    the tags before translations, which the decoder reads as well. ``away`` counts the units that are assigned
    to a rank without their expert group; it is 0 unless batches are task-affine.
    """

    batches: Sequence[Batch]
    target_tokens: int
    source_tokens: int
    sentences: int
    directions: list[int]
    away: int = 0
    given_tokens: int = 0

    def pinned(self) -> Step:
        """Return the same with the batches in pinned memory."""
        return replace(self, batches=[batch.pinned() for batch in self.batches])


@dataclass(frozen=True, eq=False)
class DirectionIds:
    """Tables (int64) of the ids that a batch holds for each direction id."""

    source_language: Integers  # [directions]
    target_language: Integers  # [directions]
    source_tag: Integers  # [directions] before a source
    begin: Integers  # [directions, 1 or 2] before a translation: EOS, and the tag that is given, if any

    @classmethod
    def of(cls, languages: Languages, vocabulary: Tags, tags: TagConvention = "target") -> DirectionIds:
        """Make the tables. Raises UserError if the vocabulary lacks a tag that is read."""
        ids = [(languages.id(d.source), languages.id(d.target)) for d in languages.directions]
        targets = [vocabulary.tag_id(d.target) for d in languages.directions]
        own = targets if tags == "target" else [vocabulary.tag_id(d.source) for d in languages.directions]
        begin = [[EOS] if tags == "target" else [EOS, tag] for tag in targets]
        return cls(
            *np.array(ids, dtype=np.int64).T, *(np.array(each, dtype=np.int64) for each in (own, begin))
        )

    @property
    def given(self) -> int:
        return self.begin.shape[1] - 1

    @property
    def settings(self) -> dict[str, Any]:
        return {"data.tags": "source-target" if self.given else "target"}

    def overhead(self, direction: int) -> tuple[int, int]:
        """Return 2, for the tag and EOS of a source, and the number of tokens that begin a translation."""
        return 2, self.begin.shape[1]

    def collate(
        self, sources: Sequence[ArrayLike], targets: Sequence[ArrayLike] | None, directions: ArrayLike
    ) -> PairBatch:
        """Make a batch of B token sequences without tag and EOS; ``directions`` are B direction ids.

        Without ``targets`` (translation) ``decoder_input`` holds the tokens that begin a translation [B, 1 or
        2], and ``labels`` are [B, 0].
        """
        chosen = np.asarray(directions, dtype=np.int64)
        flat, mask = flatten(sources)
        source = _padding(mask, 2)
        source[:, 1:-1][mask] = flat
        source[:, 0] = self.source_tag[chosen]
        source[np.arange(len(chosen)), mask.sum(axis=1) + 1] = EOS
        decoder_input, labels = self.begin[chosen], np.empty((len(chosen), 0), dtype=np.int64)
        if targets is not None:
            flat, mask = flatten(targets)
            begin = decoder_input.shape[1]
            labels = _padding(mask, begin)
            labels[:, begin - 1 : -1][mask] = flat
            labels[np.arange(len(chosen)), mask.sum(axis=1) + begin - 1] = EOS
            tokens = _padding(mask, 0)
            tokens[mask] = flat
            decoder_input = np.concatenate([decoder_input, tokens], axis=1)
        languages = self.source_language[chosen], self.target_language[chosen]
        arrays = source, decoder_input, labels, *languages, chosen
        return PairBatch(*(torch.from_numpy(array) for array in arrays))


def flatten(sequences: Sequence[Any]) -> tuple[Integers, NDArray[np.bool_]]:
    """Concatenate all tokens; return them, and a mask [B, longest] of the positions that they fill."""
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    flat = np.concatenate(sequences, dtype=np.int64, casting="unsafe")  # an empty list is of floats to numpy
    return flat, np.arange(lengths.max()) < lengths[:, None]


def _padding(mask: NDArray[np.bool_], more: int) -> Integers:
    return np.full((mask.shape[0], mask.shape[1] + more), PAD, dtype=np.int64)

"""Batches: the tensors of some sentence pairs, and the share of a step that a rank gets.

B sentences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lsmoe_ds.config.data import TagConvention
from lsmoe_ds.data.shuffling import Integers
from lsmoe_ds.languages import EOS, PAD, Languages, SentenceIds


class Tags(Protocol):
    def tag_id(self, code: str, /) -> int: ...


@dataclass(frozen=True)
class Batch:
    """Sentence pairs of any directions. All tensors are int64; ids of languages and directions are those of
    ``Languages``.
    """

    source: torch.Tensor  # [B, Ts]  tag, tokens, EOS, PAD ...
    decoder_input: torch.Tensor  # [B, Tt]  EOS, given tag if any, tokens, PAD ...
    labels: torch.Tensor  # [B, Tt]  PAD for a given tag, tokens, EOS, PAD ...
    source_language: torch.Tensor  # [B]
    target_language: torch.Tensor  # [B]
    direction: torch.Tensor  # [B]

    @property
    def target_tokens(self) -> int:
        """Number of labels that are not padding."""
        return int((self.labels != PAD).sum())

    @property
    def ids(self) -> SentenceIds:
        return SentenceIds(self.source_language, self.target_language, self.direction)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class Step:
    """One rank's share of a step, and the totals of the whole step over all ranks (tags and EOS counted,
    padding not).

    ``target_tokens`` are the labels; the decoder reads ``given_tokens`` more, the tags before translations.
    ``away`` units of the step are on a rank that is not the home of their expert group; 0 unless batches are
    task-affine.
    """

    batches: list[Batch]
    target_tokens: int
    source_tokens: int
    sentences: int
    directions: list[int]
    away: int = 0
    given_tokens: int = 0


@dataclass(frozen=True, eq=False)
class DirectionIds:
    """What a batch holds for each direction id, as tables of int64."""

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
    def overhead(self) -> tuple[int, int]:
        """Positions beside the tokens: tag and EOS around a source; what begins a translation, or its end."""
        return 2, self.begin.shape[1]


def collate(
    sources: Sequence[ArrayLike],
    targets: Sequence[ArrayLike] | None,
    directions: ArrayLike,
    ids: DirectionIds,
) -> Batch:
    """Make a batch of B token sequences without tag and EOS; ``directions`` are B direction ids.

    Without ``targets`` (translation) ``decoder_input`` is what translations begin with [B, 1 or 2], and
    ``labels`` are [B, 0].
    """
    chosen = np.asarray(directions, dtype=np.int64)
    flat, mask = _flatten(sources)
    source = _padding(mask, ids.overhead[0])
    source[:, 1:-1][mask] = flat
    source[:, 0] = ids.source_tag[chosen]
    source[np.arange(len(chosen)), mask.sum(axis=1) + 1] = EOS
    decoder_input, labels = ids.begin[chosen], np.empty((len(chosen), 0), dtype=np.int64)
    if targets is not None:
        flat, mask = _flatten(targets)
        begin = decoder_input.shape[1]
        labels = _padding(mask, begin)
        labels[:, begin - 1 : -1][mask] = flat
        labels[np.arange(len(chosen)), mask.sum(axis=1) + begin - 1] = EOS
        tokens = _padding(mask, 0)
        tokens[mask] = flat
        decoder_input = np.concatenate([decoder_input, tokens], axis=1)
    arrays = source, decoder_input, labels, ids.source_language[chosen], ids.target_language[chosen], chosen
    return Batch(*(torch.from_numpy(array) for array in arrays))


def _flatten(sequences: Sequence[Any]) -> tuple[Integers, NDArray[np.bool_]]:
    """Concatenate all tokens; return them, and a mask [B, longest] of the places that they fill."""
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    flat = np.concatenate(sequences, dtype=np.int64, casting="unsafe")  # an empty list is of floats to numpy
    return flat, np.arange(lengths.max()) < lengths[:, None]


def _padding(mask: NDArray[np.bool_], more: int) -> Integers:
    return np.full((mask.shape[0], mask.shape[1] + more), PAD, dtype=np.int64)

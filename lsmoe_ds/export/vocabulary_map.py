"""Make the vocabulary map of a direction: the target pieces that each source piece makes candidates.

CTranslate2 computes logits only of a batch's candidates. With large vocabularies this product is most of a
decoding step. Translations cannot contain pieces that are no candidates.

N sentence pairs, V pieces.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lsmoe_ds.data.prepared import PreparedData, TokenPairs, TokenStore
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.ctranslate2 import MAP
from lsmoe_ds.languages import EOS, UNK

PAIRS = 200_000  # of the training text; more change little
FREQUENT = 256  # pieces that are candidates of every sentence


@dataclass(frozen=True)
class VocabularyMap:
    """``always`` are the candidates of every sentence, ``by_piece`` those that each source piece adds."""

    always: NDArray[np.int64]
    by_piece: list[NDArray[np.int64]]  # [V]

    @classmethod
    def of(cls, data: PreparedData, direction: Direction, count: int) -> VocabularyMap:
        """Choose ``count`` candidates for each source piece from the training text of a direction.

        Raises UserError where it has none.
        """
        pairs = data.tokens(direction, "train")
        if not len(pairs):
            raise UserError(f"--vocabulary-map is made of training text, of which {direction} has none")
        tag = data.vocabulary.tag_id(direction.target)
        return associate(pairs, len(data.vocabulary), count, always=[EOS, UNK, tag])

    def candidates(self, source: Sequence[int]) -> NDArray[np.int64]:
        """Return the candidates of one sentence, in ascending order."""
        return np.unique(np.concatenate([self.always, *(self.by_piece[index] for index in source)]))

    def write(self, folder: Path, pieces: Sequence[str]) -> None:
        """Write CTranslate2's file: a line for each piece, and one without a piece for all sentences."""
        lines = [("", self.always), *zip(pieces, self.by_piece, strict=True)]
        text = "".join(f"{piece}\t{' '.join(pieces[index] for index in found)}\n" for piece, found in lines)
        (folder / MAP).write_text(text, encoding="utf-8")

    def measure(self, data: PreparedData, direction: Direction) -> dict[str, float]:
        """Measure on held-out text the candidates per sentence, and the percentage of reference pieces among
        them.

        Returns an empty mapping if there is no held-out text.
        """
        split = next((each for each in ("test", "dev") if data.lines(direction, each)), None)
        if split is None:
            return {}
        pairs, counts, covered, total = data.tokens(direction, split), 0, 0, 0
        for i in range(len(pairs)):
            found, wanted = self.candidates(pairs.source[i].tolist()), pairs.target[i]
            counts, total = counts + len(found), total + len(wanted)
            covered += int(np.isin(wanted, found).sum())
        return {
            "candidates_of_a_sentence": round(counts / len(pairs), 1),
            "references_covered": round(100 * covered / max(total, 1), 2),
        }


def associate(pairs: TokenPairs, size: int, count: int, always: Sequence[int] = ()) -> VocabularyMap:
    """Choose the target pieces that occur in the translations of each source piece more than by chance.

    They are ordered by the log-likelihood ratio of Dunning (1993) over the four cells k, a - k, b - k and
    N - a - b + k of N pairs: with both pieces, with the source piece alone (which a pairs have), with the
    target piece alone (b), with neither. Each piece also brings itself, as names and numbers are copied.
    """
    total = min(len(pairs), PAIRS)
    source, target = (_presence(store, total, size) for store in (pairs.source, pairs.target))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        both = torch.sparse.mm(source.t(), target).coalesce()
    (one, other), k = both.indices(), both.values().double()
    a, b = (torch.sparse.sum(each, 0).to_dense().double() for each in (source, target))
    together = k * total > a[one] * b[other]
    one, other, k = one[together], other[together], k[together]
    score = _log_likelihood_ratio(k, a[one], b[other], total).numpy()
    order = np.lexsort((-score, one.numpy()))
    of, chosen = one.numpy()[order], other.numpy()[order]
    starts = np.searchsorted(of, np.arange(size + 1))
    by_piece = [
        np.unique(np.append(chosen[start : min(start + count, end)], piece))
        for piece, (start, end) in enumerate(pairwise(starts))
    ]
    seen = int((b > 0).sum())
    frequent = b.topk(min(FREQUENT, seen)).indices.numpy()
    return VocabularyMap(np.unique(np.append(frequent, np.asarray(always, np.int64))), by_piece)


def _presence(store: TokenStore, total: int, size: int) -> Tensor:
    """Return a sparse matrix [N, V] with 1 where a sentence has a piece."""
    ends = np.asarray(store.offsets[: total + 1])
    ids = np.asarray(store.ids[: ends[-1]], np.int64)
    places = np.unique(np.repeat(np.arange(total), np.diff(ends)) * size + ids)
    index = torch.from_numpy(np.stack([places // size, places % size]))
    ones, shape = torch.ones(len(places)), (total, size)
    return torch.sparse_coo_tensor(index, ones, shape, is_coalesced=True, check_invariants=False)


def _log_likelihood_ratio(k: Tensor, a: Tensor, b: Tensor, total: int) -> Tensor:
    """Return the ratio of each pair of pieces; see :func:`associate`."""
    no_a, no_b = total - a, total - b
    cells = [(k, a, b), (a - k, a, no_b), (b - k, no_a, b), (no_a - b + k, no_a, no_b)]
    found = [torch.special.xlogy(seen, seen * total / (row * column)) for seen, row, column in cells]
    return 2 * torch.stack([each.nan_to_num(0.0) for each in found]).sum(0)

"""Multiply with the matrices of one language after another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.methods.context import LanguageContext

INPUTS, OUTPUTS, LENGTH = 16, 24, 5


def places_of(ranks: list[int]) -> list[slice]:
    ends = torch.tensor(ranks).cumsum(0).tolist()
    return [slice(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]


def context_of(languages: list[int]) -> LanguageContext:
    each = torch.tensor(languages)
    return LanguageContext(SentenceIds(each, each, each))


def one_after_another(
    x: Tensor, y: Tensor, down: Tensor, up: Tensor, places: list[slice], languages: list[int], columns: slice
) -> Tensor:
    """Return y + (x F^T) V of each sentence, on the columns that are used."""
    count = columns.stop - columns.start
    rows = []
    for sentence, language in enumerate(languages):
        own = slice(sentence * LENGTH, (sentence + 1) * LENGTH)
        product = x[own, :count] @ down[places[language], columns].t() @ up[places[language], columns]
        rows.append(y[own] + nn.functional.pad(product, (0, y.shape[1] - count)))
    return torch.cat(rows)

"""Cut sentence pairs into units (micro-batches) of similar lengths."""

from __future__ import annotations

import numpy as np

from lsmoe_ds.data.shuffling import Integers


def by_length(source: Integers, target: Integers, tokens: int) -> Integers:
    """Return an order of the pairs in which neighbors have similar lengths on both sides.

    Pairs are sorted into bands of source length with equally many tokens, and within a band by target length,
    alternately up and down, so that a unit across two bands does not mix the longest with the shortest.
    """
    order = np.argsort(source, kind="stable")
    total = np.cumsum((source + target)[order])
    bands = max(1, round(1.6 * (total[-1] / tokens) ** 0.5))
    band = np.empty_like(order)
    band[order] = np.minimum(total * bands // total[-1], bands - 1)
    return np.lexsort((np.where(band % 2, -target, target), band))


def cut(source: Integers, target: Integers, tokens: int) -> Integers:
    """Return the ends of consecutive units of at most ``tokens`` padded tokens.

    A longer pair is a unit of its own.
    """
    ends, start = [], 0
    while start < len(source):
        stop = start + max(1, tokens // int(source[start] + target[start]))
        padded = np.maximum.accumulate(source[start:stop]) + np.maximum.accumulate(target[start:stop])
        padded *= np.arange(1, len(padded) + 1)
        start += max(1, int(np.searchsorted(padded, tokens, side="right")))
        ends.append(start)
    return np.array(ends, dtype=np.int64)

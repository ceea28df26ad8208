"""Make validation batches from held-out pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lsmoe_ds.config.data import Batch as BatchSettings
from lsmoe_ds.data.batches import Batch, DirectionIds, Form, Tags
from lsmoe_ds.data.batching import Prepared, TokenPairs
from lsmoe_ds.data.units import by_length, cut
from lsmoe_ds.directions import Direction, Languages


def validation_batches(
    prepared: Prepared,
    languages: Languages,
    vocabulary: Tags,
    batch: BatchSettings,
    directions: Sequence[Direction] | None = None,
    split: str = "dev",
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    form: Form | None = None,
) -> Iterator[Batch]:
    """Yield every held-out pair once over all ranks, in batches of one direction, always the same.

    The first ``limit`` pairs of each of the ``directions`` (by default all) are used. None is left out: a
    pair longer than ``batch.tokens`` is a batch of its own. All ranks get equally many batches, because
    tokens are exchanged between them for their experts: a rank without a last batch gets one pair whose
    labels are all ignored. ``form`` is by default that of pairs with the target's tag.
    """
    form = form or DirectionIds.of(languages, vocabulary)
    units: list[tuple[int, TokenPairs, list[int]]] = []
    for direction in languages.directions if directions is None else directions:
        pairs = prepared.tokens(direction, split)
        number = languages.direction_id(direction)
        overhead = form.overhead(number)
        source = pairs.source.lengths[:limit].astype(np.int64) + overhead[0]
        target = pairs.target.lengths[:limit].astype(np.int64) + overhead[1]
        if len(source):
            order = by_length(source, target, batch.tokens)
            ends = cut(source[order], target[order], batch.tokens)
            parts = np.split(order, ends[:-1])
            units += [(number, pairs, part.tolist()) for part in parts]
    for first in range(0, len(units), world):
        real = first + rank < len(units)
        number, pairs, part = units[first + rank] if real else (*units[0][:2], units[0][2][:1])
        made = form.collate(
            [pairs.source[i] for i in part], [pairs.target[i] for i in part], [number] * len(part)
        )
        yield made if real else made.silent()

"""Validation takes each held-out pair once, whatever the number of ranks."""

from __future__ import annotations

import pytest
from support.invented_pairs import LANGUAGES, Vocabulary, prepare, same, sentences

from lsmoe_ds.config.data import Batch as BatchSettings
from lsmoe_ds.data.validation import validation_batches
from lsmoe_ds.directions import Direction


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("limit", [None, 25])
def test_validation_takes_every_pair_once(world: int, limit: int | None) -> None:
    prepared = prepare({"de-en": 101, "en-fr": 40, "en-zh_Hans": 3})
    prepared.pairs[Direction("en", "zh_Hans")].source.lengths[1] = 700  # longer than a batch
    batch = BatchSettings(tokens=512)
    ranks = [
        list(validation_batches(prepared, LANGUAGES, Vocabulary(), batch, limit=limit, rank=r, world=world))
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    real = [b for batches in ranks for b in batches if b.target_tokens]
    expected = [
        (i, n)
        for i, d in enumerate(LANGUAGES.directions)
        for n in range(min(len(prepared.pairs[d]), limit or 1000))
    ]
    assert sorted(s for b in real for s in sentences(b)) == expected
    assert all(len(b.direction.unique()) == 1 for b in real)
    assert all(b.source.numel() + b.labels.numel() <= 512 or len(b.source) == 1 for b in real)
    again = list(validation_batches(prepared, LANGUAGES, Vocabulary(), batch, limit=limit, world=world))
    assert all(same(a, b) for a, b in zip(again, ranks[0], strict=True))


def test_validation_of_some_directions() -> None:
    prepared = prepare({"de-en": 5, "en-fr": 6, "en-zh_Hans": 0})
    batches = validation_batches(
        prepared,
        LANGUAGES,
        Vocabulary(),
        BatchSettings(),
        [Direction("fr", "en"), Direction("en", "zh_Hans")],
    )
    assert [b.direction.tolist() for b in batches] == [[3] * 6]
    (nothing,) = validation_batches(
        prepared, LANGUAGES, Vocabulary(), BatchSettings(), [Direction("fr", "en")], rank=1, world=2
    )
    assert nothing.target_tokens == 0
    assert len(nothing.source) == 1
    assert not list(
        validation_batches(prepared, LANGUAGES, Vocabulary(), BatchSettings(), [Direction("en", "zh_Hans")])
    )

"""Batching: the plan is one, whoever asks; nothing is lost; the tensors are laid out as the model expects
them.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.invented_pairs import (
    LANGUAGES,
    SIZES,
    Pairs,
    Prepared,
    Store,
    Vocabulary,
    prepare,
    same,
    sentences,
    tensors,
)

from lsmoe_ds.config.data import Batch as BatchSettings
from lsmoe_ds.data.batches import EOS, PAD, DirectionIds, Step
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.data.units import by_length, cut
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError


def stream(
    prepared: Prepared | None = None,
    temperature: float = 5.0,
    seed: int = 1,
    rank: int = 0,
    world: int = 1,
    **batch: object,
) -> BatchStream:
    chosen = BatchSettings.model_validate({"tokens": 512, "count": 4, **batch})
    return BatchStream(prepared or prepare(), LANGUAGES, Vocabulary(), chosen, temperature, seed, rank, world)


def test_layout() -> None:
    ids = DirectionIds.of(LANGUAGES, Vocabulary())
    to_de, from_zh = (LANGUAGES.direction_id(Direction.parse(d)) for d in ("en-de", "zh_Hans-en"))
    batch = ids.collate([[10, 11, 12], np.array([13], dtype=np.uint16)], [[20], [21, 22]], [to_de, from_zh])
    assert batch.source.tolist() == [[5, 10, 11, 12, EOS], [4, 13, EOS, PAD, PAD]]
    assert batch.decoder_input.tolist() == [[EOS, 20, PAD], [EOS, 21, 22]]
    assert batch.labels.tolist() == [[20, EOS, PAD], [21, 22, EOS]]
    assert batch.source_language.tolist() == [LANGUAGES.id("en"), LANGUAGES.id("zh_Hans")]
    assert batch.target_language.tolist() == [LANGUAGES.id("de"), LANGUAGES.id("en")]
    assert batch.direction.tolist() == [to_de, from_zh]
    assert all(t.dtype == torch.int64 for t in tensors(batch))
    assert batch.target_tokens == 5
    assert same(batch.to("cpu"), batch)


def test_sources_only_and_empty_sentences() -> None:
    ids = DirectionIds.of(LANGUAGES, Vocabulary())
    batch = ids.collate([[], [9]], None, [0, 0])
    assert batch.source.tolist() == [[5, EOS, PAD], [5, 9, EOS]]
    assert batch.labels.shape == (2, 0) and batch.decoder_input.tolist() == [[EOS], [EOS]]
    assert ids.collate([[]], [[]], [0]).labels.tolist() == [[EOS]]


@pytest.mark.parametrize("kind", ["mixed", "homogeneous"])
def test_union_over_ranks_is_the_same(kind: str) -> None:
    prepared = prepare()
    whole = list(islice(stream(prepared, languages=kind), 30))
    for world in (2, 4):
        parts = [
            list(islice(stream(prepared, rank=rank, world=world, languages=kind), 30))
            for rank in range(world)
        ]
        for number, step in enumerate(whole):
            shares = [part[number] for part in parts]
            assert all(
                (s.target_tokens, s.source_tokens, s.sentences, s.directions) == totals(step) for s in shares
            )
            for unit, batch in enumerate(step.batches):
                assert same(batch, shares[unit % world].batches[unit // world])


def totals(step: Step) -> tuple[int, int, int, list[int]]:
    """Count the totals of a step in its tensors.

    One rank has all batches of the step.
    """
    directions = sorted({d for b in step.batches for d in b.direction.tolist()})
    sources = sum(int((b.source != PAD).sum()) for b in step.batches)
    return (
        sum(b.target_tokens for b in step.batches),
        sources,
        sum(len(b.source) for b in step.batches),
        directions,
    )


def test_seed_decides() -> None:
    first, again, other = (next(stream(seed=s)).batches for s in (1, 1, 2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


PREPARED = prepare({"de-en": 150, "en-fr": 40, "en-zh_Hans": 7})
STRAIGHT: dict[str, list[Step]] = {
    kind: list(islice(stream(PREPARED, languages=kind), 130)) for kind in ("mixed", "homogeneous")
}


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["mixed", "homogeneous"]),
    stop=st.integers(0, 120),
    world=st.sampled_from([1, 2, 4]),
    more=st.integers(1, 10),
)
def test_resume_is_exact(kind: str, stop: int, world: int, more: int) -> None:
    before = stream(PREPARED, rank=world - 1, world=world, languages=kind)
    for _ in range(stop):
        next(before)
    state = json.loads(json.dumps(before.state_dict()))
    after = stream(PREPARED, languages=kind)
    next(after)  # a position that loading must forget
    after.load_state_dict(state)
    assert after.state_dict() == before.state_dict()
    for step, expected in zip(islice(after, more), STRAIGHT[kind][stop:], strict=False):
        assert len(step.batches) == len(expected.batches) == 4
        assert all(same(a, b) for a, b in zip(step.batches, expected.batches, strict=True))
        assert totals(step) == totals(expected)


def test_resume_with_other_data_is_refused() -> None:
    state = stream().state_dict()
    stream(count=8).load_state_dict(state)
    with pytest.raises(UserError, match=r"data.batch.tokens 512, now it is 1024"):
        stream(tokens=1024).load_state_dict(state)
    with pytest.raises(UserError, match=r"training.seed 1, now it is 2"):
        stream(seed=2).load_state_dict(state)
    with pytest.raises(UserError, match=r"data.temperature 5.0, now it is 1.0"):
        stream(temperature=1.0).load_state_dict(state)
    with pytest.raises(UserError, match="training pairs"):
        stream(prepare({**SIZES, "en-fr": 401})).load_state_dict(state)


@pytest.mark.parametrize("kind", ["mixed", "homogeneous"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_shares_follow_temperature(kind: str, temperature: float) -> None:
    steps = islice(stream(temperature=temperature, languages=kind, tokens=1024), 400)
    counts = Counter(d for step in steps for b in step.batches for d in b.direction.tolist())
    weights = np.array([SIZES[d.bitext] for d in LANGUAGES.directions]) ** (1 / temperature)
    found = np.array([counts[i] for i in range(len(weights))]) / counts.total()
    assert np.allclose(found, weights / weights.sum(), rtol=0.15, atol=0.01)
    assert not np.allclose(found, 1 / 6, atol=0.02)


@pytest.mark.parametrize("kind", ["mixed", "homogeneous"])
def test_shares_hold_whatever_the_lengths(kind: str) -> None:
    """Sentences of 10 tokens, of 40, and of 10 among others that are left out."""
    stores = {
        "de-en": Store(np.full(1000, 10)),
        "en-fr": Store(np.array([10, 300] * 500)),
        "en-zh_Hans": Store(np.full(1000, 40)),
    }
    data = {d: Pairs(stores[d.bitext], stores[d.bitext]) for d in LANGUAGES.directions}
    batches = stream(Prepared(data), max_length=100, languages=kind)
    assert batches.skipped == {
        "en-de": 0,
        "de-en": 0,
        "en-fr": 500,
        "fr-en": 500,
        "en-zh_Hans": 0,
        "zh_Hans-en": 0,
    }
    counts = Counter(d for step in islice(batches, 400) for b in step.batches for d in b.direction.tolist())
    assert np.allclose([counts[i] / counts.total() for i in range(6)], 1 / 6, atol=0.02)


@pytest.mark.parametrize("kind", ["mixed", "homogeneous"])
def test_every_pair_once_in_an_epoch(kind: str) -> None:
    """After the chunk in which a direction has been through its data for the k-th time, each pair came k
    times or once more.
    """
    prepared = prepare({"de-en": 60, "en-fr": 200, "en-zh_Hans": 90})
    batches = stream(prepared, languages=kind, count=1, tokens=512)
    seen: Counter[tuple[int, int]] = Counter()
    checked = 0
    for step in islice(batches, 400):
        seen.update(sentences(step.batches[0]))
        for pool in batches._pools:
            if pool.plan is not None and pool.taken == len(pool.plan.units):
                for d in pool.directions.tolist():
                    counts = [
                        seen[d, i] for i in range(len(prepared.tokens(LANGUAGES.directions[d], "train")))
                    ]
                    assert max(counts) - min(counts) <= 1
                    checked += min(counts) >= 2
    assert checked >= 3


def test_epochs_differ_in_order() -> None:
    """Two chunks are an epoch here, and each batch holds one pair: it is not always the same pairs that come
    first.
    """
    chunk = 211
    pairs = Pairs(Store(np.full(2 * chunk, 8)), Store(np.full(2 * chunk, 8)))
    languages = Languages((Direction("en", "de"),))
    batches = BatchStream(
        Prepared({languages.directions[0]: pairs}), languages, Vocabulary(), BatchSettings(tokens=20), 1.0, 3
    )
    assert batches._pools[0].sentences == chunk
    numbers = [sentences(step.batches[0])[0][1] for step in islice(batches, 4 * chunk)]
    first, second = numbers[: 2 * chunk], numbers[2 * chunk :]
    assert sorted(first) == sorted(second) == list(range(2 * chunk))
    assert 0.3 * chunk < len(set(first[:chunk]) & set(second[:chunk])) < 0.7 * chunk
    assert 0.3 * chunk < sum(n < chunk for n in first[:chunk]) < 0.7 * chunk


def test_homogeneous_and_mixed() -> None:
    pure = [b for step in islice(stream(languages="homogeneous"), 50) for b in step.batches]
    assert all(len(b.direction.unique()) == 1 for b in pure)
    assert len({int(b.direction[0]) for b in pure}) == 6
    mixed = [b for step in islice(stream(tokens=1024), 50) for b in step.batches]
    assert np.mean([len(b.direction.unique()) for b in mixed]) > 3
    # Of one length only: nothing but the mixing itself decides which directions meet.
    even = Pairs(Store(np.full(500, 10)), Store(np.full(500, 10)))
    batches = stream(Prepared(dict.fromkeys(LANGUAGES.directions, even)))
    assert all(len(b.direction.unique()) > 2 for step in islice(batches, 20) for b in step.batches)


@pytest.mark.parametrize("kind", ["mixed", "homogeneous"])
@pytest.mark.parametrize("tokens", [512, 4096])
def test_budget_and_padding(kind: str, tokens: int) -> None:
    prepared = prepare({"de-en": 30000, "en-fr": 20000, "en-zh_Hans": 10000})
    steps = list(islice(stream(prepared, languages=kind, tokens=tokens, max_length=150), 60))
    batches = [b for step in steps for b in step.batches]
    padded = [b.source.numel() + b.labels.numel() for b in batches]
    assert max(padded) <= tokens
    assert max(max(b.source.shape[1], b.labels.shape[1]) for b in batches) <= 150
    assert sum(s.source_tokens + s.target_tokens for s in steps) / sum(padded) >= 0.9
    assert np.mean(padded) >= 0.85 * tokens
    widths = np.array([b.source.shape[1] for b in batches], dtype=float)
    assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 0.25  # lengths do not come in order


def test_nothing_of_a_chunk_is_lost_between_steps() -> None:
    """Steps of three units and of one take the same units: those left over at the end of a chunk come first
    in the next step.
    """
    one = [b for step in islice(stream(PREPARED, count=1), 300) for b in step.batches]
    three = [b for step in islice(stream(PREPARED, count=3), 100) for b in step.batches]
    assert all(same(a, b) for a, b in zip(one, three, strict=True))


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(
        UserError,
        match=(
            r"'data.batch.count' is 4, which the 3 data-parallel ranks cannot share evenly; allowed: 3, 6, 9"
        ),
    ):
        stream(world=3)
    with pytest.raises(UserError, match="no direction has a training pair"):
        stream(prepare(dict.fromkeys(SIZES, 0)))
    short, long = Store(np.ones(5)), Store(np.full(5, 20))
    data = {
        d: Pairs(long, long) if d.bitext == "en-zh_Hans" else Pairs(short, short)
        for d in LANGUAGES.directions
    }
    limits = "'data.batch.tokens' 16 and 'data.batch.max_length' 4"
    with pytest.raises(UserError, match=f"no training pair of direction en-zh_Hans fits into {limits}"):
        stream(Prepared(data), tokens=16, max_length=4)


@pytest.mark.parametrize("languages", ["mixed", "homogeneous"])
def test_direction_with_held_out_text_only_has_no_share(languages: str) -> None:
    steps = stream(prepare({**SIZES, "en-fr": 0}), languages=languages)
    directions = {i for _ in range(60) for i in next(steps).directions}
    zero = {LANGUAGES.directions.index(d) for d in LANGUAGES.directions if d.bitext == "en-fr"}
    assert zero and directions == set(range(len(LANGUAGES.directions))) - zero


@pytest.mark.parametrize(
    ("source", "target", "tokens", "skipped"),
    [
        # tag and EOS around the source, EOS after the target
        (8, 3, 100, 0), (9, 3, 100, 5), (3, 9, 100, 0), (3, 10, 100, 5), (8, 9, 20, 0), (8, 9, 19, 5),
    ],
)  # fmt: skip
def test_what_fits_into_a_batch(source: int, target: int, tokens: int, skipped: int) -> None:
    """``max_length`` is 10; of ten pairs five have these lengths, the others are short."""
    lengths = [np.array([2] * 5 + [length] * 5) for length in (source, target)]
    pairs = Pairs(*map(Store, lengths))
    languages = Languages((Direction("en", "de"),))
    limits = BatchSettings(tokens=tokens, max_length=10)
    found = BatchStream(Prepared({languages.directions[0]: pairs}), languages, Vocabulary(), limits, 1.0, 1)
    assert found.skipped == {"en-de": skipped}


def test_where_units_end() -> None:
    """Padded to the longest on each side: 3 + 4 twice is 14, 5 + 4 twice is 18; a pair beyond the limit has a
    unit of its own.
    """
    source, target = np.array([3, 3, 5, 5, 1, 30, 1]), np.array([4, 2, 4, 4, 1, 5, 1])
    assert cut(source, target, 18).tolist() == [2, 4, 5, 6, 7]
    assert cut(source, target, 17).tolist() == [2, 3, 4, 5, 6, 7]
    assert cut(source, target, 27).tolist() == [3, 5, 6, 7]
    assert cut(np.array([5, 5]), np.array([5, 5]), 20).tolist() == [2]
    assert cut(np.array([5, 5]), np.array([5, 5]), 19).tolist() == [1, 2]


def test_neighbors_have_like_lengths() -> None:
    """One band is in the order of target lengths; of two the first goes up and the second down."""
    source, target = np.array([1, 2, 3, 4]), np.array([9, 7, 8, 6])
    assert by_length(source, target, 1000).tolist() == [3, 1, 2, 0]
    source, target = np.array([1, 1, 8, 8]), np.array([9, 7, 1, 3])
    assert by_length(source, target, 24).tolist() == [1, 0, 3, 2]

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmoe_ds.config.data import HeldOut
from lsmoe_ds.data import keys as keys_module
from lsmoe_ds.data.held_out import HELD_OUT, Claims, choose, mixed, other, published, quota

Bitexts = dict[str, np.ndarray]


def keys_of(*sets: set[int]) -> Bitexts:
    return {f"b{i}": np.array(sorted(one), dtype=np.uint64) for i, one in enumerate(sets)}


def check(keys: Bitexts, quotas: dict[str, dict[str, int]], chosen: dict[str, dict[str, np.ndarray]]) -> None:
    sets = {split: set().union(*(c[split].tolist() for c in chosen.values())) for split in HELD_OUT}
    assert not sets["dev"] & sets["test"]
    for name, own in keys.items():
        for split in HELD_OUT:
            assert len(chosen[name][split]) <= quotas[name][split]
            assert set(chosen[name][split].tolist()) <= set(own.tolist())
        lost = len(set(own.tolist()) & (sets["dev"] | sets["test"]))
        assert lost <= sum(quotas[name].values()) + len(own) // 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 300), max_size=150), min_size=1, max_size=5),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 5),
)
def test_promises_of_choose(sets: list[set[int]], dev: int, test: int, seed: int) -> None:
    keys = keys_of(*sets)
    quotas = {name: {"dev": dev, "test": test} for name in keys}
    chosen = choose(keys, quotas, seed)
    check(keys, quotas, chosen)
    again = choose(keys, quotas, seed)
    assert all(np.array_equal(chosen[n][s], again[n][s]) for n in keys for s in HELD_OUT)


def test_sets_are_full_and_multi_way_parallel() -> None:
    keys = keys_of(set(range(1000)), set(range(500, 1500)), set(range(600, 2000)))
    quotas = {name: {"dev": 20, "test": 50} for name in keys}
    chosen = choose(keys, quotas, 1)
    for split, count in (("dev", 20), ("test", 50)):
        first = chosen["b0"][split]
        assert len(first) == count and all(np.array_equal(first, chosen[name][split]) for name in keys)
        assert set(first.tolist()) <= set(range(600, 1000))


def test_a_small_bitext_is_not_emptied_and_large_ones_still_get_theirs() -> None:
    keys = keys_of(set(range(2000)), set(range(2000)), set(range(40)))
    quotas = {"b0": {"dev": 100, "test": 150}, "b1": {"dev": 100, "test": 150}, "b2": {"dev": 4, "test": 4}}
    chosen = choose(keys, quotas, 1)
    assert [len(chosen["b0"][split]) for split in HELD_OUT] == [100, 150]
    check(keys, quotas, chosen)


def test_another_seed_chooses_others() -> None:
    keys = keys_of(set(range(1000)))
    quotas = {"b0": {"dev": 10, "test": 10}}
    assert not np.array_equal(choose(keys, quotas, 1)["b0"]["test"], choose(keys, quotas, 2)["b0"]["test"])


def test_ranges_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    keys = {name: np.unique(random.integers(0, 2**64, 3000, dtype=np.uint64)) for name in ("b0", "b1")}
    keys["b1"] = np.unique(np.concatenate([keys["b1"], keys["b0"][::3]]))
    quotas = {name: {"dev": 100, "test": 200} for name in keys}
    whole = choose(keys, quotas, 1)
    monkeypatch.setattr(keys_module, "KEYS_AT_ONCE", 500)
    parts = choose(keys, quotas, 1)
    assert all(np.array_equal(whole[n][s], parts[n][s]) for n in keys for s in HELD_OUT)


@pytest.mark.parametrize(
    ("dev", "test", "count", "expected"),
    [
        (100, 150, 40, (4, 4)),
        (100, 150, 39, (3, 3)),
        (100, 150, 9, (0, 0)),
        (100, 150, 1200, (100, 120)),
        (5, 0, 1000, (5, 0)),
    ],
)
def test_quotas(dev: int, test: int, count: int, expected: tuple[int, int]) -> None:
    assert quota(HeldOut(dev=dev, test=test), count) == dict(zip(HELD_OUT, expected, strict=True))


def test_chance_is_splitmix64() -> None:
    """Its first outputs from state 0, as its authors' code prints them."""
    zero = np.zeros(1, dtype=np.uint64)
    assert [int(mixed(zero, seed)[0]) for seed in (0, 1, 2)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_claims_know_which_set_a_key_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "BLOCK", 2)  # more keys than are looked up at once
    claims = Claims()
    claims.add("dev", np.array([7, 3], dtype=np.uint64), np.array([5], dtype=np.uint64))
    claims.add(published("test"), np.array([9, 2**64 - 1], dtype=np.uint64))
    claims.add(published("dev"), np.array([9, 11], dtype=np.uint64))
    keys = np.array([0, 3, 4, 5, 7, 8, 9, 2**64 - 1], dtype=np.uint64)
    assert claims.has(keys, "dev").tolist() == [False, True, False, True, True, False, False, False]
    assert claims.has(keys, "test").tolist() == [False] * 8
    assert claims.has(keys).tolist() == [False, True, False, True, True, False, True, True]
    assert (claims.count("dev"), claims.in_both()) == (3, 1)
    assert (other("dev"), other("test")) == ("test", "dev")

"""At ZeRO stage 2 gradients are right wherever rows lie, and whichever way a rank computes its experts."""

from __future__ import annotations

import pytest
from support.alternating import alternating
from support.gradients import gradients, static
from support.sameness import METHODS, close, recipe_for, whole

RANKS, EXPERTS = 4, 2  # each expert is on two ranks, whose gradients are added up


@pytest.fixture(scope="module")
def alone(pool):
    return pool.run(1, gradients, static(1, 0), ())


KERNELS = {"all": (0, 1, 2, 3), "none": (), "the first rank": (0,), "one of each expert's": (1, 2)}


@pytest.mark.parametrize(
    ("stage", "kernels", "buckets"), alternating((1, 2), KERNELS, [(None, 1), (700, 1), (700, 2)]), ids=str
)
def test_gradients_are_those_of_one_process(pool, alone, stage, kernels, buckets):
    (bucket, chunks), kernels = buckets, KERNELS[kernels]
    recipe = static(EXPERTS, stage, chunks)
    if bucket is not None:  # several buckets, at the borders of which ranks would wait for one another
        recipe.deepspeed["zero_optimization"]["reduce_bucket_size"] = bucket
    results = pool.run(RANKS, gradients, recipe, kernels, expert=EXPERTS)
    idle = [not any(rows) for _, _, rows, _ in results]
    assert idle == [False, True, True, False], "of two ranks with the same experts one has rows"
    for numbers, *_ in results:
        assert numbers == pytest.approx(alone[0][0], rel=1e-5)
    ours, theirs = whole(results, 1, 1), whole(alone, 1, 1)
    assert ours.keys() == theirs.keys() and any(".experts." in name for name in ours)
    for name, wanted in theirs.items():
        close(ours[name], wanted, name)


def test_a_gradient_that_a_rank_does_not_have_is_zero(pool, alone):
    results = pool.run(RANKS, gradients, static(EXPERTS, 2), (), True, False, expert=EXPERTS)
    assert len({len(order) for *_, order in results}) > 1, "some ranks have fewer"
    ours, theirs = whole(results, 1, 1), whole(alone, 1, 1)
    for name, wanted in theirs.items():
        close(ours[name], wanted, name)


ROUTINGS = ["static", "token", "sentence", "target", "mixed", "capacity", "distilled", "chunks"]
ORDERS = [(routing, kernels) for routing in ROUTINGS for kernels in ("all", "none")]
ORDERS += [(method, "all") for method in METHODS]


@pytest.mark.parametrize(("routing", "kernels"), ORDERS)
def test_gradients_arrive_in_the_same_order_on_all_ranks(pool, routing, kernels):
    """DeepSpeed takes that for granted."""
    recipe = static(EXPERTS, 2) if routing == "static" else recipe_for(routing, 1, EXPERTS, 2)
    _, *orders = zip(*pool.run(RANKS, gradients, recipe, KERNELS[kernels], True, expert=EXPERTS), strict=True)
    first, *others = orders[-1]
    assert len(set(first)) == len(first) > 20
    assert all(each == first for each in others)

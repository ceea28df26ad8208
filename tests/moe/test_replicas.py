"""Replicas of busy experts change who computes, and nothing of what is computed."""

from __future__ import annotations

import pytest
from support.alternating import alternating
from support.gradients import gradients, static
from support.recomputing import both
from support.sameness import (
    UNITS,
    VOCABULARY,
    assert_same,
    close,
    in_units,
    recipe_for,
    steps_of,
    train,
    whole,
)

from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.moe.load import assign, lent_experts
from lsmoe_ds.planning.plan import plan

# What the encoder's and the decoder's experts are, and of which tasks they have replicas.
TASK, STATIC = {"routing": "task", "task": "target"}, {"routing": "static", "task": "source"}
SIDES = {
    "target": (TASK | {"replicas": ["en"]}, TASK | {"replicas": ["en"]}),
    "pair": (
        {"routing": "task", "task": "pair", "top_k": 1, "replicas": ["de-en", "en-fr"]},
        {"routing": "task", "task": "pair", "replicas": ["en-ru"]},
    ),
    "static": (STATIC | {"replicas": ["en", "de"]}, STATIC | {"expert_groups": 2, "replicas": ["en"]}),
    "chunks": (
        TASK | {"replicas": ["en"], "chunks": 2},
        STATIC | {"expert_groups": 2, "replicas": ["en"], "chunks": 3},
    ),
    "all": (TASK | {"replicas": ["en", "de", "fr", "ru"]}, TASK | {"replicas": ["en", "de", "fr", "ru"]}),
    "mixed": ({"routing": "token"}, TASK | {"expert_groups": 2, "replicas": ["en"]}),
    "capacity": (TASK | {"replicas": ["en"], "capacity": {"training": 0.75}}, {"routing": "token"}),
    "distilled": (TASK | {"replicas": ["en"], "fuse_distillation": True}, TASK | {"replicas": ["en"]}),
}


def recipe_with(
    sides: str, tensor: int, expert: int, stage: int, replicas: bool = True, **training
) -> Recipe:
    given = recipe_for("target", tensor, expert, stage).model_dump(exclude_none=True)
    for side, own in zip(("encoder", "decoder"), SIDES[sides], strict=True):
        given["model"][side]["moe"] |= own if replicas else {**own, "replicas": None}
    given["training"] |= training
    return Recipe.model_validate(given)


@pytest.fixture(scope="module")
def alone(pool):
    known = {}

    def of(sides: str, units: int, **training):
        key = sides, units, str(training)
        if key not in known:
            known[key] = pool.run(1, train, in_units(units, recipe_with(sides, 1, 1, 1, **training)))
        return known[key]

    return of


CASES = [
    *((sides, 2, 1, 2, stage) for sides in ("target", "static") for stage in (0, 1, 2)),
    *((sides, 2, 1, 2, 1) for sides in ("pair", "all", "mixed", "capacity", "distilled")),
    *(("chunks", *layout) for layout in ((2, 1, 2, 2), (4, 2, 2, 1), (4, 1, 4, 0))),
    ("target", 2, 2, 2, 1),
    ("static", 2, 2, 2, 2),
    *((sides, 4, 1, 2, stage) for sides, stage in (("target", 2), ("pair", 1), ("distilled", 0))),
    *((sides, 4, 2, 2, stage) for sides, stage in (("target", 1), ("mixed", 2))),
    *((sides, 4, 2, 4, stage) for sides, stage in (("target", 2), ("static", 0))),
    *((sides, 4, 1, 4, stage) for sides, stage in (("target", 1), ("pair", 2), ("all", 2), ("capacity", 0))),
]
CASES.sort(key=lambda case: case[1:4])


@pytest.mark.parametrize(("sides", "world", "tensor", "expert", "stage"), CASES)
def test_layout_computes_what_one_process_computes(pool, alone, sides, world, tensor, expert, stage):
    units = 2 if tensor == world else UNITS
    recipe = in_units(units, recipe_with(sides, tensor, expert, stage))
    wanted = alone(sides, units)
    assert_same(pool.run(world, train, recipe, tensor=tensor, expert=expert), wanted, tensor)
    assert wanted[0][0][0][-1] > 0.5, "clipping must be tested"


@pytest.mark.parametrize(
    ("world", "tensor", "expert"), [(2, 1, 2), (4, 2, 4)], ids=["experts alone", "beside tensors"]
)
def test_adafactor_steps_the_same(pool, alone, world, tensor, expert):
    recipe = recipe_with("target", tensor, expert, 0, optimizer="adafactor")
    wanted = pool.run(1, train, recipe_with("target", 1, 1, 0, optimizer="adafactor"))
    assert_same(pool.run(world, train, recipe, tensor=tensor, expert=expert), wanted, tensor)


def losses_over_micro_batches(topology, recipe: Recipe) -> list[tuple]:
    """Losses, norms and what travelled in each of two steps."""
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    found = []
    for number, step in enumerate(steps_of(recipe, topology.data_rank, topology.data), 1):
        result = train_step(engine, step, number, recipe, topology)
        found.append((result.loss, result.grad_norm, result.exchanged))
    engine.destroy()
    return found


def rows_and_bytes(results) -> tuple[int, int]:
    first = results[0][0][2]
    return sum(side.rows for side in first.values()), sum(side.bytes for side in first.values())


def test_rows_stay_and_weights_travel(pool):
    """All tasks have replicas, so nothing travels but the counts and the weights, as the plan has them."""
    with_them, without = (recipe_with("all", 1, 2, 0, replicas=each) for each in (True, False))
    for recipe in (with_them, without):
        for side in (recipe.model.encoder, recipe.model.decoder):
            side.moe = side.moe.model_copy(update={"routing": "static"})
    found, other = (pool.run(2, losses_over_micro_batches, each, expert=2) for each in (with_them, without))
    assert found[0][0][0] == pytest.approx(other[0][0][0], rel=1e-6)
    rows, sent = rows_and_bytes(found)
    assert rows == 0 < rows_and_bytes(other)[0]
    planned = {each.side: each for each in plan(with_them, 2).exchanges}
    assert [each.token_bytes() for each in planned.values()] == pytest.approx([0, 0])
    each_forward = sum(each.lent_bytes for each in planned.values())
    assert each_forward == 2 * 8 * 4 * (2 * 16 * 24 + 16 + 24) / 2, "of two layers' 8 experts half the bytes"
    back = sum(each.lent_bytes_back for each in planned.values())
    assert back == each_forward, "in float32"
    counts = sum(each.layers * each.count_bytes for each in planned.values())
    assert sent == UNITS * (each_forward + back + counts), "of four micro-batches"


def test_an_expert_that_two_tasks_share_is_lent_once():
    """Eight tasks take two of eight experts each."""
    languages = recipe_with("pair", 1, 2, 1).languages
    pairs = MoE(experts=8, routing="static", task="pair", replicas=["de-en", "en-de"])
    assert assign(pairs, languages)[0] == [0, 1] and lent_experts(pairs, languages) == 4
    six = MoE(experts=6, routing="static", task="pair", replicas=[str(d) for d in languages.directions])
    assert lent_experts(six, languages) == 6


def lending_static(stage: int, replicas: list[str] | None) -> Recipe:
    recipe = static(2, stage)
    for side in (recipe.model.encoder, recipe.model.decoder):
        side.moe = side.moe.model_copy(update={"replicas": replicas})
    return recipe


KERNELS = {"all": (0, 1, 2, 3), "none": (), "the first rank": (0,), "one of each expert's": (1, 2)}


@pytest.mark.parametrize(("stage", "name", "bucket"), alternating((1, 2), KERNELS, (None, 700)))
def test_gradients_are_right_and_in_order_whichever_way_a_rank_computes(pool, name, stage, bucket):
    """Two ranks translate into German and two into English, whose experts all hold replicas of."""
    recipe, kernels = lending_static(stage, ["en"]), KERNELS[name]
    if bucket is not None:
        recipe.deepspeed["zero_optimization"]["reduce_bucket_size"] = bucket
    alone = pool.run(1, gradients, static(1, 0), ())
    results = pool.run(4, gradients, recipe, kernels, True, expert=2)
    for numbers, *_ in results:
        assert numbers == pytest.approx(alone[0][0], rel=1e-5)
    ours, theirs = whole(results, 1, 1), whole(alone, 1, 1)
    assert ours.keys() == theirs.keys()
    for parameter, wanted in theirs.items():
        close(ours[parameter], wanted, parameter)
    orders = [order for *_, order in results]
    if len(kernels) in (0, 4):  # as on ranks of one kind: DeepSpeed takes the order for granted
        assert len(set(orders[0])) == len(orders[0]) > 20 and all(each == orders[0] for each in orders)


@pytest.mark.parametrize(("world", "tensor", "expert", "stage"), [(2, 1, 2, 2), (4, 2, 2, 1), (4, 4, 4, 0)])
def test_activation_checkpointing_lends_again(pool, world, tensor, expert, stage):
    units = 2 if tensor == world else UNITS
    recipe = in_units(units, recipe_with("target", tensor, expert, stage, dropout=0.2))
    for without, again in pool.run(world, both, recipe, tensor=tensor, expert=expert):
        assert again[0] == without[0]
        for which in (1, 2):
            for name, (value, _) in without[which].items():
                assert (again[which][name][0] == value).all(), name


def test_in_bfloat16_sums_over_ranks_are_no_worse(pool):
    """Against float32, the gradients with replicas are about as far off as those without."""

    def half(replicas: bool) -> Recipe:
        recipe = lending_static(1, ["en"] if replicas else None)
        recipe.deepspeed = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
        return recipe

    exact = whole(pool.run(1, gradients, static(1, 0), ()), 1, 1)
    found, rival = (
        whole(pool.run(4, gradients, half(replicas), (), expert=2), 1, 1) for replicas in (True, False)
    )
    experts = [name for name in exact if ".experts." in name and exact[name].any()]
    errors = [
        sum(float((each[name] - exact[name]).norm()) ** 2 for name in experts) ** 0.5
        for each in (found, rival)
    ]
    assert 0 < errors[0] < 1.2 * errors[1]

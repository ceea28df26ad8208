"""Any layout of tensor, expert and data parallelism computes what one process computes."""

from __future__ import annotations

import re

import pytest
from support.sameness import (
    METHODS,
    UNITS,
    VOCABULARY,
    assert_same,
    in_units,
    recipe_for,
    steps_of,
    train,
    whole,
)

from lsmoe_ds.config.recipe import Recipe


@pytest.fixture(scope="module")
def alone(pool):
    """Return a function that trains on one process, once for each routing and number of units."""
    known = {}

    def of(routing: str, units: int):
        if (routing, units) not in known:
            known[routing, units] = pool.run(1, train, in_units(units, recipe_for(routing, 1, 1, 1)))
        return known[routing, units]

    return of


# (world, tensor, expert): every one that fits up to 4 processes.
LAYOUTS = [(2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2)]
LAYOUTS += [(4, tensor, expert) for tensor in (1, 2, 4) for expert in (1, 2, 4)]
ROUTINGS = ["token", "sentence", "target", "pair", "static", "mixed", "capacity"]
CASES = [(routing, *layout, 1) for routing in ROUTINGS for layout in LAYOUTS]
CASES += [
    ("token", 2, 1, 2, 2),
    ("pair", 4, 2, 2, 2),
    ("dense", 2, 2, 1, 1),
    ("dense", 4, 2, 1, 2),
    ("dense", 2, 1, 1, 0),
]
CASES += [
    (routing, *layout)
    for routing in METHODS
    for layout in ((2, 1, 1, 1), (2, 2, 1, 1), (2, 2, 2, 0), (4, 2, 1, 2), (4, 4, 4, 1), (4, 1, 4, 0))
]
CASES += [("distilled", 2, 2, 2, 1)]
CASES += [  # a rank with one sentence has chunks without rows
    *(
        ("chunks", *layout)
        for layout in ((2, 1, 2, 0), (2, 2, 2, 1), (4, 1, 2, 2), (4, 2, 2, 1), (4, 4, 4, 0))
    ),
    *(("pair in chunks", *layout) for layout in ((2, 1, 2, 1), (4, 1, 4, 2))),
    ("capacity in chunks", 2, 1, 2, 1),
]
CASES += [
    ("dense", 2, 2, 1, 0),
    ("target", 2, 1, 2, 0),
    ("token", 4, 2, 2, 0),
    ("target", 2, 2, 1, 0),
    ("sentence", 4, 1, 2, 0),
]

CASES.sort(key=lambda case: case[1:4])  # building groups takes a fifth of a case


@pytest.mark.parametrize(("routing", "world", "tensor", "expert", "stage"), CASES)
def test_layout_computes_what_one_process_computes(pool, alone, routing, world, tensor, expert, stage):
    units = 2 if tensor == world else UNITS  # no more than it takes, where one rank computes them all
    recipe = in_units(units, recipe_for(routing, tensor, expert, stage))
    for _, _, moe in recipe.model.moe_layers():
        assert expert == 1 or moe.experts // expert != expert, "or a rank's experts could be taken for ranks"
    wanted = alone(routing, units)
    found = pool.run(world, train, recipe, tensor=tensor, expert=expert)
    theirs = compare(found, wanted, tensor)
    experts = [name for name in theirs if re.search(r"\.experts\.\d+\.", name)]
    assert len(experts) == {"dense": 0, **dict.fromkeys(METHODS, 8 * 4)}.get(routing, 2 * 8 * 4)
    if routing.startswith("capacity"):
        assert all(0.1 < step[4] < 0.5 for step in wanted[0][0]), (
            "choices must be dropped, or capacity is not tested"
        )


# The last says whether layers are recomputed. One process is compared in tests/model/test_packing.py.
PACKED = [
    ("sentence", 2, 2, 1, 1, False),
    ("token", 2, 1, 2, 2, True),
    ("distilled", 2, 2, 2, 1, True),
    ("lora", 4, 2, 2, 1, False),
    ("target", 4, 4, 4, 0, False),
]


@pytest.mark.parametrize(("routing", "world", "tensor", "expert", "stage", "again"), PACKED)
def test_packed_sentences_compute_what_padded_ones_do(
    pool, alone, routing, world, tensor, expert, stage, again
):
    units = 2 if tensor == world else UNITS
    recipe = in_units(units, recipe_for(routing, tensor, expert, stage))
    recipe.training.packed, recipe.training.activation_checkpointing = True, again
    compare(pool.run(world, train, recipe, tensor=tensor, expert=expert), alone(routing, units), tensor)


def compare(found: list, wanted: list, tensor: int) -> dict:
    """Compare all ranks' steps with those of one process; return the weights of one process by name."""
    assert wanted[0][0][0][-1] > 0.5, (
        "the gradient must be large enough to be clipped, or clipping is not tested"
    )
    assert_same(found, wanted, tensor)
    return whole(wanted, 1, 2)


def weights_with(topology, recipe: Recipe, run_idle: bool) -> tuple[list[float | None], dict]:
    """Gradient norms and final weights of one process whose unused experts run over zero rows, or are filled
    in after.
    """
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    for _, layer in engine.module.moe_layers():
        layer.deepspeed_moe.experts.run_idle = run_idle
    norms = [
        train_step(engine, step, i + 1, recipe, topology).grad_norm
        for i, step in enumerate(steps_of(recipe, 0, 1))
    ]
    weights = {
        name: parameter.detach().float().numpy().copy()
        for name, parameter in engine.module.named_parameters()
    }
    engine.destroy()
    return norms, weights


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (0, True), (1, True), (2, True)])
def test_experts_without_tokens_are_updated_alike_however_their_gradients_come_to_be_zero(pool, stage, bf16):
    recipe = recipe_for("target", 1, 1, stage)
    recipe.deepspeed = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}
    for side in (recipe.model.encoder, recipe.model.decoder):
        side.moe.experts = 16  # four tasks use half of them at most
    (norms, weights), (filled_norms, filled) = (
        pool.run(1, weights_with, recipe, idle)[0] for idle in (True, False)
    )
    assert norms == filled_norms
    for name, value in weights.items():
        assert (value == filled[name]).all(), name

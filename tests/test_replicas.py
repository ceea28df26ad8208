"""Replicas of busy experts change who computes, and nothing of what is computed."""

from __future__ import annotations

import pytest
from test_sameness import UNITS, close, in_units, recipe_for, train, whole

from lsmoe_ds.config.recipe import Recipe

# What the encoder's and the decoder's experts are, and of which tasks they have replicas.
TASK, STATIC = {"routing": "task", "task": "target"}, {"routing": "static", "task": "source"}
SIDES = {
    "target": (TASK | {"replicas": ["en"]}, TASK | {"replicas": ["en"]}),
    "pair": (
        {"routing": "task", "task": "pair", "top_k": 1, "replicas": ["de-en", "en-fr"]},
        {"routing": "task", "task": "pair", "replicas": ["en-ru"]},
    ),
    "static": (STATIC | {"replicas": ["en", "de"]}, STATIC | {"expert_groups": 2, "replicas": ["en"]}),
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
    ("target", 2, 2, 2, 1),
    ("static", 2, 2, 2, 2),
    *((sides, 4, 1, 2, stage) for sides, stage in (("target", 2), ("pair", 1), ("distilled", 0))),
    *((sides, 4, 2, 2, stage) for sides, stage in (("target", 1), ("mixed", 2))),
    *((sides, 4, 2, 4, stage) for sides, stage in (("target", 2), ("static", 0))),
    *((sides, 4, 1, 4, stage) for sides, stage in (("target", 1), ("pair", 2), ("all", 2), ("capacity", 0))),
]
CASES.sort(key=lambda case: case[1:4])


def same(found, wanted, tensor: int) -> None:
    for rank in found:
        for numbers, expected in zip(rank[0], wanted[0][0], strict=True):
            assert numbers == pytest.approx(expected, rel=1e-5)
    for which, what in ((1, "gradient"), (2, "weight")):
        ours, theirs = whole(found, tensor, which), whole(wanted, 1, which)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            close(ours[name], theirs[name], f"{what} of {name}")


@pytest.mark.parametrize(("sides", "world", "tensor", "expert", "stage"), CASES)
def test_layout_computes_what_one_process_computes(pool, alone, sides, world, tensor, expert, stage):
    units = 2 if tensor == world else UNITS
    recipe = in_units(units, recipe_with(sides, tensor, expert, stage))
    wanted = alone(sides, units)
    same(pool.run(world, train, recipe, tensor=tensor, expert=expert), wanted, tensor)
    assert wanted[0][0][0][-1] > 0.5, "clipping must be tested"

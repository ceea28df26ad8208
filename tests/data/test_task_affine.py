"""Task-affine batches: one expert group each, the same whatever the layout, assigned to where their experts
live.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
)
from support.small_run import make_recipe

from lsmoe_ds.config.data import Batch as BatchSettings
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.assignment import affinity, assign
from lsmoe_ds.data.batches import Step
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.errors import UserError

GROUPS = [0, 0, 1, 1, 1, 1]  # of en-de, de-en, en-fr, fr-en, en-zh_Hans, zh_Hans-en
# Home groups of the ranks of each layout; in the last, two ranks hold copies of each group.
HOMES: dict[int, list[set[int]]] = {1: [{0, 1}], 2: [{0}, {1}], 4: [{0}, {1}, {0}, {1}]}
PREPARED = prepare()


def stream(
    rank: int = 0, world: int = 1, prepared: Prepared = PREPARED, count: int = 8, **others: Any
) -> BatchStream:
    batch = BatchSettings(tokens=512, count=count, languages=others.pop("languages", "task-affine"))
    others = {"groups": GROUPS, "at_home": HOMES[world], **others}
    return BatchStream(prepared, LANGUAGES, Vocabulary(), batch, 5.0, 1, rank, world, **others)


def layouts(world: int, steps: int) -> list[list[Step]]:
    """Return, for each step, the part of each rank."""
    return [
        list(ranks) for ranks in zip(*(islice(stream(r, world), steps) for r in range(world)), strict=True)
    ]


def contents(ranks: list[Step]) -> Counter[tuple[tuple[int, int], ...]]:
    return Counter(tuple(sentences(batch)) for step in ranks for batch in step.batches)


def test_units_are_the_same_in_every_layout_and_of_one_group() -> None:
    whole = layouts(1, 25)
    for world in (2, 4):
        for (one,), ranks in zip(whole, layouts(world, 25), strict=True):
            assert contents([one]) == contents(ranks)
            assert [len(step.batches) for step in ranks] == [8 // world] * world
            for step in ranks:
                assert (step.target_tokens, step.source_tokens, step.sentences) == (
                    one.target_tokens,
                    one.source_tokens,
                    one.sentences,
                )
                assert step.directions == one.directions
            away = sum(
                GROUPS[b.direction[0]] not in HOMES[world][r]
                for r, step in enumerate(ranks)
                for b in step.batches
            )
            assert {step.away for step in ranks} == {away}
    batches = [batch for (step,) in whole for batch in step.batches]
    held = [{GROUPS[d] for d in batch.direction.tolist()} for batch in batches]
    assert all(len(groups) == 1 for groups in held)
    assert {group for groups in held for group in groups} == {0, 1}
    assert np.mean([len(batch.direction.unique()) for batch in batches]) > 1.5  # directions of a group do mix
    assert all(step.away == 0 for (step,) in whole)  # one rank holds everything


def test_a_step_has_units_of_each_group_in_proportion() -> None:
    """Equal sentences: group 0 has 2 of 6 directions, so a step of 8 units has 8/3 of them, to rounding, and
    8/3 on average.
    """
    even = Pairs(Store(np.full(500, 10)), Store(np.full(500, 10)))
    equal = Prepared(dict.fromkeys(LANGUAGES.directions, even))
    found = [
        sum(GROUPS[b.direction[0]] == 0 for b in step.batches) for step in islice(stream(prepared=equal), 150)
    ]
    assert set(found) == {2, 3}
    assert np.mean(found) == pytest.approx(8 / 3, abs=0.12)
    # Where the groups are of equal weight and as many ranks hold each, every unit is at home.
    for world in (2, 4):
        balanced = stream(1, world, equal, groups=[0, 0, 0, 1, 1, 1])
        assert all(step.away == 0 and len(step.batches) == 8 // world for step in islice(balanced, 40))
    # Two ranks with one group of two: each of its units beyond half of the step is away.
    lopsided = islice(stream(0, 2, equal), 40)
    assert {step.away for step in lopsided} == {4 - 2, 4 - 3}


def test_places_in_a_step_do_not_follow_from_the_direction() -> None:
    """A homogeneous step is no longer sorted by direction: each of two ranks sees each."""
    batch = BatchSettings(tokens=512, count=2, languages="homogeneous")
    first = BatchStream(PREPARED, LANGUAGES, Vocabulary(), batch, 5.0, 1, 0, 2)
    seen = Counter(int(b.direction[0]) for step in islice(first, 120) for b in step.batches)
    assert set(seen) == set(range(6))


def best(groups: list[int], at_home: list[set[int]]) -> int:
    """Most units that can be at home, by trying every assignment."""
    share = len(groups) // len(at_home)
    slots = [rank for rank in range(len(at_home)) for _ in range(share)]
    assignments = set(itertools.permutations(slots)) if len(slots) <= 6 else ()
    return max(sum(g in at_home[r] for g, r in zip(groups, each, strict=True)) for each in assignments)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), ranks=st.sampled_from([1, 2, 3]), kinds=st.integers(1, 4))
def test_dealing_is_the_best_there_is(data: st.DataObject, ranks: int, kinds: int) -> None:
    share = data.draw(st.integers(1, 6 // ranks))
    groups = data.draw(st.lists(st.integers(0, kinds - 1), min_size=ranks * share, max_size=ranks * share))
    at_home = [data.draw(st.sets(st.integers(0, kinds - 1))) for _ in range(ranks)]
    assigned, away = assign(groups, at_home)
    assert [len(own) for own in assigned] == [share] * ranks
    assert sorted(unit for own in assigned for unit in own) == list(range(len(groups)))
    assert all(own == sorted(own) for own in assigned)
    assert away == sum(groups[unit] not in at_home[rank] for rank, own in enumerate(assigned) for unit in own)
    assert len(groups) - away == best(groups, at_home)
    assert (assigned, away) == assign(tuple(groups), [frozenset(home) for home in at_home])


def test_dealing_moves_a_chain_of_units() -> None:
    """The first two could stay where they are put first only at the cost of the last, which has one home."""
    assert assign([0, 1, 2], [{0, 2}, {0, 1}, {1}]) == ([[2], [0], [1]], 0)
    assert assign([0, 0, 0, 0, 1, 1], [{0}, {1}]) == ([[0, 1, 2], [3, 4, 5]], 1)
    many = [unit % 16 for unit in range(2048)]
    assert assign(many, [{2 * (rank % 8), 2 * (rank % 8) + 1} for rank in range(64)])[1] == 0


def affine_recipe(folder: Path, groups: int, expert: int, tensor: int = 1, kind: str = "pair") -> Recipe:
    moe = {"routing": "task", "task": kind, "experts": 12, "every": 1, "top_k": 1, "expert_groups": groups}
    recipe = make_recipe(folder, None, moe, tensor=tensor, expert=expert)
    recipe.data.batch.languages = "task-affine"
    return recipe


def test_homes_follow_the_layout(tmp_path: Path) -> None:
    def homes(groups: int, tensor: int, expert: int, data: int) -> list[set[int]]:
        recipe = affine_recipe(tmp_path, groups, expert, tensor)
        return [set(home) for home in affinity(recipe, recipe.languages, tensor, expert, data)[1] or []]

    assert homes(2, 1, 1, 2) == [{0, 1}, {0, 1}]
    assert homes(2, 1, 2, 4) == [{0}, {1}, {0}, {1}]
    assert homes(4, 1, 2, 2) == [{0, 1}, {2, 3}]
    assert homes(4, 2, 4, 2) == [{0, 1}, {2, 3}]  # world ranks 0, 1 and 2, 3
    assert homes(4, 2, 2, 2) == [{0, 1, 2, 3}, {0, 1, 2, 3}]  # tensor peers hold all experts between them
    assert homes(3, 2, 3, 3) == [{0, 1}, {2, 0}, {1, 2}]  # expert groups that straddle tensor groups


def test_groups_are_those_of_the_tasks(tmp_path: Path) -> None:
    for kind in ("pair", "target", "source"):
        recipe = affine_recipe(tmp_path, 2, 2, kind=kind)
        languages = recipe.languages
        groups, _ = affinity(recipe, languages, 1, 2, 2)
        assert groups is not None and set(groups) == {0, 1}
        of = dict(zip(languages.tasks(kind), languages.task_groups(kind, 2), strict=True))
        names = [{"pair": str(d), "target": d.target, "source": d.source}[kind] for d in languages.directions]
        assert groups == [of[name] for name in names]
    recipe.data.batch.languages = "mixed"
    assert affinity(recipe, languages, 1, 2, 2) == (None, None)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("stop", [0, 3, 17])
def test_resume_is_exact_and_in_another_layout(world: int, stop: int) -> None:
    before = stream(world - 1, world)
    for _ in range(stop):
        next(before)
    state = json.loads(json.dumps(before.state_dict()))
    straight = [step for (step,) in layouts(1, stop + 4)][stop:]
    after, there = stream(), stream(world - 1, world)
    next(after), next(there)  # positions that loading must forget
    after.load_state_dict(state)
    there.load_state_dict(state)
    for expected in straight:
        step, mine, again = next(after), next(before), next(there)
        assert all(same(a, b) for a, b in zip(step.batches, expected.batches, strict=True))
        assert all(same(a, b) for a, b in zip(mine.batches, again.batches, strict=True))
        assert mine.away == again.away


def test_resume_with_other_groups_is_refused() -> None:
    state = json.loads(json.dumps(stream().state_dict()))
    with pytest.raises(
        UserError,
        match=r"expert group of each direction \[0, 0, 1, 1, 1, 1\], now it is \[0, 0, 0, 0, 1, 1\]",
    ):
        stream(groups=[0, 0, 0, 0, 1, 1]).load_state_dict(state)
    with pytest.raises(UserError, match=r"data.batch.languages task-affine, now it is mixed"):
        stream(languages="mixed", groups=None, at_home=None).load_state_dict(state)
    other_homes = stream(at_home=[{1}])
    other_homes.load_state_dict(state)  # where the experts live may change
    assert other_homes.state_dict() == state


def test_a_group_without_training_pairs_has_no_unit() -> None:
    steps = stream(0, 2, prepare({**SIZES, "de-en": 0}))
    for step in islice(steps, 10):
        assert step.away == 4
        assert not {0, 1} & set(step.directions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": None}, "'data.batch.languages' is task-affine: expert groups and homes are given both"),
        ({"at_home": None}, "'data.batch.languages' is task-affine: expert groups and homes are given both"),
        ({"languages": "mixed"}, "'data.batch.languages' is mixed: expert groups and homes are given both"),
        ({"groups": [0, 1]}, "there are 2 expert groups for 6 directions"),
        ({"at_home": [{0}, {1}]}, "there are home groups of 2 ranks for 1 data-parallel ranks"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream(**change)

"""Assign the micro-batches of a step to data-parallel ranks, task-affine ones to ranks with their experts.

The micro-batches of a step are the same in every layout. Only their assignment depends on which rank holds
which experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import Languages
from lsmoe_ds.errors import UserError


def affinity(
    recipe: Recipe, languages: Languages, tensor: int, expert: int, data: int
) -> tuple[list[int], list[frozenset[int]]] | tuple[None, None]:
    """Return the expert group of each direction, and the home groups of each data-parallel rank.

    A rank's home groups are the expert groups that it or a tensor-parallel peer holds. ``tensor``, ``expert``
    and ``data`` are the sizes of the layout. Expert rank r of R holds experts [r E/R, (r + 1) E/R), so group
    g of G is on expert rank g R // G. World rank w, of data rank w // ``tensor``, has expert rank w % R.
    Returns (None, None) if the batches are not task-affine.
    """
    affine = recipe.model.affine
    if affine is None or recipe.data.batch.languages != "task-affine":
        return None, None
    of_task = languages.task_groups(affine.task, affine.expert_groups)
    groups = [of_task[languages.task_id(affine.task, direction)] for direction in languages.directions]
    lives = [group * expert // affine.expert_groups for group in range(affine.expert_groups)]
    held = [
        {rank % expert for rank in range(first, first + tensor)} for first in range(0, data * tensor, tensor)
    ]
    return groups, [frozenset(g for g, rank in enumerate(lives) if rank in ranks) for ranks in held]


def check_affinity(
    kind: str,
    directions: int,
    ranks: int,
    groups: Sequence[int] | None,
    at_home: Sequence[Collection[int]] | None,
) -> None:
    """Raise UserError unless groups and homes fit ``data.batch.languages``, the directions and the ranks.

    ``groups`` and ``at_home`` are the result of :func:`affinity`.
    """
    wanted = kind == "task-affine"
    if (groups is not None) != wanted or (at_home is not None) != wanted:
        raise UserError(
            f"'data.batch.languages' is {kind}: expert groups and homes are given both for task-affine, for "
            "others neither"
        )
    if groups is not None and len(groups) != directions:
        raise UserError(
            f"there are {len(groups)} expert groups for {directions} directions: give each direction one"
        )
    if at_home is not None and len(at_home) != ranks:
        raise UserError(
            f"there are home groups of {len(at_home)} ranks for {ranks} data-parallel ranks: give each rank "
            "its own"
        )


def assign(groups: Sequence[int], at_home: Sequence[Collection[int]]) -> tuple[list[list[int]], int]:
    """Assign micro-batches of the expert groups ``groups`` [count] to ranks with the home groups ``at_home``.

    Returns the micro-batches of each rank, in order, and the number of those away from home. Every rank gets
    ``count / ranks`` of them (``ranks`` must divide ``count``), and as many as possible are at home: a
    maximum matching. The result depends only on the arguments.
    """
    share = len(groups) // len(at_home)
    homes = {group: [rank for rank, own in enumerate(at_home) if group in own] for group in groups}
    assigned: list[list[int]] = [[] for _ in at_home]
    away: list[int] = []
    full: set[int] = set()  # groups without a place: all ranks that they can reach are full, and stay so
    for unit, group in enumerate(groups):
        if group in full or not _place(unit, groups, homes, assigned, share):
            full.add(group)
            away.append(unit)
    places = [rank for rank, own in enumerate(assigned) for _ in range(share - len(own))]
    for unit, rank in zip(away, places, strict=True):
        assigned[rank].append(unit)
    return [sorted(own) for own in assigned], len(away)


def _place(
    unit: int, groups: Sequence[int], homes: dict[int, list[int]], assigned: list[list[int]], share: int
) -> bool:
    """Place a micro-batch on one of its home ranks; return whether that was possible.

    If all its home ranks are full, other micro-batches move to other home ranks of theirs, along the shortest
    augmenting path. If there is no such path, nothing moves, and the matching is maximum.
    """
    # By rank: the micro-batch that enters it, and the rank that this one leaves.
    enters: dict[int, tuple[int, int | None]] = dict.fromkeys(homes[groups[unit]], (unit, None))
    queue = sorted(enters, key=lambda rank: len(assigned[rank]))  # the emptiest first
    for rank in queue:  # the queue grows meanwhile
        if len(assigned[rank]) < share:
            to: int | None = rank
            while to is not None:
                moved, left = enters[to]
                assigned[to].append(moved)
                if left is not None:
                    assigned[left].remove(moved)
                to = left
            return True
        for group, other in {groups[other]: other for other in assigned[rank]}.items():  # one of each
            for next_rank in homes[group]:
                if next_rank not in enters:
                    enters[next_rank] = other, rank
                    queue.append(next_rank)
    return False

"""How tasks load the expert-parallel ranks: which experts they use, and how much the busiest rank computes.

No torch here. E experts, K top-k, R expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import count_feed_forward
from lsmoe_ds.data.shares import SIDES, Shares, busy_tasks
from lsmoe_ds.directions import Languages
from lsmoe_ds.notices import listed


def assign(settings: MoE, languages: Languages) -> list[list[int]]:
    """Return the experts of each task under static routing, [tasks][K]."""
    groups = languages.task_groups(settings.task, settings.expert_groups)
    each, met, assigned = settings.experts // settings.expert_groups, [0] * settings.expert_groups, []
    for group in groups:
        first = met[group] * settings.top_k
        assigned.append([group * each + (first + k) % each for k in range(settings.top_k)])
        met[group] += 1
    return assigned


def is_placed(settings: MoE, ranks: int) -> bool:
    """Tell whether it is known before training which rank computes each task."""
    return settings.routing == "static" or (settings.by_task and settings.expert_groups % ranks == 0)


def busiest(
    settings: MoE, languages: Languages, shares: Sequence[float], ranks: int, replicated: Collection[int] = ()
) -> float:
    """Return the share of a layer's work that the busiest of R ranks does.

    ``shares`` [tasks] has the tasks' shares of tokens. ``replicated`` has the tasks whose experts have
    replicas; their work is even, since each rank computes its own tokens. The other tasks load the ranks of
    their experts, if these are known (:func:`is_placed`). Otherwise, with a learned router, the estimate
    assumes that the largest of them, with share s, has all its experts on one rank, which also does an even
    part of the rest::

        s + (1 - s) / R

    Routing by token or sentence is assumed to be even: the balance loss sees to that.
    """
    if not settings.by_task:
        return 1 / ranks
    if not is_placed(settings, ranks):
        largest = max((share for task, share in enumerate(shares) if task not in replicated), default=0.0)
        return largest + (1 - largest) / ranks
    loads, at_home = [0.0] * ranks, 0.0
    if settings.routing == "static":
        assigned = assign(settings, languages)
        lent = {expert for task in replicated for expert in assigned[task]}
        for experts, share in zip(assigned, shares, strict=True):
            for expert in experts:
                if expert in lent:
                    at_home += share / settings.top_k
                else:
                    loads[expert * ranks // settings.experts] += share / settings.top_k
    else:
        groups = languages.task_groups(settings.task, settings.expert_groups)
        for task, (group, share) in enumerate(zip(groups, shares, strict=True)):
            if task in replicated:
                at_home += share
            else:
                loads[group * ranks // settings.expert_groups] += share
    return max(loads) + at_home / ranks


def lent_experts(settings: MoE, languages: Languages) -> int:
    """Return the largest number of experts of a layer that have replicas; tasks may share experts."""
    tasks = settings.replicated(languages)
    if settings.routing == "static":
        assigned = assign(settings, languages)
        return len({expert for task in tasks for expert in assigned[task]})
    return min(settings.experts, settings.top_k * len(tasks))


@dataclass(frozen=True)
class Load:
    """The load of the busiest rank by one side's experts, as shares of all their work."""

    side: str
    even: float  # 1 / R
    tasks: list[str]  # the tasks whose experts have replicas
    share: float  # these tasks' share of the tokens, which do not travel
    busiest: float
    without: float  # the same without any replicas
    proposed: list[str]  # the tasks that ``replicas: auto`` chooses
    with_proposed: float
    placed: bool  # known before training; otherwise estimated for a learned router
    lent: int  # most values of replicas' weights, in all layers of the side
    largest: int  # the most of them in one layer

    @property
    def crowding(self) -> float:
        """Return the traveling rows that the busiest rank receives, as a multiple of an even part."""
        traveling = 1 - self.share
        return (self.busiest - self.share * self.even) / (traveling * self.even) if traveling > 1e-9 else 1.0

    def describe(self) -> str:
        """Describe which tasks have replicas, and how that changes the busiest rank's share."""
        about = "" if self.placed else "about "
        return (
            f"every rank computes the {self.side}'s experts of {listed(self.tasks)}, "
            f"{100 * self.share:.0f} % of its tokens, itself: the busiest rank does {about}"
            f"{100 * self.busiest:.0f} % of their work, without replicas {100 * self.without:.0f} %"
        )


def loads(recipe: Recipe, shares: Shares) -> list[Load]:
    """Return the load of each side that has experts; an empty list without expert parallelism.

    ``moe.replicas`` must not be ``auto``.
    """
    model, languages, ranks = recipe.model, recipe.languages, recipe.parallel.expert
    found = []
    for name in SIDES:
        side = model.encoder if name == "encoder" else model.decoder
        layers = [layer for layer in range(side.layers) if side.is_moe(layer)]
        if (moe := side.moe) is None or not layers or ranks == 1:
            continue
        of_tasks = shares.of_tasks(name, moe.task, languages)
        names = languages.tasks(moe.task)
        replicated = moe.replicated(languages)
        proposed = busy_tasks(of_tasks, moe, ranks) if moe.by_task else []
        count = lent_experts(moe, languages)
        lent = [count * count_feed_forward(model.hidden, side.width(layer)).total for layer in layers]
        found.append(
            Load(
                side=name,
                even=1 / ranks,
                tasks=[names[task] for task in replicated],
                share=sum(of_tasks[task] for task in replicated),
                busiest=busiest(moe, languages, of_tasks, ranks, replicated),
                without=busiest(moe, languages, of_tasks, ranks),
                proposed=[names[task] for task in proposed],
                with_proposed=busiest(moe, languages, of_tasks, ranks, proposed),
                placed=is_placed(moe, ranks),
                lent=sum(lent),
                largest=max(lent),
            )
        )
    return found

"""How tasks load the expert-parallel ranks: which experts they use, and what the busiest rank carries.

No torch here. E experts, K top-k, R expert-parallel ranks.
"""

from __future__ import annotations

from lsmoe_ds.config.moe import MoE
from lsmoe_ds.directions import Languages


def assign(settings: MoE, languages: Languages) -> list[list[int]]:
    """Return the experts of each task under static routing, [tasks][K]."""
    groups = languages.task_groups(settings.task, settings.expert_groups)
    each, met, assigned = settings.experts // settings.expert_groups, [0] * settings.expert_groups, []
    for group in groups:
        first = met[group] * settings.top_k
        assigned.append([group * each + (first + k) % each for k in range(settings.top_k)])
        met[group] += 1
    return assigned

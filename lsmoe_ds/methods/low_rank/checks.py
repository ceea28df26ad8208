"""Compare a section ``model.low_rank`` with the languages and the training of its recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lsmoe_ds.directions import GROUPS, Languages

if TYPE_CHECKING:
    from lsmoe_ds.config.recipe import Recipe, Training
    from lsmoe_ds.methods.low_rank.settings import LowRank


def check_pivot(section: LowRank, languages: Languages) -> None:
    """Raise ValueError unless the pivot of modular matrices is a language of the recipe."""
    if section.is_modular and section.pivot not in languages.codes:
        raise ValueError(
            f"'low_rank.pivot' is {section.pivot}, which is no language of the recipe "
            f"({', '.join(languages.codes)}): name the one that directions lead into and out of"
        )


def check_ranks(section: LowRank, languages: Languages) -> None:
    """Raise ValueError unless ``rank``, if it is a mapping, has each language or group with matrices."""
    if not isinstance(section.rank, dict):
        return
    by_group, pivot = bool(section.rank.keys() & set(GROUPS)), section.pivot if section.is_modular else None
    named, what = set(section.rank), "of the groups" if by_group else "of"
    if pivot in named:
        raise ValueError(f"'low_rank.rank' names {pivot}, the 'pivot', which has no matrices: leave it out")
    codes = [code for code in languages.codes if code != pivot]
    known = {languages.groups[code] for code in codes} if by_group else set(codes)
    if by_group:  # a group may have no language but the pivot
        named -= set(languages.groups.values()) - known
    if wrong := sorted(named ^ known):
        raise ValueError(
            f"'low_rank.rank' {'lacks' if wrong[0] in known else 'names'} {wrong[0]}: it must have "
            f"each {what} {', '.join(sorted(known))}"
        )


def learns_weights_alone(section: LowRank, training: Training) -> bool:
    """Tell whether nothing of the matrices trains but the weights by which they are merged."""
    indexes = section.index.keys() if isinstance(section.index, dict) else (section.index,)
    learns = section.merge is not None or "learned" in indexes
    return (
        learns
        and isinstance(training.trainable, list)
        and all(p.endswith("index") for p in training.trainable)
    )


def notices_of(section: LowRank, recipe: Recipe) -> Iterator[str]:
    """Yield what is unusual of a training of modular matrices."""
    if not section.is_modular:
        return
    if not any(section.pivot in (each.source, each.target) for each in recipe.trained):
        yield (
            f"no direction that trains leads into or out of low_rank.pivot, which is {section.pivot}: the "
            "matrices of source and target train together, with equal weights"
        )
    if section.merge is not None and recipe.training.start_from is None:
        yield (
            "low_rank.merge is learned and there is no training.start_from: matrices and weights train "
            "together from the beginning; the paper learns the weights of matrices that are trained already"
        )

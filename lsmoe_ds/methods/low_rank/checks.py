"""Compare a section ``model.low_rank`` with the model, the languages and the training of its recipe."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lsmoe_ds.config.places import describe_layers, patterns_of
from lsmoe_ds.config.shapes import LinearShape, shapes_of
from lsmoe_ds.directions import GROUPS, Languages

if TYPE_CHECKING:
    from lsmoe_ds.config.model import Model
    from lsmoe_ds.config.recipe import Recipe, Training
    from lsmoe_ds.methods.low_rank.pruning import Pruning
    from lsmoe_ds.methods.low_rank.settings import LowRank


def check_modular(section: LowRank) -> None:
    """Raise ValueError if ``index: modular`` is limited to patterns or has incompatible settings."""
    if not section.is_modular:
        raise ValueError("'index: modular' is for all sites: leave out the patterns")
    for key, given in (("fuse_distillation", section.fuse_distillation), ("prune", section.prune)):
        if given:
            raise ValueError(f"'index: modular' and '{key}' exclude each other: leave one out")


def check_pivot(section: LowRank, languages: Languages) -> None:
    """Raise ValueError unless the pivot of modular matrices is a language of the recipe."""
    if section.is_modular and section.pivot not in languages.codes:
        raise ValueError(
            f"'low_rank.pivot' is {section.pivot}, which is no language of the recipe "
            f"({', '.join(languages.codes)}): name the one that directions lead into and out of, or add its "
            "directions to 'data.directions'"
        )


def check_places(section: LowRank, sites: Sequence[LinearShape], model: Model) -> None:
    """Raise ValueError if no layer has matrices, or if a rank exceeds the longest side of all layers."""
    if not sites:
        at = ", ".join(patterns_of(section.at))
        every = f" in layers that 'every: {section.every}' chooses" if section.every > 1 else ""
        raise ValueError(
            f"'low_rank' has no place: no linear layer is at '{at}'{every} of {describe_layers(model)}, and "
            "feed-forwards with experts have none: choose another 'at' or 'every'"
        )
    widest = max(sites, key=lambda site: max(section.size(site)))
    limit, rank = max(section.size(widest)), max(section.ranks)
    if rank > limit:
        raise ValueError(
            f"'rank' is {rank}, but no layer that gets matrices has more than the {limit} inputs or outputs "
            f"of {widest.at}: give at most {limit}"
        )


def check_index(section: LowRank, sites: Sequence[LinearShape]) -> None:
    """Raise ValueError if a site with matrices has no index, or if a pattern of ``index`` applies to none."""
    decides = {section.pattern_at(site) for site in sites}
    if not isinstance(section.index, dict):
        return
    for index, patterns in section.index.items():
        if idle := [pattern for pattern in patterns if (index, pattern) not in decides]:
            raise ValueError(
                f"'index' gives {index} to '{idle[0]}', which decides for no layer: patterns before it do, "
                "or 'at' and 'every' place no matrices there: leave it out, or write it first"
            )


def check_ranks(section: LowRank, languages: Languages) -> None:
    """Raise ValueError if ``rank`` is a mapping that lacks a language or group with matrices."""
    if not isinstance(section.rank, dict):
        return
    by_group, pivot = bool(section.rank.keys() & set(GROUPS)), section.pivot if section.is_modular else None
    named, what = set(section.rank), "of the groups" if by_group else "of"
    if pivot in named:
        raise ValueError(f"'low_rank.rank' names {pivot}, the 'pivot', which has no matrices: leave it out")
    codes = [code for code in languages.codes if code != pivot]
    known = {languages.groups[code] for code in codes} if by_group else set(codes)
    if by_group:  # the pivot, which has no matrices, may be the only language of a group
        named -= set(languages.groups.values()) - known
    if wrong := sorted(named ^ known):
        raise ValueError(
            f"'low_rank.rank' {'lacks' if wrong[0] in known else 'names'} {wrong[0]}: it must have "
            f"each {what} {', '.join(sorted(known))}"
        )


def check_pruned(section: LowRank, prune: Pruning, languages: Languages) -> None:
    """Raise ValueError unless a language that ``prune`` names has matrices."""
    pruned = [code for code in languages.codes if prune.prunes(code, languages)]
    if not any(section.rank_of(code, languages) for code in pruned):
        raise ValueError("'low_rank.prune' has nothing to prune: its languages have rank 0")


def names_of(section: LowRank, model: Model, matrices: Collection[str]) -> Iterator[str]:
    """Yield the global names of the ``matrices``, flat or vertical, beside all linear layers."""
    for site in shapes_of(model):
        if section.is_at(site):
            assert isinstance(site, LinearShape)
            for choice in section.choices(site):
                middle = f"{choice.name}." if choice.name else ""
                yield from (f"{site.at}_{section.name}.{middle}{matrix}" for matrix in matrices)


def learns_weights_alone(section: LowRank, training: Training) -> bool:
    """Tell whether only the weights by which matrices are merged train, not the matrices."""
    indexes = section.index.keys() if isinstance(section.index, dict) else (section.index,)
    learns = section.merge is not None or "learned" in indexes
    return (
        learns
        and isinstance(training.trainable, list)
        and all(p.endswith("index") for p in training.trainable)
    )


def notices_of(section: LowRank, recipe: Recipe) -> Iterator[str]:
    """Yield notices about unusual settings of a training with pruned or modular matrices."""
    trainable = recipe.training.trainable
    if section.prune is not None and isinstance(trainable, list):
        names = list(names_of(section, recipe.model, section.prune.pruned))
        if not any(fnmatchcase(name, pattern) for pattern in trainable for name in names):
            yield (
                "low_rank.prune prunes nothing: training.trainable freezes all matrices that it would prune, "
                "and they stay as they begin"
            )
    if not section.is_modular or learns_weights_alone(section, recipe.training):
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

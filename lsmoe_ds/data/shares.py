"""Compute each task's share of the training tokens, and find the tasks busy enough for replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lsmoe_ds.config.model import Model, Side
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import SideName
from lsmoe_ds.data.comparison import MANIFEST
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError

SIDES: tuple[SideName, ...] = ("encoder", "decoder")
BUSY = 0.5  # only a task with more than this part of a rank's fair share of tokens gets replicas


@dataclass(frozen=True)
class Shares:
    """The share of the source and of the target tokens that each trained direction has.

    ``known`` is true if they come from prepared data; otherwise all directions count alike.
    """

    source: Mapping[Direction, float]
    target: Mapping[Direction, float]
    known: bool

    def of_tasks(self, side: SideName, kind: str, languages: Languages) -> list[float]:
        """Return the share of a side's tokens that each task of a kind has, [tasks]."""
        found = [0.0] * len(languages.tasks(kind))
        for direction, share in (self.source if side == "encoder" else self.target).items():
            found[languages.task_id(kind, direction)] += share
        return found


def shares_of(recipe: Recipe, data: PreparedData | None) -> Shares:
    """Return the shares of tokens in the long run.

    A direction of n pairs is sampled in proportion to n^(1 / temperature); its tokens are the mean of its
    pairs, with tag and EOS. Pairs that are too long for a batch, which training leaves out, are counted.
    """
    source, target = {}, {}
    for direction in recipe.trained:
        source[direction] = target[direction] = 1.0
        if data is not None:
            train, own = data.manifest["bitexts"][direction.bitext]["train"], data.lines(direction, "train")
            pairs = train["pairs"]
            drawn = own ** (1 / recipe.data.temperature) if own else 0.0
            tokens = [train["sides"][code]["tokens"] for code in (direction.source, direction.target)]
            of_source, of_target = (count / max(pairs, 1) for count in tokens)
            source[direction], target[direction] = drawn * (of_source + 2), drawn * (of_target + 1)
    return Shares(_scaled(source), _scaled(target), data is not None)


def _scaled(tokens: Mapping[Direction, float]) -> dict[Direction, float]:
    total = sum(tokens.values()) or 1.0
    return {direction: each / total for direction, each in tokens.items()}


def planned_shares(recipe: Recipe) -> Shares:
    """Return the shares from a recipe's prepared data; all directions alike if there are none that fit it."""
    if not (recipe.prepared / MANIFEST).is_file():
        return shares_of(recipe, None)
    try:
        return shares_of(recipe, PreparedData.of(recipe))
    except UserError:
        return shares_of(recipe, None)


def busy_tasks(shares: Sequence[float], settings: MoE, ranks: int) -> list[int]:
    """Return the tasks whose experts are worth replicas, ascending.

    Such a task has more than half of a rank's fair share (1 / ``ranks`` of all tokens), and more than the
    mean task. The largest tasks are chosen, as long as their experts are no more than a rank itself holds,
    but at least one.
    """
    least = max(BUSY / ranks, 1 / max(1, sum(map(bool, shares))))
    busy = [task for task, share in enumerate(shares) if share > least]
    most = max(1, settings.experts // ranks // settings.top_k)
    return sorted(sorted(busy, key=lambda task: (-shares[task], task))[:most])


def asks_for_replicas(model: Model) -> bool:
    """Tell whether the recipe leaves the choice of tasks with replicas to the data (``auto``)."""
    return any(moe.replicas == "auto" for _, _, moe in model.moe_layers())


def with_named_replicas(recipe: Recipe, shares: Shares | None = None) -> Recipe:
    """Replace ``moe.replicas: auto`` by the names of the busy tasks.

    ``shares`` are by default read from the prepared data. A recipe that names its tasks is returned as it is.
    Raises UserError if the data are not prepared.
    """
    if not asks_for_replicas(recipe.model):
        return recipe
    if shares is None:
        shares = shares_of(recipe, PreparedData.of(recipe))
    changed: dict[str, Side] = {}
    for name in SIDES:
        side = recipe.model.encoder if name == "encoder" else recipe.model.decoder
        if side.moe is not None and side.moe.replicas == "auto":
            moe = side.moe.model_copy(update={"replicas": _named(name, side.moe, recipe, shares)})
            changed[name] = side.model_copy(update={"moe": moe})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changed)})


def _named(side: SideName, moe: MoE, recipe: Recipe, shares: Shares) -> list[str]:
    ranks = recipe.parallel.expert
    if ranks == 1:
        return []  # it holds all experts
    of_tasks, names = shares.of_tasks(side, moe.task, recipe.languages), recipe.languages.tasks(moe.task)
    return [names[task] for task in busy_tasks(of_tasks, moe, ranks)]

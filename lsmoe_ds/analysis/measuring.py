"""Measure on held-out text which experts a model's tasks use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsmoe_ds.analysis.routing import LayerRouting, Routing
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.console import progress
from lsmoe_ds.data.batches import DirectionIds
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import Loaded
from lsmoe_ds.languages import is_english

if TYPE_CHECKING:
    from lsmoe_ds.moe.layer import Seen

SENTENCES = 200  # of each direction
BATCH = 32
USED_PAIRS, LARGE_BATCH = 1000, 256  # pairs of a direction, and of a batch, each of which may read experts
MULTIWAY_LEAST = 20  # common sentences; fewer say little about a task


@dataclass
class Counts:
    """Count what the experts of one layer receive, in choices: K per token."""

    received: Tensor  # [tasks, E] float64
    tokens: Tensor  # [tasks] int64
    choices: int = 0

    @classmethod
    def none(cls, tasks: int, experts: int) -> Counts:
        return cls(torch.zeros(tasks, experts, dtype=torch.float64), torch.zeros(tasks, dtype=torch.int64))

    def add(self, seen: Seen) -> None:
        """Add the routes of S tokens; expert -1 marks a choice dropped by capacity."""
        chosen = seen.routes.experts.cpu()
        number, experts = self.received.shape
        tasks = seen.tasks.cpu()
        places = (tasks[:, None] * experts + chosen)[chosen >= 0]
        self.received += torch.bincount(places, minlength=number * experts).view(number, experts)
        self.tokens += torch.bincount(tasks, minlength=number)
        self.choices += chosen.numel()


def measure_routing(loaded: Loaded, data: PreparedData, split: str) -> Routing:
    """Measure the expert shares of each MoE layer over held-out pairs, up to 200 from every direction.

    A task without pairs is left out. Under task routing, where the shares are the router's probabilities,
    only a task without a direction in the recipe is left out.

    If at least 20 English sentences are common to all bitexts, all directions are measured on the same
    sentences, as in "Beyond Distillation", section 5.4, so that their meaning makes no difference. Otherwise
    each direction is measured on its own sentences.
    """
    pairs, multiway = choose_pairs(data, loaded.languages, split)
    with observed(loaded) as counts:
        run_pairs(loaded, data, split, pairs)
    layers = [layer_routing(loaded, *place, counts[place[:2]]) for place in loaded.recipe.model.moe_layers()]
    return Routing(split, multiway, sum(map(len, pairs.values())), tuple(layers))


def choose_pairs(
    data: PreparedData, languages: Languages, split: str
) -> tuple[dict[Direction, list[int]], int | None]:
    """Choose the pairs of each direction, as indexes into its held-out text.

    Also returns their number per direction if all directions have the same sentences, otherwise None.
    """
    places: dict[str, dict[str, int]] = {}
    for direction in languages.directions:
        if direction.bitext not in places and (is_english(direction.source) or is_english(direction.target)):
            source, target = data.text(direction, split)
            english = source if is_english(direction.source) else target
            # If a sentence occurs twice, its first place counts.
            places[direction.bitext] = {
                sentence: place for place, sentence in reversed(list(enumerate(english)))
            }
    if all(direction.bitext in places for direction in languages.directions):
        first, *others = places.values()
        common = sorted((s for s in first if all(s in other for other in others)), key=first.__getitem__)[
            :SENTENCES
        ]
        if len(common) >= MULTIWAY_LEAST:
            return {
                d: [places[d.bitext][sentence] for sentence in common] for d in languages.directions
            }, len(common)
    return {d: list(range(min(len(data.tokens(d, split)), SENTENCES))) for d in languages.directions}, None


@contextmanager
def observed(loaded: Loaded) -> Iterator[dict[tuple[str, int], Counts]]:
    """Count, by side and layer, the routes of all tokens that pass through the model inside the block."""
    counts = {
        (side, layer): Counts.none(len(loaded.languages.tasks(moe.task)), moe.experts)
        for side, layer, moe in loaded.recipe.model.moe_layers()
    }
    with observing(loaded, lambda place, seen: counts[place].add(seen)):
        yield counts


@contextmanager
def observing(loaded: Loaded, see: Callable[[tuple[str, int], Seen], None]) -> Iterator[None]:
    """Call ``see`` with side and layer, and with what each MoE layer does inside the block."""
    modules = {
        (side, layer): loaded.model.get_submodule(f"{side}.{layer}.feed_forward")
        for side, layer, _ in loaded.recipe.model.moe_layers()
    }
    for place, module in modules.items():
        module.observer = partial(see, place)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules.values():
            module.observer = None  # type: ignore[assignment]


@torch.inference_mode()
def run_pairs(
    loaded: Loaded,
    data: PreparedData,
    split: str,
    chosen: dict[Direction, list[int]],
    size: int = BATCH,
    advance: Callable[[int], None] = lambda pairs: None,
) -> None:
    """Run the model over held-out pairs, in batches of one direction and of at most ``size`` pairs.

    ``advance`` is called with the number of pairs of each batch.
    """
    ids = DirectionIds.of(loaded.languages, loaded.vocabulary, loaded.recipe.data.tags)
    for direction, places in chosen.items():
        pairs, number = data.tokens(direction, split), loaded.languages.direction_id(direction)
        for start in range(0, len(places), size):
            part = places[start : start + size]
            batch = ids.collate(
                [pairs.source[i] for i in part], [pairs.target[i] for i in part], [number] * len(part)
            )
            batch = batch.to(loaded.device)
            loaded.model(batch.source, batch.decoder_input, batch.labels, batch.ids, loaded.route)
            advance(len(part))


def measure_use(loaded: Loaded, data: PreparedData, direction: Direction) -> dict[tuple[str, int], Tensor]:
    """Return, by side and layer, the mean weight by which a token of a direction's dev set uses each expert.

    Values [E] are float64; their sum is 1, or with top-1 routing the mean probability of the first choice.
    Raises UserError for a direction without dev text.
    """
    places = list(range(min(len(data.tokens(direction, "dev")), USED_PAIRS)))
    if not places:
        raise UserError(f"{direction} has no dev text, on which its use of experts is measured")
    uses = {
        (side, layer): torch.zeros(moe.experts, dtype=torch.float64)
        for side, layer, moe in loaded.recipe.model.moe_layers()
    }
    tokens = dict.fromkeys(uses, 0)

    def see(place: tuple[str, int], seen: Seen) -> None:
        experts, weights = seen.routes.experts.reshape(-1).cpu(), seen.routes.weights.reshape(-1).cpu()
        kept = experts >= 0  # -1 marks a choice dropped by capacity
        uses[place].index_add_(0, experts[kept], weights[kept].double())
        tokens[place] += len(seen.tokens)

    with observing(loaded, see), progress("measuring which experts are used", len(places)) as advance:
        run_pairs(loaded, data, "dev", {direction: places}, LARGE_BATCH, advance)
    return {place: use / tokens[place] for place, use in uses.items()}


def layer_routing(loaded: Loaded, side: str, layer: int, moe: MoE, counts: Counts) -> LayerRouting:
    names, received = loaded.languages.tasks(moe.task), counts.received
    kept, shares = received.sum(1) > 0, received / received.sum(1, keepdim=True)
    if moe.routing == "task":
        trained = torch.tensor(
            [loaded.languages.task_id(moe.task, direction) for direction in loaded.languages.directions]
        )
        kept = torch.zeros_like(kept).index_fill(0, trained, True)
        shares = task_probabilities(loaded, side, layer)
    total = float(received.sum())
    return LayerRouting(
        side,
        layer,
        moe.experts,
        moe.top_k,
        moe.routing,
        moe.task,
        tuple(name for name, keep in zip(names, kept.tolist(), strict=True) if keep),
        tuple(tuple(row) for row in shares[kept].tolist()),
        tuple(counts.tokens[kept].tolist()) if counts.choices else None,
        tuple((received.sum(0) / total).tolist()) if total else None,
        1 - total / counts.choices if counts.choices else None,
    )


def task_probabilities(loaded: Loaded, side: str, layer: int) -> Tensor:
    """Return a task router's probabilities [tasks, E], zero for experts outside a task's group."""
    logits = loaded.model.get_submodule(f"{side}.{layer}.feed_forward.router").logits()  # type: ignore[operator]
    return logits.detach().float().softmax(-1).cpu()

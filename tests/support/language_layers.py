"""Build small recipes and batches for methods that add layers of languages, and compare gradients."""

from __future__ import annotations

import torch

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Batch
from lsmoe_ds.directions import Languages, SentenceIds, english_centric
from lsmoe_ds.methods.clsr.method import ConditionalLanguageSpecificRouting
from lsmoe_ds.parallel.topology import Topology
from support.sameness import ragged_batch

CODES = ["de", "fr", "ru"]
LANGUAGES = Languages(tuple(english_centric(CODES)))


def ids_of(numbers: list[int]) -> SentenceIds:
    """Return the ids of directions by number."""
    directions = [LANGUAGES.directions[number] for number in numbers]
    source, target = (
        [LANGUAGES.id(getattr(direction, side)) for direction in directions] for side in ("source", "target")
    )
    return SentenceIds(torch.tensor(source), torch.tensor(target), torch.tensor(numbers))


def recipe_of(**low_rank) -> Recipe:
    side = {"layers": 2, "feed_forward": 24}
    return Recipe.model_validate(
        {
            "name": "test",
            "data": {"corpora": ["none"], "languages": CODES, "vocabulary": {"size": 96}},
            "model": {
                "hidden": 16,
                "heads": 4,
                "encoder": side,
                "decoder": side,
                "low_rank": low_rank or None,
            },
            "training": {"steps": 3, "dropout": 0.0},
        }
    )


def batch_of(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor, SentenceIds]:
    generator = torch.Generator().manual_seed(4)
    source, target = (torch.randint(4, 96, (len(numbers), 5), generator=generator) for _ in range(2))
    return source, target, ids_of(numbers)


def same_gradients(run, wanted, variables: list[torch.Tensor]) -> None:
    results = []
    for each in (run, wanted):
        out = each()
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        results.append([out, *torch.autograd.grad((out * weights).sum(), variables)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def batches_of(recipe: Recipe, count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(11)
    return [ragged_batch(generator, recipe, 7) for _ in range(count)]


def ids_zero(ids):
    """Return the ids in a model of one direction."""
    return SentenceIds(ids.source * 0, ids.target * 0 + 1, ids.direction * 0)


def build_clsr(recipe: Recipe) -> ConditionalLanguageSpecificRouting:
    """Make the method of a recipe, without a model."""
    return ConditionalLanguageSpecificRouting(recipe.model.clsr, recipe, Topology.single())

"""Auxiliary losses over the micro-batches that all ranks compute at once, against plain autograd."""

import pytest
import torch
from support.sameness import VOCABULARY, recipe_for, steps_of

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.languages import PAD
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.moe.losses import balance_loss, z_loss
from lsmoe_ds.parallel.topology import Topology


def recipe_of(world: int, over: str = "micro-batch") -> Recipe:
    """Make a recipe whose auxiliary losses weigh as much as the loss."""
    recipe = recipe_for("token", 1, world, 1 if world > 1 else 0, 1e6)
    for side in (recipe.model.encoder, recipe.model.decoder):
        side.moe.balance_loss_weight, side.moe.z_loss_weight = 2.0, 0.5
    recipe.training.auxiliary_over = over
    return recipe


def first_step(topology: Topology, recipe: Recipe) -> tuple[dict[str, float], float]:
    """Return the metrics and the gradient norm of the first step."""
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    step = steps_of(recipe, topology.data_rank, topology.data)[0]
    result = train_step(engine, step, 1, recipe, topology)
    engine.destroy()
    return result.metrics, result.grad_norm


def wanted(recipe: Recipe, world: int) -> tuple[float, float]:
    """Return the balance loss and the gradient norm of the first step.

    ``world`` neighboring micro-batches are computed at once.
    """
    model = Transformer(recipe, VOCABULARY).train()
    initialize(model, recipe.training.seed, Topology.single())
    step = steps_of(recipe, 0, 1)[0]
    results = [model(batch.source, batch.decoder_input, batch.labels, batch.ids) for batch in step.batches]
    loss = sum(result.loss for result in results) / step.target_tokens
    balance = torch.zeros(())
    groups = [range(start, start + world) for start in range(0, len(results), world)]
    for group in groups:
        sizes = [
            sum(int((getattr(step.batches[i], side) != PAD).sum()) for i in group)
            for side in ("source", "decoder_input")
        ]
        layers = zip(*(results[i].notes["moe"] for i in group), strict=True)
        for size, records in zip(sizes, layers, strict=True):
            counts = sum(record.counts for record in records)
            for record in records:
                each = 2.0 * balance_loss(record, counts, size) / len(groups)
                balance = balance + each
                loss = loss + each + 0.5 * z_loss(record, size) / len(groups)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(balance.detach()), float(norm)


@pytest.mark.parametrize("world", (1, 2))
def test_each_micro_batch_of_all_ranks_is_balanced_by_itself(pool, world):
    recipe = recipe_of(world)
    balance, norm = wanted(recipe, world)
    for metrics, found in pool.run(world, first_step, recipe, expert=world):
        assert (metrics["balance"], found) == pytest.approx((balance, norm), rel=1e-5)
    of_step, step_norm = pool.run(world, first_step, recipe_of(world, "step"), expert=world)[0]
    assert abs(of_step["balance"] - balance) > 1e-3 and abs(step_norm - norm) > 1e-3, "the same thing"


def passes_ahead(topology: Topology, over: str) -> int:
    """Count the micro-batches of a step whose totals are counted by a pass of their own."""
    counted = []
    ahead = Transformer.totals_ahead
    Transformer.totals_ahead = lambda model, *inputs: counted.append(1) or ahead(model, *inputs)
    try:
        first_step(topology, recipe_of(1, over))
    finally:
        Transformer.totals_ahead = ahead
    return len(counted)


def test_no_pass_goes_ahead_of_a_step(pool):
    assert [pool.run(1, passes_ahead, over) for over in ("step", "micro-batch")] == [[4], [0]]

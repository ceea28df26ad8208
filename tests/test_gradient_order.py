"""At ZeRO stage 2 gradients are right wherever rows lie, and whichever way a rank computes its experts."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from test_sameness import METHODS, VOCABULARY, close, draw_masks, ragged_batch, recipe_for, whole

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import PairBatch, Step
from lsmoe_ds.languages import PAD
from lsmoe_ds.moe import experts as module

RANKS, EXPERTS = 4, 2  # each expert is on two ranks, whose gradients are added up


def of_one_direction(generator: torch.Generator, recipe: Recipe, sentences: int, number: int) -> PairBatch:
    """A batch whose sentences all have one target language, and so the same experts."""
    batch, direction = ragged_batch(generator, recipe, sentences), recipe.languages.directions[number]
    batch.source_language.fill_(recipe.languages.id(direction.source))
    batch.target_language.fill_(recipe.languages.id(direction.target))
    batch.direction.fill_(number)
    return batch


def step_of(recipe: Recipe, rank: int, ranks: int) -> Step:
    """The first two ranks translate into German, the others into English."""
    generator = torch.Generator().manual_seed(13)
    batches = [of_one_direction(generator, recipe, 2 + i, number) for i, number in enumerate((0, 0, 1, 1))]
    tokens = sum(batch.target_tokens for batch in batches)
    source_tokens = sum(int((batch.source != PAD).sum()) for batch in batches)
    return Step(batches[rank::ranks], tokens, source_tokens, 0, [])


def static(expert: int, stage: int) -> Recipe:
    """Static routing by target language, so that those of German are on one rank of two, and those of English
    on the other.
    """
    recipe = recipe_for("target", 1, expert, stage)
    for side in (recipe.model.encoder, recipe.model.decoder):
        moe = side.moe.model_copy(update={"routing": "static", "experts": 4, "every": 1})
        side.moe = moe
    return recipe


def gradients(topology, recipe: Recipe, with_kernel: tuple[int, ...], noted: bool = False, idle: bool = True):
    """Return loss and norm, whole gradients by global name, the rows of each layer's experts, and, if
    ``noted``, the order in which gradients arrived.

    The ranks ``with_kernel`` have a grouped product: torch's own for CPUs. Without ``idle``, experts without
    rows do not run, and have no gradient.
    """
    from deepspeed.utils import safe_get_full_grad

    from lsmoe_ds.parallel.parameters import global_names, partition_dimension
    from lsmoe_ds.training.engine import build_engine, train_step

    rows, order, found = [], [], {}
    true_forward = module.Experts.forward

    def forward(self, given, *arguments, **options):
        rows.append(len(given))
        return true_forward(self, given, *arguments, **options)

    has_kernel = topology.rank in with_kernel
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module.Experts, "forward", forward))
        stack.enter_context(mock.patch.object(module, "has_kernel", lambda device, dtype: has_kernel))
        engine = build_engine(recipe, VOCABULARY, topology)
        draw_masks(engine.module, topology)
        names = global_names(engine.module, topology)
        for _, layer in engine.module.moe_layers():
            layer.deepspeed_moe.experts.run_idle = idle
        for name, parameter in engine.module.named_parameters():
            if noted:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
        true_step = engine.step

        def step(*arguments, **options):
            if engine.is_gradient_accumulation_boundary():
                for name, parameter in engine.module.named_parameters():
                    gradient = safe_get_full_grad(parameter)
                    found[names[name]] = (gradient.numpy().copy(), partition_dimension(parameter))
            return true_step(*arguments, **options)

        engine.step = step
        made = step_of(recipe, topology.data_rank, topology.data)
        result = train_step(engine, made, 1, recipe, topology)
        engine.destroy()
    return (result.loss, result.grad_norm), found, rows, order


@pytest.fixture(scope="module")
def alone(pool):
    return pool.run(1, gradients, static(1, 0), ())


KERNELS = {"all": (0, 1, 2, 3), "none": (), "the first rank": (0,), "one of each expert's": (1, 2)}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("bucket", [None, 700])
def test_gradients_are_those_of_one_process(pool, alone, kernels, stage, bucket):
    recipe = static(EXPERTS, stage)
    if bucket is not None:  # several buckets, at the borders of which ranks would wait for one another
        recipe.deepspeed["zero_optimization"]["reduce_bucket_size"] = bucket
    results = pool.run(RANKS, gradients, recipe, kernels, expert=EXPERTS)
    idle = [not any(rows) for _, _, rows, _ in results]
    assert idle == [False, True, True, False], "of two ranks with the same experts one has rows"
    for numbers, *_ in results:
        assert numbers == pytest.approx(alone[0][0], rel=1e-5)
    ours, theirs = whole(results, 1, 1), whole(alone, 1, 1)
    assert ours.keys() == theirs.keys() and any(".experts." in name for name in ours)
    for name, wanted in theirs.items():
        close(ours[name], wanted, name)


def test_a_gradient_that_a_rank_does_not_have_is_zero(pool, alone):
    results = pool.run(RANKS, gradients, static(EXPERTS, 2), (), True, False, expert=EXPERTS)
    assert len({len(order) for *_, order in results}) > 1, "some ranks have fewer"
    ours, theirs = whole(results, 1, 1), whole(alone, 1, 1)
    for name, wanted in theirs.items():
        close(ours[name], wanted, name)


ROUTINGS = ["static", "token", "sentence", "target", "mixed", "capacity", "distilled"]
ORDERS = [(routing, kernels) for routing in ROUTINGS for kernels in ("all", "none")]
ORDERS += [(method, "all") for method in METHODS]


@pytest.mark.parametrize(("routing", "kernels"), ORDERS)
def test_gradients_arrive_in_the_same_order_on_all_ranks(pool, routing, kernels):
    """DeepSpeed takes that for granted."""
    recipe = static(EXPERTS, 2) if routing == "static" else recipe_for(routing, 1, EXPERTS, 2)
    _, *orders = zip(*pool.run(RANKS, gradients, recipe, KERNELS[kernels], True, expert=EXPERTS), strict=True)
    first, *others = orders[-1]
    assert len(set(first)) == len(first) > 20
    assert all(each == first for each in others)

"""The engine's optimizer steps against plain torch: rates, AdamW, clipping, decay; and the dev loss."""

from __future__ import annotations

import math

import pytest
import torch
from support.optimizer_steps import recipe_of, smoothed, take_steps
from support.sameness import VOCABULARY, close, ragged_batch, steps_of, whole

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Batch
from lsmoe_ds.languages import PAD
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology


@pytest.mark.parametrize("clip", [0.5, 0.0], ids=["clipped", "not clipped"])
def test_two_steps_are_those_of_plain_torch(pool, clip):
    ((rates, _, results, weights),) = pool.run(1, take_steps, recipe_of(clip=clip))
    model = Transformer(recipe_of(), VOCABULARY)
    initialize(model, 1, Topology.single())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1)
    steps = steps_of(recipe_of(), 0, 1)
    for step, rate, of_groups, result in zip(steps, (0.005, 0.01), rates, results, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        tokens = sum(int((batch.labels != PAD).sum()) for batch in step.batches)
        loss = sum(smoothed(model, batch, 0.1) for batch in step.batches) / tokens
        nll = sum(smoothed(model, batch, 0.0) for batch in step.batches) / tokens
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf))
        optimizer.step()
        assert of_groups == [pytest.approx(rate)] * len(of_groups)
        assert result == pytest.approx((rate, float(loss.detach()), float(nll.detach()), norm), rel=1e-5)
        assert norm > 0.5, "the gradient must be large enough to be clipped"
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # its true gradient is zero: Adam scales up what rounding leaves
            close(torch.from_numpy(weights[name]), parameter.detach(), name)


def begun_with(topology, recipe: Recipe):
    """Return the types of the parameters before they are initialized, and a rank's first weights."""
    from unittest import mock

    from lsmoe_ds.parallel.parameters import global_names, partition_dimension
    from lsmoe_ds.training import engine as module

    types = []

    def initialize_and_note(model, *arguments):
        types.extend(str(parameter.dtype) for parameter in model.parameters())
        initialize(model, *arguments)

    with mock.patch.object(module, "initialize", initialize_and_note):
        engine = module.build_engine(recipe, VOCABULARY, topology)
    names = global_names(engine.module, topology)
    weights = {
        names[name]: (parameter.detach().float().numpy().copy(), partition_dimension(parameter))
        for name, parameter in engine.module.named_parameters()
    }
    engine.destroy()
    return set(types), weights


@pytest.mark.parametrize(("world", "tensor", "expert", "stage"), [(1, 1, 1, 0), (2, 2, 2, 1), (2, 1, 2, 2)])
def test_in_16_bits_a_model_is_made_in_16_bits(pool, world, tensor, expert, stage):
    """No float32 copy of it is made, and it begins with the weights of the float32 one, rounded."""
    recipe = recipe_of("token", tensor, expert, stage)
    recipe.deepspeed = {**recipe.deepspeed, "bf16": {"enabled": True}}
    found = pool.run(world, begun_with, recipe, tensor=tensor, expert=expert)
    ((_, wanted),) = pool.run(1, begun_with, recipe_of("token"))
    assert [types for types, _ in found] == [{"torch.bfloat16"}] * world
    weights, wanted = whole(found, tensor, 1), whole([(None, wanted)], 1, 1)
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(weights[name], value.bfloat16().float()), name


@pytest.mark.parametrize(
    ("world", "tensor", "expert", "stage", "bf16"),
    [(1, 1, 1, 0, False), (1, 1, 1, 0, True), (2, 1, 2, 1, False), (2, 2, 1, 2, True), (2, 1, 1, 0, False)],
)
def test_every_group_has_the_rates_betas_epsilon_and_decay(pool, world, tensor, expert, stage, bf16):
    recipe = recipe_of("token", tensor, expert, stage)
    recipe.deepspeed = {**recipe.deepspeed, "bf16": {"enabled": bf16}}
    for rates, groups, results, _ in pool.run(world, take_steps, recipe, tensor=tensor, expert=expert):
        assert len(groups) == 2, "experts have a group of their own"
        assert groups == [((0.9, 0.98), 1e-9, 0.1)] * 2
        assert rates == [pytest.approx([0.005] * 2), pytest.approx([0.01] * 2)]
        assert [result[0] for result in results] == pytest.approx([0.005, 0.01])


def test_a_weight_without_gradient_shrinks_by_the_decay_alone(pool):
    """Experts that no token of either step has used."""
    recipe = recipe_of("target")
    for side in (recipe.model.encoder, recipe.model.decoder):
        side.moe.experts = 24  # four tasks use eight of them at most
    ((_, _, _, weights),) = pool.run(1, take_steps, recipe)
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    shrunk = (1 - 0.1 * 0.005) * (1 - 0.1 * 0.01)
    idle = 0
    for name, parameter in model.named_parameters():
        if name.endswith("expand.weight") and "experts" in name:
            before, after = (
                parameter.detach(),
                torch.from_numpy(weights[name.replace("deepspeed_moe.experts.deepspeed_experts", "experts")]),
            )
            idle += bool(((after - shrunk * before).abs() <= 1e-6).all())
    assert 32 <= idle < 48


def test_zeros_of_idle_experts_take_the_memory_of_one():
    from lsmoe_ds.parallel import compat
    from lsmoe_ds.training.engine import _fill_in_gradients

    model = Transformer(recipe_of("target"), VOCABULARY)
    used = next(each for each in model.parameters() if compat.is_expert_parameter(each))
    used.grad = torch.ones_like(used)
    _fill_in_gradients(model)
    assert used.grad.all(), "an expert that was used keeps its gradient"
    filled = [each for each in model.parameters() if each.grad is not None and each is not used]
    assert all(compat.is_expert_parameter(each) and not each.grad.any() for each in filled)
    assert (
        len(filled) > len({each.shape for each in filled}) == len({each.grad.data_ptr() for each in filled})
    )


LAYOUTS = [(1, 0, True), (2, 0, False), (2, 1, False), (2, 2, True)]


@pytest.mark.parametrize(("world", "stage", "bf16"), LAYOUTS)
def test_without_a_limit_the_norm_is_still_measured_and_nothing_is_clipped(pool, world, stage, bf16):
    found = {}
    for clip in (0.0, 1e6):
        recipe = recipe_of("token", stage=stage, clip=clip)
        recipe.deepspeed = {**recipe.deepspeed, "bf16": {"enabled": bf16}}
        _, _, found[clip], weights = pool.run(world, take_steps, recipe)[0]
        found[clip] += [weights[name].tolist() for name in sorted(weights)]
    assert found[0.0] == found[1e6] and found[0.0][0][3] > 0.5


def dev_loss(topology, recipe: Recipe, route: str, sizes: tuple[int, ...]):
    """Return the dev loss of batches of so many sentences, whether the model trains after it, and the traffic
    that is left for the next step."""
    from lsmoe_ds.training.engine import build_engine, validate

    engine = build_engine(recipe, VOCABULARY, topology)
    batches = dev_batches(recipe, sizes)[topology.data_rank :: topology.data]
    found = validate(engine, iter(batches), topology, route)
    left = [layer.deepspeed_moe.traffic.bytes for _, layer in engine.module.moe_layers()]
    training = all(module.training for module in engine.module.modules())
    engine.destroy()
    return found, training, left


def dev_batches(recipe: Recipe, sizes: tuple[int, ...]) -> list[Batch]:
    generator = torch.Generator().manual_seed(11)
    return [ragged_batch(generator, recipe, size) for size in sizes]


@pytest.mark.parametrize(("world", "tensor", "expert"), [(1, 1, 1), (2, 1, 2), (2, 2, 1)])
def test_the_dev_loss_is_per_token_over_all_ranks_without_dropout_and_smoothing(pool, world, tensor, expert):
    recipe = recipe_of("token", tensor, expert)
    recipe.training.dropout = recipe.training.attention_dropout = 0.5
    sizes = (1, 9)
    model = Transformer(recipe_of("token"), VOCABULARY)
    initialize(model, 1, Topology.single())
    batches = dev_batches(recipe, sizes)
    sums = [float(smoothed(model.eval(), batch, 0.0).detach()) for batch in batches]
    tokens = [int((batch.labels != PAD).sum()) for batch in batches]
    wanted, means = sum(sums) / sum(tokens), [s / t for s, t in zip(sums, tokens, strict=True)]
    assert abs(wanted - sum(means) / 2) > 0.01, "a mean of means must differ"
    results = pool.run(world, dev_loss, recipe, "specific", sizes, tensor=tensor, expert=expert)
    for found, training, left in results:
        assert found == pytest.approx(wanted, rel=1e-5)
        assert training and left == [0, 0]


@pytest.mark.parametrize("route", ["specific", "shared"])
def test_the_dev_loss_is_that_of_its_route(pool, route):
    recipe, other = recipe_of("distilled"), {"specific": "shared", "shared": "specific"}[route]
    ((found, _, _),) = pool.run(1, dev_loss, recipe, route, (3, 5))
    model = Transformer(recipe, VOCABULARY).eval()
    initialize(model, 1, Topology.single())
    batches = dev_batches(recipe, (3, 5))
    tokens = sum(int((batch.labels != PAD).sum()) for batch in batches)
    with torch.no_grad():
        sums = [sum(smoothed(model, batch, 0.0, each) for batch in batches) for each in (route, other)]
    wanted, of_other = (float(each) / tokens for each in sums)
    assert found == pytest.approx(wanted, rel=1e-5) and abs(found - of_other) > 1e-3


def dropped_share(topology, recipe: Recipe):
    """Return what a step says of dropped and of first choices, and how many choices were dropped and made."""
    from lsmoe_ds.moe.routers import DROPPED
    from lsmoe_ds.training.engine import build_engine, train_step

    engine, found = build_engine(recipe, VOCABULARY, topology), []
    for _, layer in engine.module.moe_layers():
        layer.observer = lambda seen: found.append(seen.routes.experts)
    step = steps_of(recipe, topology.data_rank, topology.data)[0]
    result = train_step(engine, step, 1, recipe, topology)
    engine.destroy()
    counts = [each.sum().item() for each in result.totals["moe"]]
    choices = torch.cat([each.flatten() for each in found])
    return result.metrics["dropped"], counts, (int((choices == DROPPED).sum()), len(choices))


@pytest.mark.parametrize("world", [1, 2])
def test_the_dropped_share_is_of_all_choices_of_both_sides_and_all_ranks(pool, world):
    recipe = recipe_of("capacity")
    recipe.model.decoder.moe.top_k = 1
    found = pool.run(world, dropped_share, recipe)
    dropped, choices = (sum(each) for each in zip(*(counted for _, _, counted in found), strict=True))
    step = steps_of(recipe, 0, 1)[0]
    passes = 2  # with several micro-batches a rank, one ahead of the step
    assert choices == passes * (2 * step.source_tokens + step.target_tokens)
    for share, counts, _ in found:
        assert share == pytest.approx(dropped / choices) and 0.05 < share < 0.95
        assert counts == [step.source_tokens, step.target_tokens], "first choices before any is dropped"

"""CLSR in the engine and over several ranks: noise, gradients, the budget loss and traffic."""

from __future__ import annotations

import pytest
import torch
from support.language_layers import build_clsr
from support.plans import recipe_of as planned_recipe
from support.plans import step_traffic
from support.sameness import VOCABULARY, assert_same, recipe_for, steps_of, whole

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.methods.base import StepSize
from lsmoe_ds.methods.clsr.method import (
    ConditionalRouting,
)
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.moe.costs import bytes_per_row
from lsmoe_ds.planning.plan import plan


def noise_in_steps(topology, recipe: Recipe) -> list[set[tuple[float, bool]]]:
    """Return the deviations of the gates' noise in two steps, and whether they were in training mode."""
    from lsmoe_ds.training.engine import build_engine, train_step

    engine, seen = build_engine(recipe, VOCABULARY, topology), []
    for module in engine.module.modules():
        if isinstance(module, ConditionalRouting):
            module.register_forward_pre_hook(
                lambda gate, args: seen[-1].add((gate._side[0].noise, gate.training))
            )
    steps = steps_of(recipe, 0, 1)
    for number, step in enumerate(steps, start=1):
        seen.append(set())
        train_step(engine, step, number, recipe, topology)
    engine.destroy()
    return seen


def test_gates_get_the_noise_of_their_step_on_both_sides(pool):
    """The noise of a training of four steps: 0 in the first, 5 / 4 in the second."""
    recipe = recipe_with_experts(1, {})
    recipe.training.steps = 4
    assert pool.run(1, noise_in_steps, recipe) == [[{(0.0, True)}, {(1.25, True)}]]


def recipe_with_experts(tensor: int, clsr: dict) -> Recipe:
    """Experts in the second layer of each side, and gates after all sublayers."""
    recipe = recipe_for("token", tensor, 1, 1)
    recipe.model.clsr = Clsr.model_validate({"gate": 4, **clsr})
    return recipe


def train_without_noise(topology, recipe: Recipe):
    """Mean gates, gradient norms, the first step's gradients and the final weights, by global name."""
    from deepspeed.utils import safe_get_full_grad

    from lsmoe_ds.methods.clsr import method as clsr
    from lsmoe_ds.parallel.parameters import global_names, partition_dimension
    from lsmoe_ds.training.engine import build_engine, train_step

    clsr.ALPHA = 0.0  # other ranks draw other noise
    engine = build_engine(recipe, VOCABULARY, topology)
    for group in engine.optimizer.param_groups:
        group["eps"] = 1e-3  # see test_sameness
    names = global_names(engine.module, topology)
    gradients: dict[str, tuple] = {}
    true_step = engine.step

    def step_after_reading_gradients():
        if engine.is_gradient_accumulation_boundary() and not gradients:
            for name, parameter in engine.module.named_parameters():
                gradients[names[name]] = (
                    safe_get_full_grad(parameter).float().numpy().copy(),
                    partition_dimension(parameter),
                )
        return true_step()

    engine.step = step_after_reading_gradients
    steps = steps_of(recipe, topology.data_rank, topology.data)
    results = [train_step(engine, step, i + 1, recipe, topology) for i, step in enumerate(steps)]
    weights = {
        names[name]: (parameter.detach().numpy().copy(), partition_dimension(parameter))
        for name, parameter in engine.module.named_parameters()
    }
    engine.destroy()
    clsr.ALPHA = 5.0
    return [(r.loss, r.metrics["gates"], r.grad_norm) for r in results], gradients, weights


@pytest.mark.parametrize("shared", [True, False])
def test_layouts_compute_what_one_process_computes(pool, shared):
    wanted = pool.run(1, train_without_noise, recipe_with_experts(1, {"shared": shared}))
    strong = pool.run(
        1, train_without_noise, recipe_with_experts(1, {"shared": shared, "weight": 10.0, "budget": 1.0})
    )
    assert strong[0][0][-1][1] > wanted[0][0][-1][1] + 0.01, "the budget must move the gates"
    for world, tensor in (
        (2, 2),
        (2, 1),
        (4, 1),
    ):  # of four data ranks each has one micro-batch, so that nothing is run ahead
        found = pool.run(
            world, train_without_noise, recipe_with_experts(tensor, {"shared": shared}), tensor=tensor
        )
        assert_same(found, wanted, tensor)
        assert any("_clsr." in name for name in whole(found, tensor, 1))


def engine_and_autograd(topology, recipe: Recipe):
    """Return the largest difference of the engine's gradients of the gates from those of the whole loss.

    It is relative to the largest gradient.
    """
    from lsmoe_ds.moe.losses import balance_loss, z_loss

    steps, gradients, _ = train_without_noise(topology, recipe)
    gates = steps[0][1]
    model = Transformer(recipe, VOCABULARY)
    initialize(model, recipe.training.seed, topology)
    step = steps_of(recipe, 0, 1)[0]
    results = [model(batch.source, batch.decoder_input, batch.labels, batch.ids) for batch in step.batches]
    loss = sum(result.loss for result in results) / step.target_tokens
    for i, side in enumerate((step.source_tokens, step.target_tokens)):
        counts = sum(result.notes["moe"][i].counts for result in results)
        for result in results:
            record = result.notes["moe"][i]
            loss = (
                loss
                + record.settings.balance_loss_weight * balance_loss(record, counts, side)
                + record.settings.z_loss_weight * z_loss(record, side)
            )
    mean = sum(sum(result.notes["clsr"]) for result in results) / (
        2 * 2 * step.source_tokens + 2 * 3 * step.target_tokens
    )
    settings = recipe.model.clsr
    names = [name for name, _ in model.named_parameters() if ".gate." in name]
    total = loss + settings.weight * (mean - settings.budget).abs()
    wanted = torch.autograd.grad(total, [model.get_parameter(name) for name in names])
    largest = max(float(each.abs().max()) for each in wanted)
    apart = max(
        float((torch.from_numpy(gradients[name][0]) - each).abs().max())
        for name, each in zip(names, wanted, strict=True)
    )
    return gates, float(mean.detach()), apart / largest


def test_the_engine_adds_the_budget_loss(pool):
    recipe = recipe_with_experts(1, {"weight": 3.0})
    recipe.training.max_grad_norm = 0.0
    gates, mean, apart = pool.run(1, engine_and_autograd, recipe)[0]
    assert gates == pytest.approx(mean, rel=1e-5)
    assert apart < 1e-5


def noisy_step(topology, recipe: Recipe):
    """Return what the losses of the second step were given, and what its micro-batches really had: passes
    through the encoder, first choices and mean gate.
    """
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    model, step, passes, found = engine.module, steps_of(recipe, 0, 1)[1], [], []
    true_encode = model.encode
    model.encode = lambda *arguments: passes.append(1) or true_encode(*arguments)
    model.register_forward_hook(lambda model, inputs, losses: found.append(model.count(losses.notes)))
    result = train_step(engine, step, 2, recipe, topology)
    counts = [sum(each) for each in zip(*(totals["moe"] for totals in found), strict=True)]
    gates = sum(totals["clsr"][0] for totals in found)
    mean = float(gates) / build_clsr(recipe).gate_count(StepSize(step.source_tokens, step.target_tokens))
    engine.destroy()
    return (
        len(passes),
        [each.tolist() for each in result.totals["moe"]],
        result.metrics["gates"],
        [each.tolist() for each in counts],
        mean,
    )


@pytest.mark.parametrize("routing", ["token", "target"])
def test_one_pass_ahead_has_the_random_numbers_of_the_step(pool, routing):
    recipe = recipe_for(routing, 1, 1, 0)
    recipe.model.clsr = Clsr(gate=4)
    recipe.training.dropout = 0.3
    passes, counts, gate, true_counts, true_gate = pool.run(1, noisy_step, recipe)[0]
    assert passes == 2 * 4, "once ahead and once in the step, for each micro-batch"
    assert counts == true_counts and gate == pytest.approx(true_gate, rel=1e-6)


def test_bytes_of_a_step_count_the_pass_ahead(pool):
    def recipe(routing: str, clsr: Clsr | None) -> Recipe:
        made = planned_recipe(routing, routing, expert=2, stage=0)
        made.data.batch.count, made.model.clsr = 4, clsr  # as steps_of has them
        return made

    gated = recipe("target", Clsr(gate=4))
    (rows, sent), _ = pool.run(2, step_traffic, gated, expert=2)
    training, inference = (bytes_per_row(16, 2, 4, of_training) for of_training in (True, False))
    assert (
        sent == rows / 2 * (training + inference) + 2 * 4 * 3 * 16
    )  # 16 bytes for each micro-batch and layer, in both passes
    assert (
        plan(gated, 2).step_bytes
        == plan(recipe("token", None), 2).step_bytes
        > plan(recipe("target", None), 2).step_bytes
    )

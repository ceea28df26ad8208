"""Training in 16 bits: the gradient norm, sums of gradients, and routers."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from support.gradients import norm_of
from support.optimizer_steps import recipe_of, smoothed
from support.sameness import VOCABULARY, ragged_batch, steps_of, whole
from torch import Tensor, nn

from lsmoe_ds.config.deepspeed import complete, read_deepspeed_config
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import PairBatch, Step
from lsmoe_ds.methods.context import mean_of_real
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.moe.routers import RouterInputs, SentenceRouter, TokenRouter
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology

LIMIT, EPSILON, RATE = 0.5, 0.1, 0.005


def half(routing: str, tensor: int, expert: int, stage: int, **further: Any) -> Recipe:
    """Return a recipe in bfloat16, without weight decay and without auxiliary losses."""
    recipe = recipe_of(routing, tensor, expert, stage, clip=LIMIT, decay=0.0)
    for _, _, moe in recipe.model.moe_layers():
        moe.balance_loss_weight = moe.z_loss_weight = 0.0
    recipe.deepspeed = {**recipe.deepspeed, "bf16": {"enabled": True}, **further}
    return recipe


def first_step(topology, recipe: Recipe, step: Step | None = None):
    """Return the stage, the first step's whole gradients by global name, by how much each part of a parameter
    that this rank updates has moved, with the gradient of that part, and the loss, the norm and the rate.
    """
    from deepspeed.utils import safe_get_full_grad

    from lsmoe_ds.parallel import deepspeed_engine
    from lsmoe_ds.parallel.parameters import partition_dimension
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    for group in engine.optimizer.param_groups:
        group["eps"] = EPSILON
    names, gradients = global_names(engine.module, topology), {}
    true_step = engine.step

    def step_after_reading(*arguments, **options):
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                gradient = safe_get_full_grad(parameter)
                assert gradient.dtype == torch.float32
                gradients[names[name]] = (gradient.numpy().copy(), partition_dimension(parameter))
        return true_step(*arguments, **options)

    engine.step = step_after_reading
    local = {parameter: names[name] for name, parameter in engine.module.named_parameters()}

    def held(piece) -> Tensor:
        return piece.values.detach().view(-1)[piece.offset : piece.offset + piece.length].clone()

    pieces = deepspeed_engine.optimizer_pieces(engine)
    before = [held(piece) for piece in pieces]
    step = step or steps_of(recipe, topology.data_rank, topology.data)[0]
    result = train_step(engine, step, 1, recipe, topology)
    moved = []
    for piece, value in zip(pieces, before, strict=True):
        gradient = torch.from_numpy(gradients[local[piece.parameter]][0]).view(-1)
        part = gradient[piece.start : piece.start + piece.length]
        moved.append(((value - held(piece)).numpy(), part.numpy()))
    stage = int(engine.zero_optimization_stage())
    engine.destroy()
    return stage, gradients, moved, (result.loss, result.grad_norm, result.learning_rate)


def by_torch(recipe: Recipe) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of plain torch in bfloat16, added up in float32."""
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    model.bfloat16()
    step, names = steps_of(recipe, 0, 1)[0], global_names(model, Topology.single())
    sums = {names[name]: torch.zeros(each.shape) for name, each in model.named_parameters()}
    total = 0.0
    for batch in step.batches:
        loss = smoothed(model, batch, 0.1) / step.target_tokens
        loss.backward()
        total += float(loss.detach())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[names[name]] += parameter.grad
        model.zero_grad()
    return total, sums


LAYOUTS = [("token", 1, 1, 1, 0), ("token", 2, 1, 2, 0), ("target", 2, 2, 2, 0), ("target", 2, 1, 1, 0)]
LAYOUTS += [("target", 4, 2, 2, 1), ("token", 4, 1, 2, 2), ("token", 4, 2, 4, 2)]


@pytest.mark.parametrize(("routing", "world", "tensor", "expert", "stage"), LAYOUTS)
def test_bfloat16_clips_by_the_norm_of_all_gradients(pool, routing, world, tensor, expert, stage):
    recipe = half(routing, tensor, expert, stage)
    results = pool.run(world, first_step, recipe, tensor=tensor, expert=expert)
    found = whole(results, tensor, 1)
    norm = norm_of(found)
    dense = norm_of({name: each for name, each in found.items() if ".experts." not in name})
    assert dense < 0.99 * norm and norm > 1.5 * LIMIT, "a norm without experts differs, and clips otherwise"
    for ran_at, _, moved, (_, reported, rate) in results:
        assert ran_at == max(stage, 1)
        assert reported == pytest.approx(norm, rel=1e-5) and rate == pytest.approx(RATE)
        for change, gradient in moved:
            clipped = torch.from_numpy(gradient) * (LIMIT / norm)
            wanted = rate * clipped / (clipped.abs() + EPSILON)  # Adam's first step
            assert torch.allclose(torch.from_numpy(change), wanted, rtol=1e-3, atol=2e-7)
    loss, wanted = by_torch(half(routing, 1, 1, stage))
    assert results[0][-1][0] == pytest.approx(loss, rel=5e-3)
    assert norm == pytest.approx(norm_of(wanted), rel=2e-2)
    difference = norm_of({name: found[name] - each for name, each in wanted.items()})
    assert difference < 0.05 * norm


def looks_at_gradients(topology, recipe: Recipe) -> list[tuple[str, float, float]]:
    """Return what the engine and DeepSpeed's own methods find in the gradients of a step: their norm, and
    whether they overflow, as they are and once a value of one of them is no number.
    """
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    optimizer, found = engine.optimizer, []
    its, norm_of_all = type(optimizer), optimizer.scaled_global_norm

    def look(*arguments, **options):
        for number, gradients in optimizer.averaged_gradients.items():
            given = gradients, optimizer.params_in_partition[number]
            norms = optimizer.get_grad_norm_direct(*given), its.get_grad_norm_direct(optimizer, *given)
            found.append(("norm", *map(float, norms)))
            for gradient in (gradients[0], gradients[len(gradients) // 2]):
                place, before = gradient.view(-1)[-1:], gradient.view(-1)[-1:].clone()
                for value in (float(before), 3e38, math.inf, -math.inf, math.nan):
                    place.fill_(value)
                    ours = optimizer.has_overflow_partitioned_grads_serial()
                    theirs = its.has_overflow_partitioned_grads_serial(optimizer)
                    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
                    found.append((str(value), float(ours), float(theirs)))
                place.copy_(before)
        return norm_of_all(*arguments, **options)

    optimizer.scaled_global_norm = look
    train_step(engine, steps_of(recipe, topology.data_rank, topology.data)[0], 1, recipe, topology)
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("routing", "world", "tensor", "expert", "stage"), [LAYOUTS[4], LAYOUTS[5], ("token", 1, 1, 1, 1)]
)
def test_all_gradients_at_once_are_found_as_they_are_one_by_one(pool, routing, world, tensor, expert, stage):
    recipe = half(routing, tensor, expert, stage)
    for found in pool.run(world, looks_at_gradients, recipe, tensor=tensor, expert=expert):
        assert {name for name, *_ in found} >= {"norm", "inf", "-inf", "nan"}
        for name, ours, theirs in found:
            assert ours == pytest.approx(theirs, rel=1e-6), name
            assert name == "norm" or ours == (not math.isfinite(float(name)))


def batch_of(recipe: Recipe, sentences: int) -> PairBatch:
    """Return a batch of one sentence repeated: its gradients are all equal, so their sum grows with each."""
    batch = ragged_batch(torch.Generator().manual_seed(5), recipe, 1)
    names = (field.name for field in fields(batch))
    return PairBatch(*(getattr(batch, name).repeat_interleave(sentences, 0) for name in names))


MANY = 256


def step_of_many(topology, recipe: Recipe):
    batches = [batch_of(recipe, 1)] * MANY
    tokens = sum(batch.target_tokens for batch in batches)
    step = Step(batches[topology.data_rank :: topology.data], tokens, tokens, 0, [])
    return first_step(topology, recipe, step)


@pytest.fixture(scope="module")
def in_one() -> dict[str, Tensor]:
    """Return the gradients of all sentences in one batch, computed in float32.

    In bfloat16, torch's own sums over the rows of a batch on a CPU would be in bfloat16. The weights are
    rounded to values that bfloat16 has.
    """
    recipe = half("dense", 1, 1, 1)
    model, batch = Transformer(recipe, VOCABULARY), batch_of(recipe, MANY)
    initialize(model, 1, Topology.single())
    model.bfloat16().float()
    (smoothed(model, batch, 0.1) / batch.target_tokens).backward()
    names = global_names(model, Topology.single())
    return {names[name]: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 0)])
def test_many_micro_batches_add_up_to_one_large_batch(pool, in_one, world, stage):
    def error(**further: Any) -> float:
        recipe = half("dense", 1, 1, stage, **further)
        recipe.data.batch.count = MANY
        found = whole(pool.run(world, step_of_many, recipe), 1, 1)
        return norm_of({name: found[name] - each for name, each in in_one.items()}) / norm_of(in_one)

    in_float32 = error()
    in_bfloat16 = error(data_types={"grad_accum_dtype": "bf16"}, communication_data_type="bf16")
    assert in_float32 < 0.03 and 3 * in_float32 < in_bfloat16, (in_float32, in_bfloat16)


def test_gradients_are_added_up_in_float32_unless_the_configuration_says_otherwise():
    given = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "reduce_bucket_size": 9}}
    made = complete(given, 2)
    assert made["data_types"] == {"grad_accum_dtype": "fp32"} and made["communication_data_type"] == "fp32"
    assert made["zero_optimization"] == given["zero_optimization"]
    own = {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
    assert complete(given | own, 2) == given | own
    assert complete({"fp16": {"enabled": True}}, 1)["zero_optimization"] == {"stage": 1}
    assert complete({"zero_optimization": {"stage": 2}}, 2) == {"zero_optimization": {"stage": 2}}
    assert complete({"zero_optimization": {"stage": 2}}, 1) == {"zero_optimization": {"stage": 0}}


REFUSED = [
    (
        {"zero_optimization": {"overlap_comm": True}},
        r"'zero_optimization.overlap_comm' is true: .*; remove it",
    ),
    ({"zero_optimization": {"compute_grad_norm": False}}, "'zero_optimization.compute_grad_norm' is false: "),
    (
        {"bf16": {"check_grad_overflow": False}},
        "'bf16.check_grad_overflow' is false: a gradient of NaN would",
    ),
    (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        "'data_types.grad_accum_dtype' is 'bf16': it should be fp32",
    ),
    (
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp16"}},
        "'data_types.grad_accum_dtype' is 'fp16': it should be fp32 or bf16 here",
    ),
    ({"communication_data_type": 16}, "'communication_data_type' is 16: it should be fp32 or bf16 or fp16"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_settings_that_would_spoil_gradients_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        read_deepspeed_config(config)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_reduces_after_the_backward_pass_unless_told_otherwise(stage):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig(stage=stage).overlap_comm is False
    read_deepspeed_config({"zero_optimization": {"stage": stage, "overlap_comm": False}})


def router_of(kind: type[TokenRouter], bias: bool) -> TokenRouter:
    recipe = recipe_of("token")
    settings = recipe.model.encoder.moe.model_copy(update={"router_bias": bias, "jitter": 0.1})
    torch.manual_seed(2)
    router = kind(16, settings, recipe.languages)
    for parameter in router.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    return router.bfloat16().eval()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [TokenRouter, SentenceRouter])
def test_routers_compute_in_float32_whatever_their_weights_are(kind, bias, autocast):
    router = router_of(kind, bias)
    tokens = torch.randn(5, 16).bfloat16()
    inputs = RouterInputs(torch.arange(5), torch.zeros(5, dtype=torch.long), tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = router(tokens, inputs)
    logits = nn.functional.linear(
        tokens.float(), router.weight.float(), None if not bias else router.bias.float()
    )
    assert found.probabilities.dtype == found.log_sums.dtype == found.weights.dtype == torch.float32
    assert torch.equal(found.probabilities, logits.softmax(-1))
    assert torch.equal(found.log_sums, logits.logsumexp(-1))
    router.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shaken = router(tokens, inputs)
    assert not torch.equal(shaken.probabilities.bfloat16().float(), shaken.probabilities)


def test_logits_that_bfloat16_cannot_tell_apart_are_told_apart():
    router = router_of(TokenRouter, False)
    with torch.no_grad():
        router.weight.zero_()[:, 0] = 1.0
        router.weight[3, 1] = 2**-7  # beside 1, less than bfloat16 can add to it
        router.weight[5, 1] = 2**-8
    tokens = torch.tensor([[4.0] + [0.5] * 15]).bfloat16()
    in_bfloat16 = nn.functional.linear(tokens, router.weight)[0]
    assert len(set(in_bfloat16.tolist())) == 1
    inputs = RouterInputs(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert router(tokens, inputs).experts.tolist() == [[3, 5]]


def test_the_mean_that_a_sentence_router_reads_is_in_float32():
    x, real = torch.randn(2, 9, 16).bfloat16(), torch.rand(2, 9) < 0.7
    torch.testing.assert_close(mean_of_real(x, real), mean_of_real(x.float(), real), rtol=1e-6, atol=1e-7)
    assert mean_of_real(x.double(), real).dtype == torch.float64

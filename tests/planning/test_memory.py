"""A plan's memory against engines that are really built, and what their autograd and DeepSpeed really
keep.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.kept_memory import kept_by_autograd, small_batches
from support.plans import VOCABULARY, recipe_of
from support.sameness import ragged_batch

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.planning.costs import Parts
from lsmoe_ds.planning.memory import STAGE_0_BUCKET, activations, local_parameters, memory
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.planning.trained import count_trained


def partitions(topology, recipe):
    """Of a rank: its parameters, elements and bytes of ZeRO's own parts, and bytes of the optimizer after a
    step.
    """
    from lsmoe_ds.training.engine import build_engine

    engine = build_engine(recipe, VOCABULARY, topology)
    batch = ragged_batch(torch.Generator().manual_seed(3), recipe, 4)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(batch.source, batch.decoder_input, batch.labels, batch.ids).loss)
        engine.step()
    weights = list(engine.module.parameters())
    optimizer = engine.optimizer
    own = getattr(optimizer, "single_partition_of_fp32_groups", [])  # ZeRO's part of the float32 weights
    inner = optimizer.optimizer if own else optimizer
    moments = [
        value
        for state in inner.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() > 1
    ]
    in_bytes = [
        sum(value.numel() * value.element_size() for value in values)
        for values in (weights, [*own, *moments])
    ]
    engine.destroy()
    return sum(parameter.numel() for parameter in weights), *in_bytes


CASES = [(1, 2, 0, False, "all"), (1, 2, 0, True, "all"), (1, 2, 1, True, "all"), (2, 2, 1, False, "all")]
CASES += [(1, 1, 2, False, "all"), (1, 2, 2, True, "all")]
CASES += [(2, 2, 1, False, "methods"), (1, 2, 0, True, "methods"), (1, 1, 0, False, "methods")]
CASES += [(2, 2, 0, False, ["decoder.*attention*"]), (1, 1, 2, True, ["*.bias", "embedding.*"])]
CASES += [(2, 1, 2, False, ["*.output.*"])]


@pytest.mark.parametrize(("tensor", "expert", "stage", "bf16", "trainable"), CASES)
def test_memory_is_that_of_an_engine(pool, tensor, expert, stage, bf16, trainable):
    recipe = recipe_of("token", "target", tensor, expert, stage, bf16)
    recipe.training.trainable = trainable
    planned = plan(recipe, 2)
    (wanted,) = [
        each for each in planned.memory if (each.precision, each.stage) == (planned.precision, planned.stage)
    ]
    assert planned.stage == max(stage, int(bf16)), "in 16 bits stage 1 takes the place of stage 0"
    for parameters, weights, optimizer in pool.run(2, partitions, recipe, tensor=tensor, expert=expert):
        assert parameters == sum(local_parameters(planned.parameters.whole, tensor, expert))
        assert weights == wanted.weights
        assert optimizer == pytest.approx(wanted.optimizer, abs=200)  # ZeRO's padding


LOW_RANK = {"rank": 4, "at": "both", "fuse_distillation": True}
MODELS = [
    (recipe_of("token", "target"), {}),
    (recipe_of("dense", "target", fuse_distillation=True), {}),
    (recipe_of("dense", "dense"), {"low_rank": LOW_RANK}),
    (recipe_of("dense", "dense"), {"clsr": {"gate": 8}}),
    (recipe_of("dense", "target"), {"low_rank": LOW_RANK}),
]


@pytest.mark.parametrize(("base", "methods"), MODELS)
def test_what_trains_is_counted_as_ranks_hold_it(base, methods):
    given = base.model_dump(exclude_none=True)
    given["model"] |= methods
    given["training"]["trainable"] = ["*"]
    recipe = Recipe.model_validate(given)
    whole = Parts.of(recipe).whole
    assert count_trained(recipe) == whole, "by names as by formulas"
    recipe.training.trainable = "methods"
    found = count_trained(recipe)
    assert 0 < found.total < whole.total and found.expert == whole.expert
    if methods and not whole.expert:
        assert found.total == whole.total - Parts.of(base).whole.total


def test_a_plan_says_how_many_train_and_refuses_patterns():
    recipe = recipe_of("token", "target")
    assert "train" not in str(plan(recipe).table().renderables[0].columns[0]._cells)
    recipe.training.trainable = ["encoder.*"]
    assert "of these train" in plan(recipe).table().renderables[0].columns[0]._cells
    recipe.training.trainable = ["encoder.77.*"]
    with pytest.raises(UserError, match="which matches no parameter"):
        plan(recipe)


def test_memory_formulas():
    recipe = recipe_of("token", "target", 2, 4)
    count = Parts.of(recipe).whole
    dense, experts = local_parameters(count, 2, 4)
    assert (dense, experts) == (count.split / 2 + count.whole, count.expert / 4)
    part = dense / 4 + experts / 2  # of 8 ranks: 4 data-parallel ones, 2 with the same experts
    found = {(p, s): memory(recipe, 8, s, p) for p in ("float32", "bfloat16") for s in (0, 1, 2)}
    for precision, value in (("float32", 4), ("bfloat16", 2)):
        assert {found[precision, stage].weights for stage in (1, 2)} == {value * (dense + experts)}
        assert found[precision, 1].gradients == 4 * (dense + experts)
        assert found[precision, 2].gradients == pytest.approx(4 * part, abs=16)
        assert (
            found[precision, 1].optimizer == found[precision, 2].optimizer == pytest.approx(12 * part, abs=32)
        )
    each = found["float32", 0]
    assert (each.weights, each.gradients, each.optimizer) == tuple(n * (dense + experts) for n in (4, 4, 8))
    passing = each.activations + each.buffers
    lasting = each.weights + each.gradients + each.optimizer
    assert each.peak == lasting + 480 * 2**20 + round(1.4 * passing)  # as docs/planning.md says
    assert each.gpu_peak == lasting + 480 * 2**20 + round(1.1 * passing)


@pytest.mark.parametrize(
    ("sides", "dropout"), [(("dense", "dense"), 0.1), (("token", "pair"), 0.1), (("static", "token"), 0.0)]
)
def test_activations_are_what_autograd_keeps(sides, dropout):
    recipe = small_batches(recipe_of(*sides), dropout)
    assert kept_by_autograd(recipe) == pytest.approx(activations(recipe, 4), rel=0.05)


@pytest.mark.parametrize("layers", [2, 8])
@pytest.mark.parametrize("sides", [("dense", "dense"), ("token", "pair"), ("dense", "static")])
def test_activations_that_are_computed_again_are_those_of_one_layer(sides, layers):
    given = small_batches(recipe_of(*sides)).model_dump(exclude_none=True)
    for side in ("encoder", "decoder"):
        given["model"][side] |= {"layers": layers, "feed_forward": 96}
    recipe = Recipe.model_validate(given)
    without = activations(recipe, 4)
    recipe.training.activation_checkpointing = True
    wanted = activations(recipe, 4)
    assert kept_by_autograd(recipe) == pytest.approx(wanted, rel=0.05)
    assert wanted < without / (1.5 if layers == 2 else 3)


@pytest.mark.parametrize("sides", [("dense", "dense"), ("token", "pair")])
@pytest.mark.parametrize(
    "settings",
    [Clsr(), Clsr(shared=False, gate=24, at=["cross_attention", "feed_forward"])],
    ids=["shared", "own"],
)
def test_activations_of_gates_are_what_autograd_keeps(settings, sides):
    recipe = small_batches(recipe_of(*sides))
    without = activations(recipe, 4)
    recipe.model.clsr = settings
    kept, wanted = kept_by_autograd(recipe), activations(recipe, 4)
    assert kept == pytest.approx(wanted, rel=0.05)
    assert kept - without == pytest.approx(wanted - without, rel=0.1)


def reduction_copies(topology, recipe, bucket):
    """Bytes of the largest copy of gradients that a step makes at stage 0."""
    from lsmoe_ds.training import engine as module

    with mock.patch.object(module, "STAGE_0_BUCKET", bucket):
        engine, sizes = module.build_engine(recipe, VOCABULARY, topology), [0]
    flatten = engine.flatten

    def noted(tensors):
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return flatten(tensors)

    engine.flatten = noted
    batch = ragged_batch(torch.Generator().manual_seed(3), recipe, 4)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(batch.source, batch.decoder_input, batch.labels, batch.ids).loss)
        engine.step()
    engine.destroy()
    return max(sizes)


@pytest.mark.parametrize("gates", [False, True], ids=["plain", "CLSR"])
@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 1), (2, 2)])
def test_buffers_are_what_is_copied_to_be_reduced(pool, world, expert, gates, monkeypatch):
    recipe, bucket = recipe_of("token", "target", 1, expert, stage=0), STAGE_0_BUCKET
    # all languages' projections are one parameter, larger than a bucket of one value and than the embedding
    if gates:
        bucket, recipe.model.clsr = 1, Clsr(gate=4)
        recipe.data.directions = [f"en-{code}" for code in ("cs", "da", "de", "fr", "it", "nl", "pl", "sv")]
        assert len(recipe.languages.codes) * recipe.model.hidden > VOCABULARY
        monkeypatch.setattr("lsmoe_ds.planning.memory.STAGE_0_BUCKET", bucket)
    assert (
        pool.run(world, reduction_copies, recipe, bucket, expert=expert)
        == [memory(recipe, world, 0, "float32").buffers] * world
    )


def zero_buffers(topology, recipe):
    """Return the bytes of a step's fullest bucket of gradients, of its largest copy in float32, and of its
    float32 gradients.
    """
    from lsmoe_ds.training.engine import build_engine

    engine = build_engine(recipe, VOCABULARY, topology)
    optimizer, full, copied, stepped = engine.optimizer, [0], [0], []
    true_reduce, true_step = optimizer.reduce_ipg_grads, optimizer._optimizer_step
    true_allreduce = optimizer.allreduce_bucket

    def allreduce(bucket, *arguments, **options):
        made = true_allreduce(bucket, *arguments, **options)
        copied.append(made.nbytes if made.dtype != bucket[0].dtype else 0)
        return made

    def reduce(*arguments, **options):
        filled = [each for each in optimizer.ipg_buckets.values() if each.elements]
        full.extend(each.elements * each.buffer[each.index].element_size() for each in filled)
        return true_reduce(*arguments, **options)

    def step(group):
        gradient = optimizer.single_partition_of_fp32_groups[group].grad
        assert gradient.dtype == torch.float32
        stepped.append(gradient.nbytes)
        return true_step(group)

    optimizer.reduce_ipg_grads, optimizer._optimizer_step = reduce, step
    optimizer.allreduce_bucket = allreduce
    batch = ragged_batch(torch.Generator().manual_seed(3), recipe, 4)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(batch.source, batch.decoder_input, batch.labels, batch.ids).loss)
        engine.step()
    engine.destroy()
    return max(full), max(copied), sum(stepped)


ZERO = [(1, 2, 1, False), (1, 2, 1, True), (2, 2, 2, False), (1, 1, 2, True)]


@pytest.mark.parametrize(("tensor", "expert", "stage", "bf16"), ZERO)
@pytest.mark.parametrize("bucket", [None, 4000])
def test_buffers_of_zero_are_a_bucket_and_float32_gradients(pool, tensor, expert, stage, bf16, bucket):
    recipe = recipe_of("token", "target", tensor, expert, stage, bf16)
    if bucket is not None:
        recipe.deepspeed["zero_optimization"]["reduce_bucket_size"] = bucket
    planned = memory(recipe, 2, stage, "bfloat16" if bf16 else "float32")
    # No room for the next, at most the embedding's; a bucket holds both kinds, which are copied one by one.
    unfilled = 0 if bucket is None else VOCABULARY * 16 * 4 + 4 * bucket * (stage == 2)
    for full, copied, stepped in pool.run(2, zero_buffers, recipe, tensor=tensor, expert=expert):
        if stage == 2 and bf16:  # steps the float32 sums themselves
            assert copied and stepped == pytest.approx(planned.gradients, abs=200)
            stepped = 0
        assert -200 <= planned.buffers - full - copied - stepped <= unfilled + 200  # ZeRO's padding

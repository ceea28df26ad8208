"""``training.trainable``: what is frozen takes no gradient; what trains learns as beside a base frozen by
hand.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.optimizer_steps import smoothed
from support.sameness import UNITS, VOCABULARY, assert_same, close, in_units, recipe_for, steps_of, whole

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods import products
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.model.freezing import choose, freeze
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology

BIASES = ["*.expand.bias", "decoder.*.query.bias", "*_norm.weight"]
ATTENTION = ["decoder.*attention*"]  # no expert trains, and nothing below the decoder


def frozen_recipe(routing: str, trainable: Any, tensor=1, expert=1, stage=0, bf16=False) -> Recipe:
    value = recipe_for(routing, tensor, expert, stage).model_dump(mode="json", exclude_none=True)
    value["training"]["trainable"] = trainable
    value["deepspeed"] = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}
    if routing == "lms":  # and experts in the decoder
        value["training"]["max_grad_norm"] = 0.2
    return Recipe.model_validate(value)


def train(topology, recipe: Recipe):
    """Losses, norms, the first step's gradients and the final weights by global name, and Adam's moments'
    size.
    """
    from deepspeed.utils import safe_get_full_grad

    from lsmoe_ds.parallel import deepspeed_engine
    from lsmoe_ds.parallel.parameters import partition_dimension
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    for group in engine.optimizer.param_groups:
        group["eps"] = 1e-3  # as in test_sameness
    names = global_names(engine.module, topology)
    gradients: dict[str, tuple] = {}
    true_step = engine.step

    def step(*arguments, **options):
        if engine.is_gradient_accumulation_boundary() and not gradients:
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    gradients[names[name]] = (
                        safe_get_full_grad(parameter).float().numpy().copy(),
                        partition_dimension(parameter),
                    )
                else:
                    assert parameter.grad is None, name
        return true_step(*arguments, **options)

    engine.step = step
    results = [
        train_step(engine, each, number, recipe, topology)
        for number, each in enumerate(steps_of(recipe, topology.data_rank, topology.data), start=1)
    ]
    weights = {
        names[name]: (parameter.detach().float().numpy().copy(), partition_dimension(parameter))
        for name, parameter in engine.module.named_parameters()
    }
    states = deepspeed_engine.optimizer_states(engine).values()
    moments = sum(state[key].numel() for state in states for key in ("exp_avg", "exp_avg_sq"))
    engine.destroy()
    numbers = [(r.loss, r.metrics["nll"], r.metrics.get("balance", 0.0), r.grad_norm) for r in results]
    return numbers, gradients, weights, moments


@pytest.fixture(scope="module")
def alone(pool):
    known: dict[Any, Any] = {}

    def of(routing: str, trainable: Any, units: int):
        key = routing, str(trainable), units
        if key not in known:
            known[key] = pool.run(1, train, in_units(units, frozen_recipe(routing, trainable)))
        return known[key]

    return of


# (world, tensor, expert, ZeRO stage)
LAYOUTS = [
    (2, 2, 1, 0),
    (2, 2, 1, 1),
    (2, 1, 2, 0),
    (2, 1, 2, 1),
    (2, 1, 1, 2),
    (2, 2, 2, 1),
    (4, 2, 2, 0),
    (4, 2, 2, 2),
    (4, 2, 1, 1),
]
CASES = [("lms", "methods", *layout) for layout in LAYOUTS]
CASES += [("lms", ATTENTION, *layout) for layout in ((2, 2, 1, 0), (2, 1, 2, 1), (4, 2, 2, 2))]
CASES += [("token", BIASES, *layout) for layout in ((2, 2, 1, 1), (2, 1, 2, 0), (4, 2, 2, 2))]
CASES += [
    ("distilled", "methods", 4, 2, 2, 1),
    ("sentence", ["*.router.*"], 2, 1, 2, 1),
    ("token", ["decoder.1.*.experts.*"], 2, 1, 2, 2),
]
CASES.sort(key=lambda case: case[2:5])


@pytest.mark.parametrize(("routing", "trainable", "world", "tensor", "expert", "stage"), CASES)
def test_layouts_train_the_same_part_alike(pool, alone, routing, trainable, world, tensor, expert, stage):
    units = 2 if tensor == world else UNITS
    wanted = alone(routing, trainable, units)
    recipe = in_units(units, frozen_recipe(routing, trainable, tensor, expert, stage))
    found = pool.run(world, train, recipe, tensor=tensor, expert=expert)
    assert_same(found, wanted, tensor)
    begun = initial(recipe)
    trained = whole(wanted, 1, 1).keys()
    assert 0 < len(trained) < len(begun)
    moved = {name for name, value in whole(found, tensor, 2).items() if not torch.equal(value, begun[name])}
    assert moved <= trained and len(moved) > len(trained) / 3, "what is frozen stays to the bit"
    numbers = sum(begun[name].numel() for name in trained)
    assert sum(wanted[0][3:]) == 2 * numbers, "Adam's two moments of what trains"


def initial(recipe: Recipe) -> dict[str, torch.Tensor]:
    model = Transformer(recipe, VOCABULARY)
    initialize(model, recipe.training.seed, Topology.single())
    names = global_names(model, Topology.single())
    return {names[name]: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bfloat16_trains_the_part_and_no_more(pool, stage):
    (found,) = pool.run(1, train, frozen_recipe("lms", "methods", stage=stage, bf16=True))
    begun = initial(frozen_recipe("lms", "methods"))
    numbers = 0
    for name, (values, _) in found[2].items():
        if name in found[1]:
            numbers += begun[name].numel()
        else:
            assert torch.equal(torch.from_numpy(values), begun[name].bfloat16().float()), name
    assert 2 * numbers <= found[3] <= 2 * numbers + 200  # ZeRO's padding
    assert found[0][1][0] != found[0][0][0]


def test_frozen_by_hand_in_plain_torch(pool):
    """A few lines without the engine: the same losses, norms and weights."""
    recipe = in_units(UNITS, frozen_recipe("lms", "methods"))
    recipe.model.decoder.moe = None
    ((results, gradients, weights, _),) = pool.run(1, train, recipe)
    model = Transformer(recipe, VOCABULARY)
    initialize(model, recipe.training.seed, Topology.single())
    trained = {name: parameter for name, parameter in model.named_parameters() if "_low_rank." in name}
    for parameter in set(model.parameters()) - set(trained.values()):
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.98), eps=1e-3, weight_decay=0.0)
    for number, step in enumerate(steps_of(recipe, 0, 1)):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, (number + 1) / 2)
        loss = sum(smoothed(model, batch, 0.1) for batch in step.batches) / step.target_tokens
        optimizer.zero_grad()
        loss.backward()
        if number == 0:
            for name, parameter in trained.items():
                close(torch.from_numpy(gradients[name][0]), parameter.grad, name)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), recipe.training.max_grad_norm)
        optimizer.step()
        assert results[number][0] == pytest.approx(loss.item(), rel=1e-5)
        assert results[number][3] == pytest.approx(float(norm), rel=1e-5)
    assert gradients.keys() == trained.keys()
    for name, parameter in model.named_parameters():
        close(torch.from_numpy(weights[name][0]), parameter.detach(), name)


def test_no_gradient_work_for_what_is_frozen():
    """Below the first layer that trains nothing is recorded, and above it no gradient of a weight is made."""
    recipe = frozen_recipe("lms", ["decoder.1.*_low_rank.*"])
    recipe.model.decoder.moe = None
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    freeze(model, recipe, Topology.single())
    batch = steps_of(recipe, 0, 1)[0].batches[0]
    memory, _ = model.encode(batch.source, LanguageContext(batch.ids))
    assert not memory.requires_grad
    loss = model(batch.source, batch.decoder_input, batch.labels, batch.ids).loss
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all((each.grad is not None) == each.requires_grad for each in model.parameters())
    names = {event.name for event in profile.function_events}
    assert "MultiplyBackward" in names and not any("Embedding" in name for name in names)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("frozen", ["flat", "vertical"])
def test_a_bank_makes_no_gradient_for_a_frozen_matrix(frozen, monkeypatch):
    recipe = frozen_recipe("lms", [f"*_low_rank.{'vertical' if frozen == 'flat' else 'flat'}"])
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    freeze(model, recipe, Topology.single())
    made = []

    def noting(true):
        return lambda *arguments: (made.append(arguments[0]), true(*arguments))[1]

    monkeypatch.setattr(products.Matrices, "gradient", noting(products.Matrices.gradient))
    batch = steps_of(recipe, 0, 1)[0].batches[0]
    model(batch.source, batch.decoder_input, batch.labels, batch.ids).loss.backward()
    count = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(made) == count and all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_dropout_of_frozen_layers_stays_as_the_recipe_says():
    recipe = frozen_recipe("dense", ["decoder.1.*"])
    recipe.training.dropout = 0.5
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    freeze(model, recipe, Topology.single())
    batch = steps_of(recipe, 0, 1)[0].batches[1]
    first, second = (model.encode(batch.source, LanguageContext(batch.ids))[0] for _ in range(2))
    assert F.mse_loss(first, second) != 0 and not first.requires_grad


def names_of(routing: str) -> tuple[list[str], Any]:
    model = Transformer(frozen_recipe(routing, "all"), VOCABULARY)
    return list(global_names(model, Topology.single()).values()), model.methods


def test_methods_own_their_parameters():
    names, methods = names_of("lms")
    chosen = choose(names, "methods", methods)
    kinds = {re.sub(r"^.*(attention|feed_forward)\.", "", re.sub(r"\.\d+", ".N", name)) for name in chosen}
    linears = ("query", "key", "value", "output", "expand", "contract")
    assert kinds == {
        *(f"{linear}_low_rank.{part}" for linear in linears for part in ("flat", "vertical")),
        *(f"experts.N.{linear}.{part}" for linear in ("expand", "contract") for part in ("weight", "bias")),
        "router.weight",
    }
    names, methods = names_of("distilled")
    assert any(".shared." in name for name in choose(names, "methods", methods))


@pytest.mark.parametrize(
    ("routing", "trainable", "sentence"),
    [
        (
            "dense",
            "methods",
            "'training.trainable' is methods, but no method of the model has parameters: give all or",
        ),
        ("dense", [], "'training.trainable' is an empty list"),
        ("dense", ["cross"], r"'cross', which matches no parameter \(did you mean '\*cross\*'\?\): give"),
        ("dense", ["decoder.9.*"], r"'decoder.9.\*', which matches no parameter: give patterns"),
        (
            "dense",
            ["encoder.0.atention.key.bias"],
            r"no parameter \(did you mean 'encoder.0.attention.key.bias'\?\)",
        ),
        (
            "token",
            ["*.experts.3.*"],
            r"trains decoder.1.feed_forward.experts.3.\S+ and not \S+: the experts of a layer train together",
        ),
    ],
)
def test_what_cannot_train_is_refused(routing, trainable, sentence):
    with pytest.raises(UserError, match=sentence):
        choose(names_of(routing)[0], trainable, names_of(routing)[1])

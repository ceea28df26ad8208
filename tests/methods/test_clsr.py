"""Conditional language-specific routing against the paper's equations, sentence by sentence."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support.language_layers import CODES, LANGUAGES, batch_of, build_clsr, ids_of
from torch import nn

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.methods.base import StepSize
from lsmoe_ds.methods.clsr.method import (
    ConditionalRouting,
    Projections,
    alpha,
    budget_loss,
)
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

HIDDEN, LENGTH, NOISE = 6, 4, 1.5


def routing_of(settings: Clsr, decoder: bool) -> tuple[Projections, ConditionalRouting]:
    torch.manual_seed(1)
    side = Projections(HIDDEN, settings, LANGUAGES, decoder)
    routing = ConditionalRouting(side)
    for parameter in [*side.parameters(), *routing.parameters()]:
        nn.init.normal_(parameter)
    return side, routing


def reference(
    side, routing, decoder: bool, training: bool, h, z, real, ids
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the equations for one sentence after another, and return outputs and the sum of the gates."""
    matrices = (side.specific if routing.specific is None else routing.specific).view(-1, HIDDEN, HIDDEN)
    first, _, second = routing.gate
    torch.manual_seed(5)
    noise = torch.randn(h.shape[:2])
    outputs, gates = [], []
    for i in range(h.shape[0]):
        language = int((ids.target if decoder else ids.source)[i])
        logits = F.relu(z[i] @ first.weight.t() + first.bias) @ second.weight[0]
        g = torch.sigmoid(logits + NOISE * noise[i]) if training else torch.where(logits >= 0, 1.0, 0.0)
        outputs.append(
            g[:, None] * (h[i] @ matrices[language].t()) + (1 - g[:, None]) * (h[i] @ side.shared.t())
        )
        gates.append(g[real[i]].sum())
    return torch.stack(outputs), torch.stack(gates).sum()


@pytest.mark.parametrize(
    "numbers", [[0, 0, 1, 3, 3, 5], [4, 0, 4, 2, 0], [1]], ids=["sorted", "unsorted", "one"]
)
@pytest.mark.parametrize(("shared", "decoder", "training"), product([True, False], repeat=3))
def test_a_sublayer_follows_the_equations(shared, decoder, training, numbers):
    side, routing = routing_of(Clsr(shared=shared, gate=3), decoder)
    side.train(training), routing.train(training)
    ids, generator = ids_of(numbers), torch.Generator().manual_seed(2)
    h, z, weights = (torch.randn(len(numbers), LENGTH, HIDDEN, generator=generator) for _ in range(3))
    real = torch.rand(h.shape[:2], generator=generator) < 0.7

    def ours(h, z):
        context = LanguageContext(ids, notes={})
        side.noise = NOISE
        torch.manual_seed(5)
        return routing(h, z, real, context), context.notes["clsr"][0]

    results = []
    for run in (ours, lambda h, z: reference(side, routing, decoder, training, h, z, real, ids)):
        inputs = [h.clone().requires_grad_(), z.clone().requires_grad_()]
        out, gates = run(*inputs)
        parameters = [*inputs, *side.parameters(), *routing.parameters()]
        gradients = torch.autograd.grad((out * weights).sum() + gates, parameters, materialize_grads=True)
        results.append([out, gates, *gradients])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert training or 0 < float(results[0][1]) < real.sum() or len(numbers) == 1, (
        "some gates must be open and some closed"
    )


def recipe_of(clsr: dict | None, **model) -> Recipe:
    side = {"layers": 2, "feed_forward": 24}
    return Recipe.model_validate(
        {
            "name": "test",
            "data": {"corpora": ["none"], "languages": CODES, "vocabulary": {"size": 96}},
            "model": {"hidden": 16, "heads": 4, "encoder": side, "decoder": side, "clsr": clsr, **model},
            "training": {"steps": 3, "dropout": 0.0},
        }
    )


def model_of(clsr: dict | None, trained: bool) -> Transformer:
    model = Transformer(recipe_of(clsr), 96)
    initialize(model, 1, Topology.single())
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if trained and "_clsr." in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def test_a_new_model_computes_what_the_naive_one_does():
    batch = batch_of([0, 1, 2, 3, 4, 5])
    naive, new, trained = (
        model.eval().logits(*batch)
        for model in (model_of(None, False), model_of({"gate": 4}, False), model_of({"gate": 4}, True))
    )
    torch.testing.assert_close(new, naive, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(naive, trained, atol=1e-2)


def test_hypotheses_step_by_step_as_teacher_forced():
    model, (source, target, ids) = model_of({"gate": 4}, True).eval(), batch_of([0, 3, 1])
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    state = model.start(source, ids).select(None, rows)
    tokens = target[[0, 1, 2, 0, 1, 2]]
    stepped = torch.stack([model.step(tokens[:, i : i + 1], state) for i in range(tokens.shape[1])], 1)
    torch.testing.assert_close(
        stepped, model.logits(source[rows], tokens, ids.select(rows)), rtol=1e-4, atol=1e-5
    )


def test_where_the_parameters_stand():
    def names(**clsr) -> set[str]:
        return {
            name.rsplit(".specific")[0]
            for name, _ in model_of(clsr, False).named_parameters()
            if name.endswith(".specific")
        }

    def gates(**clsr) -> set[str]:
        return {
            name.split(".gate.")[0]
            for name, _ in model_of(clsr, False).named_parameters()
            if ".gate." in name
        }

    layers = [f"{side}.{layer}" for side in ("encoder", "decoder") for layer in (0, 1)]
    cross = {f"decoder.{layer}.cross_attention_clsr" for layer in (0, 1)}
    sublayers = {f"{layer}.{name}_clsr" for layer in layers for name in ("attention", "feed_forward")}
    assert names() == {"encoder_clsr", "decoder_clsr"}
    assert gates() == gates(shared=False) == names(shared=False) == sublayers | cross
    assert gates(at=["feed_forward", "attention"]) == sublayers
    assert gates(at=["cross_attention"]) == cross and names(at=["cross_attention"]) == {"decoder_clsr"}
    assert len(model_of({}, False).state_dict()) == len(dict(model_of({}, False).named_parameters())), (
        "no parameter has two names"
    )


IWSLT = ("transformer-small", ["ar", "de", "es", "fa", "he", "it", "nl", "pl"], 32000)
OPUS = ("transformer-big", [a + b for a, b in product("abcdfghijo", "klmnpqrstu")][:94], 64000)


@pytest.mark.parametrize(
    ("case", "clsr", "millions"),
    [
        (IWSLT, None, 48),
        (IWSLT, {"gate": 8}, 53),
        (IWSLT, {"gate": 8, "shared": False}, 105),
        (OPUS, None, 242),
        (OPUS, {"gate": 8}, 443),
    ],
)
def test_parameter_counts_of_the_paper(case, clsr, millions):
    preset, codes, vocabulary = case
    at = ["attention", "feed_forward"]
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "data": {"corpora": ["none"], "languages": codes, "vocabulary": {"size": vocabulary}},
            "model": {"preset": preset, "clsr": clsr and {**clsr, "at": at}},
            "training": {"steps": 3},
        }
    )
    with torch.device("meta"):
        model = Transformer(recipe, vocabulary)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("shared", [True, False])
def test_a_mixed_batch_equals_one_batch_for_each_pair(shared):
    model = model_of({"gate": 4, "shared": shared}, True)
    numbers = [3, 0, 5, 0, 2, 3, 1, 4]
    source, target, ids = batch_of(numbers)

    def results(rows: list[int]) -> list[torch.Tensor]:
        index = torch.tensor(rows)
        losses = model(source[index], target[index], target.roll(-1, 1)[index], ids.select(index))
        gates = sum(losses.notes["clsr"])
        loss = losses.loss + gates
        return [loss, gates, *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]

    mixed = results(list(range(len(numbers))))
    parts = [results([i for i, n in enumerate(numbers) if n == number]) for number in sorted(set(numbers))]
    for found, wanted in zip(mixed, (sum(each) for each in zip(*parts, strict=True)), strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * max(float(wanted.detach().abs().max()), 0.1)


def test_alpha_grows_linearly():
    assert [alpha(number, 10) for number in (1, 2, 6, 11, 50)] == [0.0, 0.5, 2.5, 5.0, 5.0]


def test_a_gate_that_is_undecided_is_open_at_inference():
    side, routing = routing_of(Clsr(gate=3), False)
    nn.init.zeros_(routing.gate[2].weight)
    h, real = torch.randn(2, LENGTH, HIDDEN), torch.ones(2, LENGTH, dtype=torch.bool)
    out = routing.eval()(h, h, real, LanguageContext(ids_of([1, 1])))
    own = side.specific.view(-1, HIDDEN, HIDDEN)[int(ids_of([1]).source)]
    torch.testing.assert_close(out, h @ own.t())


@pytest.mark.parametrize("budget", [0.1, 0.9])
def test_the_parts_of_the_budget_loss_have_its_gradient(budget):
    settings = Clsr(budget=budget, weight=2.0)
    gates = torch.rand(10, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (wanted,) = torch.autograd.grad(2.0 * (gates.mean() - budget).abs(), gates)
    mean = gates.detach().mean()
    (found,) = torch.autograd.grad(
        sum(budget_loss(settings, part.sum(), mean, 10) for part in gates.split([3, 7])), gates
    )
    torch.testing.assert_close(found, wanted)


def test_gates_are_counted():
    def gates(**clsr) -> int:
        return build_clsr(recipe_of(clsr)).gate_count(StepSize(7, 5))

    assert gates() == 2 * 2 * 7 + 2 * 3 * 5
    assert gates(at=["cross_attention"]) == 2 * 5


@pytest.mark.parametrize(
    ("clsr", "message"),
    [
        ({"budget": 1.5}, "less than or equal to 1"),
        ({"gate": 0}, "greater than or equal to 1"),
        ({"at": []}, "at least 1 item"),
        ({"at": ["embedding"]}, "attention"),
    ],
)
def test_recipes_that_make_no_sense(clsr, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(clsr)


def test_clsr_and_fuse_distillation_exclude_each_other():
    with pytest.raises(ValueError, match="nothing to distill"):
        recipe_of({}, low_rank={"rank": 2, "fuse_distillation": True})

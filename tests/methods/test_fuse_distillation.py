"""Fuse distillation against the paper's equations, with two separate passes in plain torch; and the routes
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.fuse_distillation import fused, trained_matrices
from support.sameness import VOCABULARY, assert_same, close, steps_of, train, whole

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.inference.beam_search import Search, beam_search
from lsmoe_ds.languages import PAD
from lsmoe_ds.methods.fuse_distillation import FuseDistillation
from lsmoe_ds.methods.objective import Objective
from lsmoe_ds.model import base, initialization
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel import cross_entropy, parameters
from lsmoe_ds.parallel.layers import project
from lsmoe_ds.parallel.topology import Topology


def run_steps(topology, recipe: Recipe, teacher: bool):
    """As test_sameness.train, and the divergence of each step. Matrices are made to distill by
    ``teacher``.
    """
    from lsmoe_ds.training import engine

    results, true = [], engine.train_step

    def recorded(*arguments):
        results.append(true(*arguments))
        return results[-1]

    form = (
        mock.patch.object(base, "objective_of", lambda recipe: FuseDistillation(teacher))
        if recipe.model.low_rank
        else nullcontext()
    )
    with trained_matrices(), form, mock.patch.object(engine, "train_step", recorded):
        numbers, gradients, weights = train(topology, recipe)
    return (
        [(*each, result.metrics["distillation"]) for each, result in zip(numbers, results, strict=True)],
        gradients,
        weights,
    )


def model_of(recipe: Recipe, trained: bool = True) -> Transformer:
    model = Transformer(recipe, VOCABULARY)
    if trained:
        with trained_matrices():
            initialization.initialize(model, recipe.training.seed, Topology.single())
    else:
        initialization.initialize(model, recipe.training.seed, Topology.single())
    return model


def equations(recipe: Recipe, teacher: bool) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and gradients of the first step, from equations 2 to 4 with a pass for each route of each
    micro-batch.
    """
    model, step = model_of(recipe).train(), steps_of(recipe, 0, 1)[0]
    parts: dict[str, list[torch.Tensor]] = {"loss": [], "nll": [], "distillation": []}
    records: dict[str, list] = {name: [] for name in model.moe_names}
    apart = {
        name for name, (_, layer) in zip(records, model.moe_layers(), strict=True) if layer.shared is not None
    }
    for batch in step.batches:
        real, logs = batch.labels != PAD, []
        labels = batch.labels[real]
        for route in ("specific", "shared"):
            notes: dict = {}
            hidden = model._decode(
                batch.decoder_input,
                batch.decoder_input != PAD,
                model.start(batch.source, batch.ids, notes, route=route),
            )
            logs.append((hidden @ model.embedding.tokens.weight.t())[real].log_softmax(-1))
            for name, record in zip(
                [name for name in records if route == "specific" or name not in apart],
                notes.get("moe", []),
                strict=True,
            ):
                records[name].append(record)
        specific, shared = logs
        entropies = [F.cross_entropy(each, labels, label_smoothing=0.1, reduction="sum") for each in logs]
        taught = specific.detach() if teacher else specific
        forth = (taught.exp() * (taught - shared)).sum()
        back = (shared.exp() * (shared - specific)).sum()
        parts["loss"].append((entropies[0] + entropies[1]) / 2)
        parts["distillation"].append(forth if teacher else (forth + back) / 2)
        parts["nll"].append(F.nll_loss(specific, labels, reduction="sum"))
    losses = {name: sum(values) / step.target_tokens for name, values in parts.items()}
    losses |= {"balance": torch.zeros(()), "z_loss": torch.zeros(())}
    for name, layer in records.items():
        tokens = (1 if name in apart else 2) * (
            step.source_tokens if name.startswith("encoder") else step.target_tokens
        )
        share = sum(record.counts for record in layer) / tokens
        assert share.sum() == pytest.approx(1)
        settings = layer[0].settings
        losses["balance"] += (
            settings.balance_loss_weight
            * settings.experts
            * (share * sum(record.probabilities for record in layer) / tokens).sum()
        )
        losses["z_loss"] += settings.z_loss_weight * sum(record.squares for record in layer) / tokens
    (losses["loss"] + losses["distillation"] + losses["balance"] + losses["z_loss"]).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
    }
    return {name: value.item() for name, value in losses.items()}, gradients


@pytest.fixture(scope="module")
def alone(pool):
    """Return a function that runs :func:`run_steps` on one process, once for each routing and ``teacher``."""
    known: dict[tuple[str, bool], list] = {}

    def of(routing: str, teacher: bool):
        if (routing, teacher) not in known:
            known[routing, teacher] = pool.run(1, run_steps, fused(routing), teacher)
        return known[routing, teacher]

    return of


@pytest.mark.parametrize(
    ("routing", "teacher"),
    [("dense", False), ("mixed", False), ("mixed", True), ("distilled", True), ("one side", True)],
)
def test_a_step_follows_the_equations(alone, routing, teacher):
    found = alone(routing, teacher)
    losses, gradients = equations(fused(routing), teacher)
    loss, nll, balance, z_loss, _, _, distillation = found[0][0][0]
    named = {"loss": loss, "nll": nll, "distillation": distillation, "balance": balance, "z_loss": z_loss}
    assert named == pytest.approx(losses, rel=1e-5)
    assert distillation > 0.01, "the routes must differ, or nothing is tested"
    ours = whole(found, 1, 1)
    names = parameters.global_names(model_of(fused(routing)), Topology.single())
    assert ours.keys() == {names[name] for name in gradients}
    for name, wanted in gradients.items():
        close(ours[names[name]], wanted, name)


LAYOUTS = [
    ("dense", False, 2, 2, 1, 1),
    ("mixed", False, 2, 1, 1, 1),
    ("mixed", False, 2, 2, 2, 0),
    ("dense", True, 2, 2, 1, 0),
]
LAYOUTS += [("one side", True, 2, 2, 1, 0), ("distilled", True, 2, 1, 2, 2)]


@pytest.mark.parametrize(("routing", "teacher", "world", "tensor", "expert", "stage"), LAYOUTS)
def test_layout_computes_what_one_process_computes(
    pool, alone, routing, teacher, world, tensor, expert, stage
):
    wanted = alone(routing, teacher)
    found = pool.run(
        world, run_steps, fused(routing, tensor, expert, stage), teacher, tensor=tensor, expert=expert
    )
    assert_same(found, wanted, tensor)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("teacher", [False, True])
def test_losses_of_both_routes(monkeypatch, teacher, smoothing):
    monkeypatch.setattr(cross_entropy, "AT_ONCE", 100)  # three tokens at a time, the last alone
    generator = torch.Generator().manual_seed(1)
    hidden, embedding = (
        (3 * torch.randn(14, 8, generator=generator)).requires_grad_(),
        torch.nn.Embedding(30, 8),
    )
    torch.nn.init.normal_(embedding.weight, generator=generator)
    labels = torch.randint(30, (7,), generator=generator).repeat(2)
    logits = hidden @ embedding.weight.t()
    specific, shared = logits.log_softmax(-1).chunk(2)
    forth = F.kl_div(shared, specific.detach() if teacher else specific, reduction="sum", log_target=True)
    apart = forth if teacher else (forth + F.kl_div(specific, shared, reduction="sum", log_target=True)) / 2
    entropy = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum") / 2
    nll = F.nll_loss(specific, labels[:7], reduction="sum")
    found = FuseDistillation(teacher).losses(
        project(hidden, embedding, Topology.single()), labels, smoothing, Topology.single()
    )
    torch.testing.assert_close((found.loss, found.further["distillation"], found.nll), (entropy, apart, nll))
    parameters = [hidden, embedding.weight]
    expected = torch.autograd.grad(3 * (entropy + apart), parameters)
    for name, gradient, wanted in zip(
        ("hidden", "embedding"), torch.autograd.grad(3 * found[0], parameters), expected, strict=True
    ):
        close(gradient, wanted, name)


def test_experts_learn_nothing_from_the_shared_feed_forward():
    recipe = fused("distilled")
    batch = steps_of(recipe, 0, 1)[0].batches[1]

    def of_experts(learnt: Callable) -> dict[str, torch.Tensor | None]:
        """Gradients of half the loss of the specific route, or of all."""
        model = model_of(recipe).train()
        learnt(model)
        return {
            name: p.grad
            for name, p in model.named_parameters()
            if ".deepspeed_moe." in name or ".router." in name
        }

    def half(model: Transformer) -> None:
        model.objective = Objective()
        (model(batch.source, batch.decoder_input, batch.labels, batch.ids).loss / 2).backward()

    def both(model: Transformer) -> None:
        model(batch.source, batch.decoder_input, batch.labels, batch.ids).loss.backward()
        shared = [p for name, p in model.named_parameters() if ".feed_forward.shared." in name]
        assert len(shared) == 2 * 4 and all(parameter.grad.any() for parameter in shared)

    wanted = of_experts(half)
    assert any(gradient is not None and gradient.any() for gradient in wanted.values())
    torch.testing.assert_close(of_experts(both), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("routing", ["distilled", "one side"])
@pytest.mark.parametrize("static", [True, False], ids=["static", "token"])
def test_records_are_of_the_tokens_that_experts_get(routing, static):
    recipe = fused(routing)
    recipe.training.dropout = 0.3
    recipe.model.decoder.moe.routing = "static" if static else "token"
    recipe.model.decoder.moe.jitter = 0.0 if static else 0.3
    model, batch = model_of(recipe).train(), steps_of(recipe, 0, 1)[0].batches[1]
    state = torch.get_rng_state()
    ahead = model.totals_ahead(*batch.inputs)["moe"]
    torch.set_rng_state(state)
    records = model(batch.source, batch.decoder_input, batch.labels, batch.ids).notes["moe"]
    assert all(torch.equal(counts, record.counts) for counts, record in zip(ahead, records, strict=True))
    real = [int((ids != PAD).sum()) for ids in (batch.source, batch.decoder_input)]
    assert [int(record.counts.sum()) for record in records] == [
        real[0],
        real[1] if routing == "distilled" else 2 * real[1],
    ]
    assert [record.choices for record in records] == [int(r.counts.sum()) * r.settings.top_k for r in records]


def test_a_new_model_has_nothing_to_distill():
    recipe = fused("mixed")
    batch = steps_of(recipe, 0, 1)[0].batches[1]
    losses = model_of(recipe, trained=False).train()(
        batch.source, batch.decoder_input, batch.labels, batch.ids
    )
    recipe.model.low_rank = None
    plain = model_of(recipe).train()(batch.source, batch.decoder_input, batch.labels, batch.ids)
    assert abs(float(losses.further["distillation"].detach())) < 1e-5
    torch.testing.assert_close((losses.loss, losses.nll), (plain.loss, plain.nll))
    assert not plain.further


def test_the_shared_route_knows_no_languages():
    recipe = fused("dense")
    model, batch = model_of(recipe).eval(), steps_of(recipe, 0, 1)[0].batches[1]
    again = torch.arange(len(batch.direction) - 1, -1, -1)
    others = SentenceIds(*(getattr(batch.ids, name)[again] for name in ("source", "target", "direction")))
    assert (others.direction != batch.direction).any()

    def results(ids: SentenceIds, route: str) -> tuple[torch.Tensor, float, list]:
        with torch.no_grad():
            logits = model.logits(batch.source, batch.decoder_input, ids, route)
            nll = model(batch.source, batch.decoder_input, batch.labels, ids, route).nll
        return logits, float(nll), beam_search(model, batch.source, ids, [PAD], Search(beam=2), route)

    shared, same = results(batch.ids, "shared"), results(others, "shared")
    assert torch.equal(shared[0], same[0]) and shared[1:] == same[1:]
    for found, other in (
        (results(batch.ids, "specific"), results(others, "specific")),
        (shared, results(batch.ids, "specific")),
    ):
        assert (
            not torch.allclose(found[0], other[0], atol=1e-2)
            and found[1] != other[1]
            and found[2] != other[2]
        )

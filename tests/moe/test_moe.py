"""Routing and dispatch against a few lines of plain torch that follow the papers' equations, token by
token.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from lsmoe_ds.config.moe import Capacity, MoE
from lsmoe_ds.directions import Languages, SentenceIds, english_centric
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.model.feed_forward import FeedForward
from lsmoe_ds.moe.costs import bytes_per_row
from lsmoe_ds.moe.layer import MixtureOfExperts
from lsmoe_ds.moe.losses import RoutingRecord, balance_loss, record_routing, z_loss
from lsmoe_ds.moe.routers import DROPPED, ROUTERS, Routes, choose, limit
from lsmoe_ds.parallel.topology import Topology

HIDDEN, WIDTH, EXPERTS = 6, 10, 5
LANGUAGES = Languages(tuple(english_centric(["de", "fr"])))


def layer_of(routing: str, task: str = "target", top_k: int = 2, **settings) -> MixtureOfExperts:
    torch.manual_seed(3)
    alone = Topology.single()
    moe = MoE(experts=EXPERTS, top_k=top_k, routing=routing, task=task, **settings)
    layer = MixtureOfExperts(HIDDEN, moe, lambda: FeedForward(HIDDEN, WIDTH, alone), LANGUAGES, alone)
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def ids_of(directions: list[int]) -> SentenceIds:
    chosen = [LANGUAGES.directions[i] for i in directions]
    source, target = (
        torch.tensor([LANGUAGES.id(getattr(d, side)) for d in chosen]) for side in ("source", "target")
    )
    return SentenceIds(source, target, torch.tensor(directions))


def logits_of(
    layer: MixtureOfExperts, x: Tensor, real: Tensor, ids: SentenceIds, summary: Tensor | None, b: int, t: int
) -> Tensor:
    """W x_s, W mean(x_s), each with a bias or without, or W[task]: "Beyond Distillation", section 3.1."""
    if layer.settings.routing in ("token", "sentence"):
        mean = x[b, real[b]].mean(0) if summary is None else summary[b]
        product = layer.router.weight @ (x[b, t] if layer.settings.routing == "token" else mean)
        return product + layer.router.bias if layer.settings.router_bias else product
    return layer.router.weight[
        {"target": ids.target, "source": ids.source, "pair": ids.direction}[layer.settings.task][b]
    ]


def reference(
    layer: MixtureOfExperts, x: Tensor, real: Tensor, ids: SentenceIds, summary: Tensor | None = None
) -> Tensor:
    """y_s = sum_k g_k FFN_k(x_s), with g the top-k of the probabilities, scaled to sum to 1 for k > 1; token
    by token.
    """
    out = torch.zeros_like(x)
    for b, t in real.nonzero().tolist():
        gates, chosen = logits_of(layer, x, real, ids, summary, b, t).softmax(0).topk(layer.settings.top_k)
        gates = gates / gates.sum() if layer.settings.top_k > 1 else gates
        for gate, number in zip(gates, chosen, strict=True):
            expert = layer.deepspeed_moe.experts.deepspeed_experts[number]
            hidden = (expert.expand.weight @ x[b, t] + expert.expand.bias).relu()
            out[b, t] = out[b, t] + gate * (expert.contract.weight @ hidden + expert.contract.bias)
    return out


# Routing, task, whether a summary is given, which sentence routing reads in the decoder, and whether there is
# a bias.
KINDS = [
    ("token", "target", False, False),
    ("sentence", "target", False, False),
    ("sentence", "target", True, False),
]
KINDS += [("task", task, False, False) for task in ("target", "source", "pair")]
KINDS += [("token", "target", False, True), ("sentence", "target", False, True)]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("routing", "task", "with_summary", "bias"), KINDS)
def test_layer_follows_the_equation(routing, task, with_summary, bias, top_k):
    layer, ids = layer_of(routing, task, top_k, router_bias=bias), ids_of([0, 3, 1, 0])
    summary = torch.randn(4, HIDDEN) if with_summary else None
    real = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
    x = torch.randn(4, 3, HIDDEN)
    weight = torch.randn(4, 3, HIDDEN)
    results = []
    for compute in (
        lambda y: layer(y, real, LanguageContext(ids, summary)),
        lambda y: reference(layer, y, real, ids, summary),
    ):
        y = x.clone().requires_grad_()
        layer.zero_grad()
        out = compute(y)
        (out * weight).sum().backward()
        results.append(
            (
                out.detach(),
                y.grad,
                {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None},
            )
        )
    (out, dx, gradients), (wanted, wanted_dx, wanted_gradients) = results
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(dx, wanted_dx)
    assert not out[~real].any()
    used = {int(e) for e in routes_of(layer, x, real, LanguageContext(ids, summary)).experts.flatten()}
    wanted_names = {
        n for n, _ in layer.named_parameters() if "experts" not in n or int(n.split(".")[3]) in used
    }
    assert gradients.keys() == wanted_names, (
        "the router's and the used experts' gradients; training fills in the others' zeros"
    )
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], msg=name)


def routes_of(layer: MixtureOfExperts, x: Tensor, real: Tensor, context: LanguageContext) -> Routes:
    return layer.route(x, real, context)[2]


def test_static_routing_deals_tasks_to_experts_with_equal_weights():
    layer, ids = layer_of("static", "pair"), ids_of([0, 1, 2, 3])
    routes = routes_of(
        layer, torch.randn(4, 1, HIDDEN), torch.ones(4, 1, dtype=torch.bool), LanguageContext(ids)
    )
    assert routes.experts.tolist() == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert routes.weights.tolist() == [[0.5, 0.5]] * 4
    assert not list(layer.router.parameters())


@pytest.mark.parametrize("routing", ["task", "static"])
def test_a_task_chooses_within_its_group_of_experts(routing):
    languages = Languages(tuple(english_centric(["de", "nl", "ru", "uk", "fr"])))
    router = ROUTERS[routing](HIDDEN, MoE(experts=6, routing=routing, expert_groups=3), languages)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    routes = router.of_tasks()
    groups = languages.task_groups("target", 3)
    assert sorted(groups) == [0, 0, 1, 1, 2, 2] and groups[languages.id("ru")] == groups[languages.id("uk")]
    for task, group in enumerate(groups):
        assert {e // 2 for e in routes.experts[task].tolist()} == {group}
        outside = [e for e in range(6) if e // 2 != group]
        assert not routes.probabilities[task, outside].any()
    assert torch.isfinite(routes.log_sums).all()


@pytest.mark.parametrize("routing", ["token", "sentence", "task", "static"])
def test_no_token_at_all(routing):
    layer = layer_of(routing)
    x = torch.randn(2, 3, HIDDEN, requires_grad=True)
    notes: dict[str, list[RoutingRecord]] = {}
    out = layer(x, torch.zeros(2, 3, dtype=torch.bool), LanguageContext(ids_of([0, 1]), None, notes))
    records = notes["moe"]
    (out.sum() + balance_loss(records[0], records[0].counts, 1) + z_loss(records[0], 1)).backward()
    assert not out.any() and not records[0].counts.any() and not records[0].squares


def test_balance_loss_is_expert_count_times_shares_times_probabilities():
    """E sum_e f_e P_e over two micro-batches equals that of both in one."""
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1]])
    shares, mean = torch.tensor([0.75, 0.0, 0.25]), torch.tensor([1.9, 1.0, 1.1]) / 4
    settings = MoE(experts=3)
    for parts in ([probabilities], [probabilities[:1], probabilities[1:]]):
        routes = [choose(part.log(), 2) for part in parts]
        records = [record_routing(settings, each, each) for each in routes]
        counts = torch.stack([record.counts for record in records]).sum(0)
        found = sum(balance_loss(record, counts, 4) for record in records)
        torch.testing.assert_close(found, 3 * (shares * mean).sum())
    even = choose(torch.zeros(3, 3), 1)
    even.experts = torch.tensor([[0], [1], [2]])
    record = record_routing(settings, even, even)
    torch.testing.assert_close(balance_loss(record, record.counts, 3), torch.tensor(1.0))


def test_z_loss_is_the_mean_square_of_the_log_partition():
    logits = torch.randn(7, EXPERTS) * 3
    routes = choose(logits, 2)
    found = z_loss(record_routing(MoE(experts=EXPERTS), routes, routes), 7)
    torch.testing.assert_close(found, (logits.exp().sum(1).log() ** 2).mean())


@pytest.mark.parametrize("drop", ["probability", "position"])
@pytest.mark.parametrize("factor", [0.4, 0.8, 1.0, 9.0])
def test_capacity_drops_what_a_loop_over_choices_drops(drop, factor):
    routes = choose(torch.randn(20, EXPERTS, generator=torch.Generator().manual_seed(2)) * 2, 2)
    kept = limit(routes, Capacity(drop=drop), factor)
    capacity = math.ceil(factor * 2 * 20 / EXPERTS)
    choices = [(k, s) for k in range(2) for s in range(20)]  # GShard: all first choices, then all second ones
    if drop == "probability":
        choices.sort(key=lambda c: -float(routes.weights[c[1], c[0]]))
    room = [capacity] * EXPERTS
    for k, s in choices:
        expert = int(routes.experts[s, k])
        fits = room[expert] > 0
        room[expert] -= 1
        assert int(kept.experts[s, k]) == (expert if fits else DROPPED)
        assert float(kept.weights[s, k]) == (float(routes.weights[s, k]) if fits else 0.0)
    assert (kept.experts == DROPPED).any() == (factor < 9)


def test_capacity_holds_in_training_and_is_off_in_evaluation_unless_asked_for():
    x, real, ids = torch.randn(4, 6, HIDDEN), torch.ones(4, 6, dtype=torch.bool), ids_of([0, 1, 2, 3])
    free, limited = layer_of("token"), layer_of("token", capacity={"training": 0.5})
    both = layer_of("token", capacity={"training": 0.5, "evaluation": 0.5})
    torch.testing.assert_close(
        limited.eval()(x, real, LanguageContext(ids)), free.eval()(x, real, LanguageContext(ids))
    )
    assert not torch.equal(
        limited.train()(x, real, LanguageContext(ids)), free(x, real, LanguageContext(ids))
    )
    torch.testing.assert_close(
        both.eval()(x, real, LanguageContext(ids)), limited(x, real, LanguageContext(ids))
    )


def noise_of(routing: str, jitter: float, training: bool) -> tuple[Tensor, MixtureOfExperts]:
    """Return what the router multiplies thousands of values by, and its layer."""
    layer, factors = layer_of(routing, jitter=jitter), []
    layer.train(training)
    true, ones = torch.nn.functional.linear, torch.ones(1250, 8, HIDDEN)

    def recorded(x: Tensor, *parameters: Tensor | None) -> Tensor:
        factors.append(x)
        return true(x, *parameters)

    with mock.patch.object(torch.nn.functional, "linear", recorded):
        layer.route(ones, torch.ones(1250, 8, dtype=torch.bool), LanguageContext(ids_of([0] * 1250)))
    return factors[0].flatten(), layer


@pytest.mark.parametrize("routing", ["token", "sentence"])
def test_jitter_multiplies_what_the_router_reads_by_uniform_noise_around_one(routing):
    noise, _ = noise_of(routing, 0.3, training=True)
    least, most, middle = float(noise.min()), float(noise.max()), float(noise.mean())
    assert 0.70 <= least < 0.71 and 1.29 < most <= 1.30 and middle == pytest.approx(1.0, abs=0.01)
    assert float(noise.std()) == pytest.approx(0.3 / math.sqrt(3), rel=0.05)
    for quiet, _ in (noise_of(routing, 0.3, training=False), noise_of(routing, 0.0, training=True)):
        assert (quiet == 1).all()


def test_jitter_does_not_reach_the_experts():
    """With one expert, whose weight is 1 for K = 1, the output does not depend on the router."""
    torch.manual_seed(3)
    alone, moe = Topology.single(), MoE(experts=1, top_k=1, jitter=0.9)
    layer = MixtureOfExperts(HIDDEN, moe, lambda: FeedForward(HIDDEN, WIDTH, alone), LANGUAGES, alone).train()
    torch.nn.init.normal_(layer.router.weight)
    x, real = torch.randn(4, 6, HIDDEN), torch.ones(4, 6, dtype=torch.bool)
    (expert,) = layer.deepspeed_moe.experts.deepspeed_experts
    torch.testing.assert_close(layer(x, real, LanguageContext(ids_of([0, 1, 2, 3]))), expert(x))


def test_gates_of_two_sum_to_one_and_of_one_are_probabilities():
    logits = torch.randn(7, EXPERTS)
    torch.testing.assert_close(choose(logits, 2).weights.sum(1), torch.ones(7))
    torch.testing.assert_close(choose(logits, 1).weights[:, 0], logits.softmax(1).max(1).values)


def dispatch(topology, tokens: int, top_k: int):
    """Send every token of rank r to experts of rank (r + 1) % R; return the rows and bytes that a rank sent.

    The rows are the rank's own tokens. The bytes also include counts, the outputs that it returns to other
    ranks, and gradients.
    """
    torch.manual_seed(5)
    layer = MixtureOfExperts(
        HIDDEN,
        MoE(experts=4 * topology.expert, top_k=top_k),
        lambda: FeedForward(HIDDEN, WIDTH, Topology.single()),
        LANGUAGES,
        topology,
    )
    x = torch.randn(tokens * (topology.rank + 1), HIDDEN, requires_grad=True)
    first = 4 * ((topology.rank + 1) % topology.expert)
    experts = first + torch.rand(len(x), 4).argsort(1)[:, :top_k]
    weights = torch.rand(len(x), top_k, requires_grad=True)
    layer.deepspeed_moe(x, experts, weights).sum().backward()
    traffic = layer.deepspeed_moe.traffic.take()
    return traffic.rows, traffic.bytes


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_token_travels_once_however_many_of_its_experts_live_on_a_rank(pool, top_k):
    """And what travels is what the plan counts: a row out, a row back, and both again for the gradients."""
    ranks, tokens = 2, 5
    found = pool.run(ranks, dispatch, tokens, top_k, expert=ranks)
    rows = [tokens * (rank + 1) for rank in range(ranks)]
    assert [each[0] for each in found] == rows
    counts = 16 * ranks * (ranks - 1)
    assert sum(each[1] for each in found) == counts + sum(rows) * bytes_per_row(
        HIDDEN, top_k, 4, training=True
    )

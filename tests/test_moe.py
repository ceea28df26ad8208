"""Routing and dispatch against a few lines of plain torch that follow the papers' equations, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lsmoe_ds.config import MoE
from lsmoe_ds.languages import Languages, SentenceIds, english_centric
from lsmoe_ds.model.feed_forward import FeedForward
from lsmoe_ds.moe.layer import MixtureOfExperts, RoutingRecord
from lsmoe_ds.moe.losses import balance_loss
from lsmoe_ds.moe.routers import Routes, choose
from lsmoe_ds.parallel.topology import Topology

HIDDEN, WIDTH, EXPERTS = 6, 10, 5
LANGUAGES = Languages(tuple(english_centric(["de", "fr"])))


def layer_of(routing: str, task: str, top_k: int) -> MixtureOfExperts:
    torch.manual_seed(3)
    alone = Topology.single()
    settings = MoE(experts=EXPERTS, top_k=top_k, routing=routing, task=task)
    layer = MixtureOfExperts(HIDDEN, settings, lambda: FeedForward(HIDDEN, WIDTH, alone), LANGUAGES, alone)
    torch.nn.init.normal_(layer.router.weight)
    return layer


def ids_of(directions: list[int]) -> SentenceIds:
    chosen = [LANGUAGES.directions[i] for i in directions]
    source, target = (torch.tensor([LANGUAGES.id(getattr(d, side)) for d in chosen]) for side in ("source", "target"))
    return SentenceIds(source, target, torch.tensor(directions))


def reference(layer: MixtureOfExperts, x: Tensor, real: Tensor, ids: SentenceIds) -> Tensor:
    """y_s = sum_k g_k FFN_k(x_s), with g the top-k of softmax(W x_s) or softmax(W[task]), scaled to sum to 1 for k > 1."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if not real[b, t]:
                continue
            if layer.settings.routing == "token":
                logits = layer.router.weight @ x[b, t]
            else:
                logits = layer.router.weight[ids.target[b] if layer.settings.task == "target" else ids.direction[b]]
            gates, chosen = logits.softmax(0).topk(layer.settings.top_k)
            gates = gates / gates.sum() if layer.settings.top_k > 1 else gates
            for gate, number in zip(gates, chosen, strict=True):
                expert = layer.deepspeed_moe.experts.deepspeed_experts[number]
                hidden = (expert.expand.weight @ x[b, t] + expert.expand.bias).relu()
                out[b, t] = out[b, t] + gate * (expert.contract.weight @ hidden + expert.contract.bias)
    return out


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("routing", "task"), [("token", "target"), ("task", "target"), ("task", "pair")])
def test_layer_follows_the_equation(routing, task, top_k):
    layer, ids = layer_of(routing, task, top_k), ids_of([0, 3, 1, 0])
    real = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
    x = torch.randn(4, 3, HIDDEN)
    weight = torch.randn(4, 3, HIDDEN)
    results = []
    for compute in (lambda y: layer(y, real, ids), lambda y: reference(layer, y, real, ids)):
        y = x.clone().requires_grad_()
        layer.zero_grad()
        out = compute(y)
        (out * weight).sum().backward()
        results.append((out.detach(), y.grad, {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}))
    (out, dx, gradients), (wanted, wanted_dx, wanted_gradients) = results
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(dx, wanted_dx)
    assert not out[~real].any()
    assert len(gradients) == len(list(layer.parameters())), "every expert has a gradient, be it zero"
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients.get(name, torch.zeros_like(gradient)), msg=name)


def test_no_token_at_all():
    layer = layer_of("token", "target", 2)
    x = torch.randn(2, 3, HIDDEN, requires_grad=True)
    records: list[RoutingRecord] = []
    out = layer(x, torch.zeros(2, 3, dtype=torch.bool), ids_of([0, 1]), records)
    (out.sum() + records[0].balance).backward()
    assert not out.any() and torch.isfinite(records[0].balance)


def test_balance_loss_is_expert_count_times_shares_times_probabilities():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1]])
    routes = choose(probabilities.log(), 2)
    shares, mean = torch.tensor([0.75, 0.0, 0.25]), torch.tensor([1.9, 1.0, 1.1]) / 4
    torch.testing.assert_close(balance_loss(routes), 3 * (shares * mean).sum())
    even = Routes(torch.tensor([[0], [1], [2]]), torch.ones(3, 1), torch.full((3, 3), 1 / 3))
    torch.testing.assert_close(balance_loss(even), torch.tensor(1.0))


def test_gates_of_two_sum_to_one_and_of_one_are_probabilities():
    logits = torch.randn(7, EXPERTS)
    torch.testing.assert_close(choose(logits, 2).weights.sum(1), torch.ones(7))
    torch.testing.assert_close(choose(logits, 1).weights[:, 0], logits.softmax(1).max(1).values)

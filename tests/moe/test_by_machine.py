"""Rows that cross the network once to each machine and are forwarded within it: what is computed does not
change, and what travels is what the plan counts.
"""

from __future__ import annotations

import re
from itertools import combinations

import pytest
import torch
from support.plans import recipe_of, traffic
from support.sameness import assert_same, in_units, recipe_for, train

from lsmoe_ds.config.layout import Parallel
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.launch.membership import Membership
from lsmoe_ds.model.feed_forward import FeedForward
from lsmoe_ds.moe.costs import Rows, bytes_per_row, random_rows, rows_at_home
from lsmoe_ds.moe.dispatch import Dispatcher
from lsmoe_ds.moe.routers import DROPPED
from lsmoe_ds.parallel.topology import Topology, ranks_by_machine
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.training.start import _sizes

HIDDEN, WIDTH, EACH, TOP_K = 6, 10, 2, 3
TOKENS = (5, 0, 1, 7, 3, 2)  # of each rank


def dispatched(topology, expert_ranks: int, chunks: int, batches: list[tuple]) -> tuple:
    """Dispatch each batch with this rank's experts; return outputs, gradients and traffic.

    ``batches`` are (tokens, experts, weights, gradient of the output).
    """
    one = Topology.single()
    of_all = []
    for number in range(expert_ranks * EACH):
        torch.manual_seed(number)
        of_all.append(FeedForward(HIDDEN, WIDTH, one).requires_grad_())
        for parameter in of_all[-1].parameters():
            torch.nn.init.normal_(parameter)
    own = len(of_all) // topology.expert
    first = topology.expert_rank * own
    dispatcher = Dispatcher(of_all[first : first + own], len(of_all), topology, chunks)
    found = []
    for tokens, experts, weights, gradient in batches:
        tokens, weights = (torch.from_numpy(each).requires_grad_() for each in (tokens, weights))
        out = dispatcher(tokens, torch.from_numpy(experts), weights)
        out.backward(torch.from_numpy(gradient))
        found.append([each.detach().numpy() for each in (out, tokens.grad, weights.grad)])
    local = dispatcher.experts.deepspeed_experts
    gradients = {
        f"{first + number}.{name}": parameter.grad.numpy()
        for number, expert in enumerate(local)
        for name, parameter in expert.named_parameters()
        if parameter.grad is not None
    }
    taken = dispatcher.traffic.take()
    return found, gradients, (taken.rows, taken.bytes)


def dispatched_by_rank(topology, chunks: int, batches: list[tuple]) -> tuple:
    return dispatched(topology, topology.expert, chunks, [batches[topology.rank]])


@pytest.mark.parametrize(("node", "chunks"), [(2, 1), (3, 1), (3, 2)])
def test_outputs_and_gradients_are_those_of_one_process(pool, node, chunks):
    """Three machines of two ranks and two of three, so that machines cannot be taken for their ranks."""
    ranks, generator = len(TOKENS), torch.Generator().manual_seed(3)
    batches, machines, reached = [], 0, 0
    for rank, count in enumerate(TOKENS):
        experts = torch.rand(count, ranks * EACH, generator=generator).argsort(1)[:, :TOP_K]
        experts[torch.rand(count, TOP_K, generator=generator) < 0.2] = DROPPED
        values = [torch.randn(count, size, generator=generator) for size in (HIDDEN, TOP_K, HIDDEN)]
        batches.append(tuple(each.numpy() for each in (values[0], experts, *values[1:])))
        for row in experts.tolist():
            owners = {number // EACH for number in row if number != DROPPED}
            at = {owner // node for owner in owners}
            machines += len(at - {rank // node})
            reached += sum(owner % node != rank % node for owner in owners)
    ((wanted, wanted_gradients, _),) = pool.run(1, dispatched, ranks, 1, batches)
    found = pool.run(ranks, dispatched_by_rank, chunks, batches, expert=ranks, node=node)
    gradients = {}
    for ((own,), of_own, _), theirs in zip(found, wanted, strict=True):
        gradients |= of_own
        for ours, expected in zip(own, theirs, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(expected))
    assert wanted_gradients.keys() <= gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(
            torch.from_numpy(value), torch.from_numpy(wanted_gradients.get(name, 0 * value))
        )
    rows, sent = (sum(each) for each in zip(*(travelled for *_, travelled in found), strict=True))
    assert rows == machines + reached and machines and reached
    counts = ranks * 16 * chunks * (ranks // node - 1 + node - 1)
    assert sent == counts + rows * bytes_per_row(HIDDEN, TOP_K, 4, training=True)


# The routing, the tensor-parallel ranks, the ZeRO stage, and whether layers are recomputed.
CASES = [
    ("token", 1, 0, False),
    ("token", 1, 2, True),
    ("mixed", 2, 1, False),
    ("sentence", 4, 1, False),
    ("distilled", 1, 1, True),
    ("capacity in chunks", 1, 2, False),
    ("pair in chunks", 2, 1, True),
]


@pytest.mark.parametrize(("routing", "tensor", "stage", "again"), CASES)
def test_training_is_that_of_one_process(pool, routing, tensor, stage, again):
    units = 2 if tensor == 4 else 4
    recipe, alone = (
        in_units(units, recipe_for(routing, *layout)) for layout in ((tensor, 4, stage), (1, 1, 1))
    )
    recipe.training.activation_checkpointing = again
    found = pool.run(4, train, recipe, tensor=tensor, expert=4, node=2)
    assert_same(found, pool.run(1, train, alone), tensor)


def with_replicas(expert: int) -> Recipe:
    recipe = recipe_for("mixed", 1, expert, 1)
    recipe.model.decoder.moe = recipe.model.decoder.moe.model_copy(update={"replicas": ["en"], "chunks": 2})
    return recipe


def test_replicas_stay_on_their_rank(pool):
    found = pool.run(4, train, with_replicas(4), expert=4, node=2)
    assert_same(found, pool.run(1, train, with_replicas(1)), 1)


@pytest.mark.parametrize("again", [False, True], ids=["", "activation checkpointing"])
@pytest.mark.parametrize("routing", ["token", "static"])
def test_bytes_are_those_that_the_plan_counts(pool, routing, again):
    recipe = recipe_of(routing, routing, expert=4)
    recipe.parallel, recipe.training.activation_checkpointing = Parallel(expert=4, node=2), again
    planned = {each.side: each for each in plan(recipe).exchanges}
    sides = [side for side, _, _ in recipe.model.moe_layers()]
    ranks = pool.run(4, traffic, recipe, expert=4, node=2)
    for side, of_layer in zip(sides, zip(*ranks, strict=True), strict=True):
        rows, sent = map(sum, zip(*of_layer, strict=True))
        forward = 1 + again
        assert sent == rows / forward * planned[side].row_bytes + forward * 4 * planned[side].count_bytes
        assert rows


@pytest.mark.parametrize(("groups", "node"), [(1, 1), (1, 2), (1, 4), (2, 2), (4, 2)])
def test_expected_rows_are_the_mean_over_all_choices(groups, node):
    experts, top_k, ranks = 16, 3, 8
    settings = MoE(experts=experts, top_k=top_k, routing="task", task="pair", expert_groups=groups)
    sent, forwarded, met = 0, 0, 0
    for rank in range(ranks):
        for group in range(groups):
            of_group = range(group * experts // groups, (group + 1) * experts // groups)
            for chosen in combinations(of_group, top_k):
                owners = {number * ranks // experts for number in chosen}
                sent += len({owner // node for owner in owners} - {rank // node})
                forwarded += sum(owner % node != rank % node for owner in owners)
                met += 1
    found = random_rows(settings, ranks, node)
    assert (found.sent, found.forwarded) == pytest.approx((sent / met, forwarded / met))


def test_rows_of_batches_at_home():
    settings = MoE(experts=16, routing="task", expert_groups=8)
    assert rows_at_home(settings, settings, 8, 1, 4) == Rows(0, 0)
    assert rows_at_home(settings, settings, 8, 2, 4) == Rows(0, 0.5), "tensor-parallel peers on one machine"
    # Of eight peers, half are on the other machine than the experts, and three quarters have another number.
    assert rows_at_home(settings, settings, 8, 8, 4) == Rows(0.5, 0.75)


def test_machines_and_the_ranks_across_them():
    of_machine, across = ranks_by_machine(12, 6, 2)
    assert of_machine == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert across == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]


@pytest.mark.parametrize(("expert", "node", "among"), [(8, 4, 4), (8, 8, 1), (4, 8, 1), (8, 1, 1)])
def test_rows_are_forwarded_only_if_a_layers_experts_are_on_several_machines(expert, node, among):
    assert Parallel(expert=expert, node=node).forwards_among == among


@pytest.mark.parametrize(("ranks", "warns"), [(2, False), (4, False), (3, True), (1, True)])
def test_training_warns_if_a_machine_has_other_ranks(ranks, warns):
    said = _sizes(Parallel(expert=4, node=2), Membership(world=4, local_world=ranks))
    assert said.startswith("tensor 1, expert 4 on machines of 2")
    assert ("warning: parallel.node is 2, but this machine has" in said) == warns


def test_machines_that_cut_a_group_of_experts_are_refused():
    with pytest.raises(ValueError, match=re.escape("'parallel.node' is 8 and 'parallel.expert' 12")):
        Parallel(expert=12, node=8)

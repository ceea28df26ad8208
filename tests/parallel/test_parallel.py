"""Collectives with gradients, random numbers of tensor-parallel ranks, groups, and the refusal of other
versions.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from unittest import mock

import pytest
import torch

from lsmoe_ds.errors import UserError
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.collectives import share
from lsmoe_ds.parallel.topology import check_world

# counts[r][q]: rows that rank r sends to rank q; one rank sends nothing, one receives nothing from anybody.
COUNTS = [[1, 3, 0, 2], [0, 0, 0, 0], [4, 1, 0, 1], [2, 0, 0, 5]]


def rows_of(rank: int) -> torch.Tensor:
    return torch.arange(sum(COUNTS[rank]) * 2, dtype=torch.float32).view(-1, 2) + 100 * rank


def exchange(topology):
    """Return the rows that a rank received, and the gradient of its own rows.

    Each receiver weights the rows that it received by its rank + 1.
    """
    from lsmoe_ds.parallel.collectives import Traffic, all_to_all, exchange_counts

    rank = topology.rank
    sent = torch.tensor(COUNTS[rank])
    traffic = Traffic()
    received = exchange_counts(sent, topology.expert_group, traffic)
    assert received.tolist() == [row[rank] for row in COUNTS]
    rows = rows_of(rank).requires_grad_()
    (out,) = all_to_all([rows], sent.tolist(), received.tolist(), topology.expert_group, traffic)
    (out * (rank + 1)).sum().backward()
    leaving = sum(COUNTS[rank]) - COUNTS[rank][rank]
    coming = sum(row[rank] for row in COUNTS) - COUNTS[rank][rank]
    assert traffic.bytes == 3 * 8 + leaving * 2 * 4 + coming * 2 * 4, (
        "counts, rows, and the gradients of those that came"
    )
    return out.detach().numpy(), rows.grad.numpy()


def test_uneven_all_to_all_and_its_gradient(pool):
    results = pool.run(4, exchange, expert=4)
    for rank, (received, gradient) in enumerate(results):
        parts = [rows_of(r).split(COUNTS[r])[rank] for r in range(4)]
        assert torch.equal(torch.from_numpy(received), torch.cat(parts))
        wanted = torch.cat([torch.full((count, 2), float(q + 1)) for q, count in enumerate(COUNTS[rank])])
        assert torch.equal(torch.from_numpy(gradient), wanted)


# float64 needs more than the bfloat16 before it is aligned to.
PARTS = {"x": (torch.bfloat16, 3, True), "n": (torch.int32, 1, False), "w": (torch.float64, 2, True)}
PARTS |= {"frozen": (torch.float32, 1, False)}


def parts_of(rank: int) -> list[torch.Tensor]:
    count = sum(COUNTS[rank])
    values = torch.arange(count * 4) + 10 * rank
    return [
        values[: count * width].view(count, width).to(dtype).requires_grad_(trains)
        for dtype, width, trains in PARTS.values()
    ]


def exchange_together(topology):
    """Return what a rank received, the gradients of its own parts, and the messages that left it each way."""
    import torch.distributed as dist

    from lsmoe_ds.parallel.collectives import Traffic, all_to_all

    rank, messages, true = topology.rank, [], dist.all_to_all_single
    sent, received = COUNTS[rank], [row[rank] for row in COUNTS]
    traffic, parts = Traffic(), parts_of(rank)
    with mock.patch.object(dist, "all_to_all_single", lambda *a, **o: (messages.append(1), true(*a, **o))[1]):
        out = all_to_all(parts, sent, received, topology.expert_group, traffic)
        there = len(messages)
        assert [each.requires_grad for each in out] == [True, False, True, False]
        ((out[0].double().sum() + 3 * out[2].sum()) * (rank + 1)).backward()
    leaving, coming = sum(sent) - sent[rank], sum(received) - received[rank]
    assert traffic.bytes == leaving * (6 + 4 + 16 + 4) + coming * (6 + 16)
    return (
        [each.detach().double().numpy() for each in out],
        [parts[i].grad.double().numpy() for i in (0, 2)],
        (there, len(messages) - there),
    )


def test_parts_of_several_types_travel_in_one_message(pool):
    for rank, (received, gradients, messages) in enumerate(pool.run(4, exchange_together, expert=4)):
        assert messages == (1, 1)
        for number, each in enumerate(received):
            wanted = torch.cat([parts_of(r)[number].detach().split(COUNTS[r])[rank] for r in range(4)])
            assert torch.equal(torch.from_numpy(each), wanted.double())
        by_rank = torch.cat([torch.full((count, 1), float(q + 1)) for q, count in enumerate(COUNTS[rank])])
        assert torch.equal(torch.from_numpy(gradients[0]), by_rank.double().expand(-1, 3))
        assert torch.equal(torch.from_numpy(gradients[1]), 3 * by_rank.double().expand(-1, 2))


def split_and_join(topology, total: int):
    from lsmoe_ds.parallel.collectives import join_rows, split_rows

    rows = torch.arange(total * 3, dtype=torch.float32).view(total, 3).requires_grad_()
    part = split_rows(rows, topology.tensor_group)
    joined = join_rows(part * 2, total, topology.tensor_group)
    (joined * torch.arange(total)[:, None]).sum().backward()
    return part.shape[0], joined.detach().numpy(), rows.grad.numpy()


@pytest.mark.parametrize("total", [0, 1, 5, 8])
def test_split_and_joined_rows(pool, total):
    results = pool.run(4, split_and_join, total, tensor=4)
    assert sum(count for count, _, _ in results) == total
    rows = torch.arange(total * 3, dtype=torch.float32).view(total, 3)
    for _, joined, gradient in results:
        assert torch.equal(torch.from_numpy(joined), rows * 2)
        assert torch.equal(torch.from_numpy(gradient), (2.0 * torch.arange(total))[:, None].expand(total, 3))


def test_shares_cover_everything_once():
    for total in range(20):
        bounds = [share(total, 6, rank) for rank in range(6)]
        assert bounds[0][0] == 0 and bounds[-1][1] == total
        assert all(bounds[i][1] == bounds[i + 1][0] for i in range(5))


def draws(topology):
    compat.seed_tensor_parallel_random(5, topology.tensor_rank)
    first = torch.rand(4)
    with compat.tensor_parallel_random():
        own = torch.rand(4)
    saved = compat.random_state(topology.tensor)
    with compat.tensor_parallel_random():
        later = torch.rand(4)
    after = torch.rand(4)
    compat.restore_random_state(saved, topology.tensor)
    with compat.tensor_parallel_random():
        again = torch.rand(4)
    assert torch.equal(later, again) and torch.equal(after, torch.rand(4))
    return first.tolist(), own.tolist(), after.tolist()


def test_random_numbers_differ_only_inside_the_tensor_parallel_region(pool):
    (first, own, after), (other_first, other_own, other_after) = pool.run(2, draws, tensor=2)
    assert first == other_first and after == other_after
    assert own != other_own


def ranks_of(topology):
    import torch.distributed as dist

    groups = (topology.tensor_group, topology.data_group, topology.expert_group)
    return [dist.get_process_group_ranks(group) for group in groups]


def test_folded_groups(pool):
    found = pool.run(4, ranks_of, tensor=2, expert=2)
    assert found == [
        [[0, 1], [0, 2], [0, 1]],
        [[0, 1], [1, 3], [0, 1]],
        [[2, 3], [0, 2], [2, 3]],
        [[2, 3], [1, 3], [2, 3]],
    ]


def test_other_versions_are_refused(monkeypatch):
    compat.check_versions()
    true_version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.9" if name == "deepspeed" else true_version(name)
    )
    with pytest.raises(
        UserError, match=r"deepspeed 9\.9 is installed, but lsmoe_ds adapts deepspeed==0\.19\.8"
    ):
        compat.check_versions()


def test_world_that_does_not_fit_is_refused():
    check_world(4, 2, 4)
    with pytest.raises(UserError, match=r"parallel\.expert is 4, which does not divide the 6 processes"):
        check_world(6, 2, 4)


STARTED = """
import gc, sys, torch
from lsmoe_ds.parallel import compat
compile = torch.compile
assert compat.import_deepspeed() is compat.import_deepspeed()
assert compat.import_megatron().__name__ == "megatron.core.parallel_state"
assert torch.compile is compile and gc.isenabled() and gc.get_freeze_count() > 100_000
print([name for name in sys.modules if name.startswith("torch._inductor.compile_fx")])
"""


def test_a_rank_starts_without_torchs_compiler():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STARTED], stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"

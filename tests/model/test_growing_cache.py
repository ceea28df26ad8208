"""The keys and values of earlier positions are kept in buffers with room for more."""

from __future__ import annotations

import torch

from lsmoe_ds.model.attention import ROOM, GrowingCache


def test_it_holds_what_joining_all_positions_gives():
    generator = torch.Generator().manual_seed(1)

    def positions(count: int):
        return [torch.randn(4, 2, count, 3, generator=generator) for _ in range(2)]

    wanted = positions(1)
    cache = GrowingCache((wanted[0].clone(), wanted[1].clone()))
    for step in range(3 * ROOM):
        new = positions(1 + 2 * ROOM * (step == 5))
        cache.append((new[0], new[1]))
        wanted = [torch.cat(parts, 2) for parts in zip(wanted, new, strict=True)]
        if step % 3 == 2:  # as a beam search does, which leaves the former state as it is
            rows, former, was = torch.randint(4, (4,), generator=generator), cache, wanted
            cache, wanted = cache.select(rows), [part[rows] for part in wanted]
            cache.append((new[0], new[1]))
            wanted = [torch.cat(parts, 2) for parts in zip(wanted, new, strict=True)]
            assert all(map(torch.equal, former.filled, was))
        assert all(map(torch.equal, cache.filled, wanted))


def test_a_further_position_is_written_into_the_room():
    cache = GrowingCache((torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)))
    cache.append((torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)))
    where = cache.filled[0].data_ptr()
    for _ in range(ROOM):
        cache.append((torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)))
    assert cache.filled[0].data_ptr() == where, "nothing is copied"
    cache.append((torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)))
    assert cache.filled[0].data_ptr() != where

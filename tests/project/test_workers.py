"""The pool of workers: what a failing or a dead rank leaves behind."""

from __future__ import annotations

import os
import re

import pytest


def fail_on_one(topology, how: str):
    import torch.distributed as dist

    if topology.rank == 1:
        if how == "dies":
            os._exit(3)
        raise ValueError("spoiled")
    dist.barrier()


@pytest.mark.parametrize(("how", "says"), [("raises", "ValueError: spoiled"), ("dies", "rank 1 has died")])
def test_the_failure_of_a_rank_is_told_while_others_wait_for_it(pool, how, says):
    with pytest.raises(AssertionError, match=re.escape(says)):
        pool.run(2, fail_on_one, how)
    assert pool.run(2, answer) == [0, 1], "new workers"


def answer(topology) -> int:
    return topology.rank

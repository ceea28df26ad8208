"""A training that stands still comes to an end, and says who stood where. Ranks are processes that only share
a store.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lsmoe_ds.launch import watchdog
from lsmoe_ds.launch.joining import free_port

RANK = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from lsmoe_ds.launch.joining import Party
from lsmoe_ds.launch.membership import Membership
from lsmoe_ds.launch.watchdog import beat, leave_behind, watch

rank, port, beats = map(int, sys.argv[1:4])
hang_timeout, ends = float(sys.argv[4]), len(sys.argv) > 5
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, wait_for_workers=False)
party = Party(Membership("srun", rank, 2), store, ("node1", "node2"))
store.set(f"here/{rank}", "")
store.wait(["here/0", "here/1"])

def stand_still():
    try:
        store.wait(["never"], timedelta(seconds=100))
    except RuntimeError:  # rank 0, which holds the store, has just left: a broken collective in a real run
        leave_behind(party)

with watch(party, hang_timeout):
    print("watched", flush=True)
    for step in range(beats):
        beat(f"in step {step}")
        time.sleep(0.1)
    if not ends:
        stand_still()
time.sleep(1.5 * hang_timeout)
store.add("ended", 1)
while rank == 0 and store.add("ended", 0) < 2:
    time.sleep(0.05)
"""


def start(*beats: int, hang_timeout: float, ends: bool = False) -> list[subprocess.Popen]:
    """Start two ranks, the first of which holds the store. Each makes progress so many times, ten times a
    second; then it stands still, or ``ends`` its watch."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port, str(count), str(hang_timeout), *["ends"] * ends],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, count in enumerate(beats)
    ]
    for rank in ranks:
        assert rank.stdout.readline() == "watched\n"
    return ranks


@pytest.mark.slow
def test_when_no_rank_comes_on_each_says_where_it_stands_and_leaves():
    ranks = start(3, 5, hang_timeout=1.5)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [watchdog.STATUS] * 2
    for number, (text, step) in enumerate(zip(said, (2, 4), strict=True)):
        assert f"no rank has made progress for 2 seconds (training.hang_timeout); rank {number} on " in text
        assert f"is in step {step} for " in text and f"[rank {number}]" in text and "in stand_still" in text
    assert "all ranks still answer" in said[0]


@pytest.mark.slow
def test_one_rank_that_comes_on_keeps_the_others():
    ranks = start(0, 30, hang_timeout=1.5)  # 3 s
    time.sleep(2.5)
    assert [rank.poll() for rank in ranks] == [None, None]
    assert [rank.wait(timeout=60) for rank in ranks] == [watchdog.STATUS] * 2


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_also_the_one_that_holds_the_store(stopped):
    ranks = start(1000, 3, hang_timeout=1.0) if stopped == 0 else start(3, 1000, hang_timeout=1.0)
    os.kill(ranks[stopped].pid, signal.SIGSTOP)
    try:
        _, said = ranks[1 - stopped].communicate(timeout=60)
        assert ranks[1 - stopped].returncode == watchdog.STATUS
        assert f"rank {1 - stopped} on " in said and "in stand_still" in said
        assert stopped == 0 or "stopped or dead: rank 1 on node2" in said
    finally:
        ranks[stopped].kill()
        ranks[stopped].wait()


def test_a_watch_that_ends_leaves_nothing_behind():
    ranks = start(15, 15, hang_timeout=1.0, ends=True)  # 1.5 s
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]

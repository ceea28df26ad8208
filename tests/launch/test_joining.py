"""Processes that meet: all go on together, or all are told why not. Ranks are threads here, with connections
of their own.
"""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.launch import joining
from lsmoe_ds.launch.joining import Party, free_port
from lsmoe_ds.launch.membership import Membership
from lsmoe_ds.parallel import collectives


def meet(
    notes: dict[int, dict], worlds: dict[int, int] | None = None, ranks: list[int] | None = None
) -> list:
    """Let processes meet, and return what each of them gets: the hosts of all ranks, or the error.

    ``notes`` [process] is what a process publishes about itself, ``worlds`` [process] the number of processes
    that it was told, and ``ranks`` [process] its rank, by default its key in ``notes``.
    """
    port = free_port()

    def one(process: int):
        rank = (ranks or list(notes))[process]
        membership = Membership(
            "srun", rank, (worlds or {}).get(process, len(notes)), 0, 1, "127.0.0.1", port
        )
        try:
            note = {
                "host": f"node{process}",
                "device": f"gpu{process}",
                "alike": {"torch": "2"},
                **notes[process],
            }
            store = joining._open_store(membership)
            return joining._compare(
                membership, store, note
            ), store  # the first one's store lives as long as the others need it
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(notes)) as threads:
        results = list(threads.map(one, notes))
    return [result if isinstance(result, UserError) else result[0] for result in results]


def test_those_who_fit_together_learn_where_all_are():
    assert meet({0: {}, 1: {}, 2: {"host": "node1"}}) == [("node0", "node1", "node1")] * 3


def test_what_differs_is_told_to_all():
    errors = meet({0: {}, 1: {}, 2: {"alike": {"torch": "3"}}})
    assert {type(error) for error in errors} == {SharedError}
    assert {str(error) for error in errors} == {
        "torch is 2 on rank 0 (node0) and 3 on rank 2 (node2): all ranks must have the same"
    }


def test_two_ranks_do_not_share_a_gpu():
    gpu = {"host": "node0", "device": "gpu0"}
    errors = meet({0: gpu, 1: gpu})
    assert ["ranks 0 and 1 on node0 would share one GPU" in str(error) for error in errors] == [True, True]
    assert meet({0: gpu, 1: {**gpu, "host": "node1"}}) == [("node0", "node1")] * 2


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(joining, "PATIENCE", 0.5)
    errors = meet({0: {}, 1: {}}, worlds={0: 4, 1: 4})
    assert [str(error) for error in errors] == [
        "2 of 4 ranks have come within 0 seconds: missing are 2, 3"
    ] * 2


def test_a_rank_exists_once():
    errors = meet({0: {}, 1: {}, 2: {}}, worlds={0: 2, 1: 2, 2: 2}, ranks=[0, 1, 1])
    refused = [error for error in errors if isinstance(error, UserError)]
    assert [str(error) for error in refused] == [
        "two processes say that they are rank 1 of 2: start each once"
    ]


def test_a_rank_that_was_told_of_another_number_does_not_go_on():
    alone, other = meet({0: {}, 1: {}}, worlds={0: 1, 1: 2})
    assert alone == ("node0",)
    assert (
        str(other) == "rank 1 was started as one of 2 processes, rank 0 as one of 1: give all the same number"
    )


def test_a_taken_port_and_a_rank_0_that_is_not_there(monkeypatch):
    monkeypatch.setattr(joining, "PATIENCE", 0.5)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"cannot listen on port {port} of .* set MASTER_PORT to a free one"
        ):
            joining._open_store(Membership("srun", 0, 2, 0, 2, "127.0.0.1", port))
    with pytest.raises(
        UserError, match=r"rank 1 on .* has not reached rank 0 at 127.0.0.1:\d+ within 0 seconds"
    ):
        joining._open_store(Membership("srun", 1, 2, 1, 2, "127.0.0.1", free_port()))


def test_a_party_in_words():
    membership = Membership("srun", 0, 4, 0, 2, "node1", 1)
    assert Party(membership, None, ("node1", "node1", "node2", "node3")).describe() == (
        "4 ranks on node1 (0-1), node2 (2), node3 (3), started by srun"
    )
    assert Party(Membership(), None, ("here",)).describe() == "one process on here"


def fails_on_main(topology):
    def work():
        if topology.is_main:
            raise UserError("the main rank says so")

    try:
        collectives.on_main(work)
    except SharedError as error:
        return str(error)


def counts_on_main(topology):
    return collectives.on_main(lambda: topology.rank + 7)


def test_what_the_main_rank_finds_is_told_to_all(pool):
    assert pool.run(2, fails_on_main) == ["the main rank says so"] * 2
    assert pool.run(2, counts_on_main) == [7, 7]


@pytest.mark.parametrize(("count", "local_rank", "index"), [(4, 2, 2), (1, 3, 0), (1, 0, 0)])
def test_a_rank_takes_the_gpu_of_its_place_or_the_only_one_it_sees(monkeypatch, count, local_rank, index):
    import torch

    chosen = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu-{index}")
    )
    assert joining._choose_device(Membership("srun", 3, 4, local_rank, 4)) == f"gpu-{index}"
    assert chosen == [index] and os.environ["LOCAL_RANK"] == str(index)
    with pytest.raises(UserError, match=r"is number 4 on .*, which has 2 GPUs"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        joining._choose_device(Membership("srun", 3, 4, 3, 4))

"""A pool of processes for distributed tests. Starting one costs seconds of imports, so each is forked once
from a server that has imported everything, and kept. Every world size has its own processes, and these have
the groups of one layout until a test asks for another.

Between tasks processes are stopped: gloo's threads, three a group, would wake up a hundred times a second.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

# Seconds for a task, and for the first one, which compiles all that it imports beside whatever else the
# machine does; and for the other ranks once one has failed.
HANG, START, AFTER_FAILURE = 240, 600, 5
PR_SET_PDEATHSIG = 1  # of prctl: the signal that comes when the parent dies
PRELOAD = [
    "torch",
    "deepspeed",
    "megatron.core",
    "megatron.core.tensor_parallel",
    "deepspeed.moe.layer",
    "lsmoe_ds.training.engine",
]


def _serve(rank: int, world: int, port: int, connection: Any) -> None:
    import torch

    # A stopped process does not see that its parent has died.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if world > len(cores):  # kept on one, a rank needs a third less for the many small collectives of a test
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from lsmoe_ds.parallel import compat

    compat.import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    from lsmoe_ds.parallel.topology import Topology

    topology, built = Topology.single(), None
    while True:
        task = connection.recv()
        if task is None:
            return
        function, arguments, layout = task
        try:
            if layout != built:
                compat.forget_groups()
                topology, built = Topology.build(**layout), layout
            connection.send((True, function(topology, *arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Pool:
    """``run(world, function, *arguments, tensor=, expert=, node=)`` calls ``function(topology, *arguments)``
    on ``world`` processes and returns their results by rank. ``function`` must be importable.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._worlds: dict[int, list[tuple[Any, Any]]] = {}
        self._folder = tempfile.TemporaryDirectory()

    def _start(self, world: int) -> list[tuple[Any, Any]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        workers = []
        for rank in range(world):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(rank, world, port, theirs), daemon=True)
            process.start()
            workers.append((process, ours))
        return workers

    def run(
        self,
        world: int,
        function: Callable[..., Any],
        *arguments: Any,
        tensor: int = 1,
        expert: int = 1,
        node: int = 1,
    ) -> list[Any]:
        patience = HANG
        if world not in self._worlds:
            self._worlds[world] = self._start(world)
            patience = START
        workers = self._worlds[world]
        self._signal(world, signal.SIGCONT)
        for _, connection in workers:
            connection.send((function, arguments, {"tensor": tensor, "expert": expert, "node": node}))
        waiting, results, failures = {ours: rank for rank, (_, ours) in enumerate(workers)}, {}, []
        deadline = time.monotonic() + patience
        while waiting and (ready := wait(list(waiting), max(0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    done, results[rank] = connection.recv()
                except EOFError:
                    done, results[rank] = False, f"the worker of rank {rank} has died"
                if not done:
                    failures.append(results[rank])
                    # The others may wait for this one as long as their groups do.
                    deadline = min(deadline, time.monotonic() + AFTER_FAILURE)
        if failures or waiting:
            self._stop(world)  # their groups may be out of step
            late = [f"{function.__name__} hung on ranks {sorted(waiting.values())}"] * bool(waiting)
            raise AssertionError("\n".join([*failures, *late]))
        self._signal(world, signal.SIGSTOP)
        return [results[rank] for rank in range(world)]

    def _signal(self, world: int, number: signal.Signals) -> None:
        for process, _ in self._worlds[world]:
            with suppress(ProcessLookupError):  # of one that has died, :meth:`run` tells
                os.kill(process.pid, number)

    def _stop(self, world: int) -> None:
        for process, _ in self._worlds.pop(world):
            process.kill()
            process.join()

    def close(self) -> None:
        for world in list(self._worlds):
            self._stop(world)

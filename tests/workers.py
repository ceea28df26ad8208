"""A pool of processes for distributed tests. Starting one costs seconds of imports, so each is forked once
from a server that has imported everything, and kept. Every world size has its own processes, and these have
the groups of one layout until a test asks for another.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

HANG, START = (
    120,
    600,
)  # seconds; a first start compiles all that it imports, beside whatever else the machine does
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
    """``run(world, function, *arguments, tensor=, expert=)`` calls ``function(topology, *arguments)`` on
    ``world`` processes and returns their results by rank. ``function`` must be importable.
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
        self, world: int, function: Callable[..., Any], *arguments: Any, tensor: int = 1, expert: int = 1
    ) -> list[Any]:
        patience = HANG
        if world not in self._worlds:
            self._worlds[world] = self._start(world)
            patience = START
        workers = self._worlds[world]
        for _, connection in workers:
            connection.send((function, arguments, {"tensor": tensor, "expert": expert}))
        results = []
        for _, connection in workers:
            if not connection.poll(patience):
                self._stop(world)
                raise AssertionError(f"a worker of {world} hung in {function.__name__}")
            results.append(connection.recv())
        failures = [text for ok, text in results if not ok]
        if failures:
            self._stop(world)  # their groups may be out of step
            raise AssertionError("\n".join(failures))
        return [value for _, value in results]

    def _stop(self, world: int) -> None:
        for process, _ in self._worlds.pop(world):
            process.kill()
            process.join()

    def close(self) -> None:
        for world in list(self._worlds):
            self._stop(world)

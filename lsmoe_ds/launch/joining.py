"""Join the other processes of a training.

The processes meet in a store on rank 0, compare versions and sizes, and start together or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from lsmoe_ds import __version__, interrupt
from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.launch.membership import PORTS, Membership, find
from lsmoe_ds.notices import counted

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
PATIENCE = float(os.environ.get("LSMOE_JOIN_SECONDS", "300"))  # seconds until all processes must have joined
POLL = 0.05  # seconds


@dataclass(frozen=True)
class Party:
    """The processes that have joined: the ``store`` they share, and the host of each by rank."""

    membership: Membership
    store: dist.Store
    hosts: tuple[str, ...]

    def describe(self) -> str:
        """Describe the processes: ``4 ranks on node1 (0-1), node2 (2-3), started by srun``."""
        if self.membership.is_alone:
            return f"one process on {self.hosts[0]}"
        runs = [
            (host, [rank for rank, _ in ranks])
            for host, ranks in groupby(enumerate(self.hosts), key=lambda each: each[1])
        ]
        named = [
            f"{host} ({ranks[0]}-{ranks[-1]})" if len(ranks) > 1 else f"{host} ({ranks[0]})"
            for host, ranks in runs
        ]
        shown = [*named[:8], f"{len(named) - 8} more"] if len(named) > 8 else named
        return (
            f"{counted(len(self.hosts), 'rank')} on {', '.join(shown)}, started by {self.membership.launcher}"
        )


def join(
    membership: Membership | None = None, alike: Mapping[str, str] | None = None, timeout: float = 1800.0
) -> Party:
    """Join the other processes and initialize torch.distributed and DeepSpeed. Called by every process.

    ``membership`` is what :func:`find` returns, by default. All ranks compare versions, sizes and the values
    of ``alike``. Raises UserError on all ranks, within seconds if these differ, and after :data:`PATIENCE`
    seconds if some processes have not joined. A collective fails after ``timeout`` seconds.
    """
    from lsmoe_ds.parallel import compat

    compat.check_versions()
    membership = membership or find(os.environ)
    if membership.address is None:
        with interrupt.waiting("the other ranks"):
            membership = _meet_by_mpi(membership)
    os.environ.update(membership.environment())
    import torch
    import torch.distributed as dist

    device = _choose_device(membership)
    store = _open_store(membership)
    note = {
        "host": socket.gethostname(),
        "device": device,
        "alike": {
            "Python": ".".join(platform.python_version_tuple()[:2]),
            "lsmoe_ds": __version__,
            "torch": torch.__version__,
            "the number of processes": str(membership.world),
            **(alike or {}),
        },
    }
    with interrupt.waiting("the other ranks"):
        hosts = _compare(membership, store, note)
    deepspeed = compat.import_deepspeed()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=membership.rank,
        world_size=membership.world,
        timeout=timedelta(seconds=timeout),
    )
    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # uses the process group that exists
    return Party(membership, store, hosts)


def device() -> str:
    """Return the device on which this process computes, after it has joined."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _choose_device(membership: Membership) -> str:
    """Choose this rank's own GPU and return an identifier that is unique on the host.

    If the rank sees several GPUs, it takes the one with its local rank as index; otherwise the only one that
    it sees. Without GPUs the identifier is that of the process. Raises UserError if there are fewer GPUs than
    local ranks.
    """
    import torch

    if not torch.cuda.is_available():
        return f"process {os.getpid()}"
    count, local_rank = torch.cuda.device_count(), membership.local_rank
    if 1 < count <= local_rank:
        raise UserError(
            f"rank {membership.rank} is number {local_rank + 1} on {socket.gethostname()}, which has {count} "
            "GPUs: start as many ranks on a node as it has GPUs"
        )
    index = local_rank if count > 1 else 0
    os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed chooses its device by this variable
    torch.cuda.set_device(index)
    return str(torch.cuda.get_device_properties(index).uuid)


def _open_store(membership: Membership) -> dist.Store:
    import torch.distributed as dist

    if membership.is_alone:
        return dist.HashStore()
    address, port = str(membership.address), int(membership.port or 0)
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds it, across restarts
    try:
        with interrupt.waiting(f"rank 0 at {address}:{port}" if membership.rank else "the other ranks"):
            store = dist.TCPStore(
                address,
                port,
                membership.world,
                is_master=membership.rank == 0 and not held,
                timeout=timedelta(seconds=PATIENCE),
                wait_for_workers=False,
            )
    except dist.DistError as error:
        if membership.rank == 0 and not held:
            reason = "it is taken" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
            raise UserError(
                f"rank 0 cannot listen on port {port} of {socket.gethostname()} ({reason}): set MASTER_PORT "
                "to a free one"
            ) from None
        raise UserError(
            f"rank {membership.rank} on {socket.gethostname()} has not reached rank 0 at {address}:{port} "
            f"within {PATIENCE:.0f} seconds: did it start, and does MASTER_ADDR name its host?"
        ) from None
    return dist.PrefixStore(f"lsmoe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _compare(membership: Membership, store: dist.Store, note: dict[str, Any]) -> tuple[str, ...]:
    """Publish this rank's note and return the hosts by rank, once rank 0 has compared all notes.

    Raises SharedError if rank 0 finds a difference, and UserError if this rank exists twice, was given a
    different number of processes, or gets no answer from rank 0.
    """
    rank = membership.rank
    if store.add(f"taken/{rank}", 1) > 1:
        raise UserError(f"two processes say that they are rank {rank} of {membership.world}: start each once")
    store.set(f"note/{rank}", json.dumps(note))
    if rank == 0:
        wrong, hosts = "", []
        try:
            hosts = _read_notes(membership.world, store)
        except UserError as error:
            wrong = str(error)
        store.set("verdict", json.dumps({"wrong": wrong, "hosts": hosts}))
    deadline = time.monotonic() + 2 * PATIENCE  # rank 0 may itself wait PATIENCE seconds for the others
    while not store.check(["verdict"]):
        if time.monotonic() > deadline:
            raise UserError(f"rank 0 at {membership.address}:{membership.port} says nothing: has it died?")
        time.sleep(4 * POLL)  # a thousand ranks may be polling
    verdict = json.loads(store.get("verdict"))
    if verdict["wrong"]:
        raise SharedError(verdict["wrong"])
    if len(verdict["hosts"]) != membership.world:
        told, others = counted(membership.world, "process"), len(verdict["hosts"])
        raise UserError(
            f"rank {rank} was started as one of {told}, rank 0 as one of {others}: give all the same number"
        )
    return tuple(verdict["hosts"])


def _read_notes(world: int, store: dist.Store) -> list[str]:
    """Return the hosts of all ranks. Raises UserError if some do not join, differ, or share a GPU."""
    notes: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + PATIENCE
    while len(notes) < world:
        for rank in (rank for rank in range(world) if rank not in notes):
            if store.check([f"note/{rank}"]):
                notes[rank] = json.loads(store.get(f"note/{rank}"))
            elif time.monotonic() > deadline:
                missing = [str(rank) for rank in range(world) if rank not in notes]
                named = ", ".join(missing[:16]) + (" ..." if len(missing) > 16 else "")
                raise UserError(
                    f"{len(notes)} of {world} ranks have come within {PATIENCE:.0f} seconds: missing are "
                    f"{named}"
                )
        time.sleep(POLL)
    devices: dict[tuple[str, str], int] = {}
    for rank, note in sorted(notes.items()):
        for name, value in notes[0]["alike"].items():
            if note["alike"].get(name) != value:
                raise UserError(
                    f"{name} is {value} on rank 0 ({notes[0]['host']}) and {note['alike'].get(name)} on rank "
                    f"{rank} ({note['host']}): all ranks must have the same"
                )
        other = devices.setdefault((note["host"], note["device"]), rank)
        if other != rank:
            raise UserError(
                f"ranks {other} and {rank} on {note['host']} would share one GPU: start as many ranks on a "
                "node as it has GPUs"
            )
    return [notes[rank]["host"] for rank in range(world)]


def _meet_by_mpi(membership: Membership) -> Membership:
    """Tell all ranks through MPI where rank 0 is, since mpirun does not, and then shut MPI down."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpirun has started this process, and its MPI cannot be used ({error}): install mpi4py, or set "
            "MASTER_ADDR and MASTER_PORT"
        ) from None
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (membership.rank, membership.world):
        raise UserError(
            f"mpirun says that this is rank {membership.rank} of {membership.world}, but mpi4py is rank "
            f"{world.Get_rank()} of {world.Get_size()}: it uses another MPI than this mpirun"
        )
    here = (socket.gethostname(), free_port()) if membership.rank == 0 else None
    address, port = world.bcast(here)
    MPI.Finalize()
    return Membership(
        membership.launcher,
        membership.rank,
        membership.world,
        membership.local_rank,
        membership.local_world,
        address,
        port,
    )


def free_port() -> int:
    """Return a port on which nobody listens.

    It is none of those that the kernel gives to outgoing connections: rank 0 may need seconds until it
    listens, and by then such a port could be taken.
    """
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port

"""Being asked to stop: on SIGTERM or SIGUSR1 all ranks save after the step they are in, and leave with a status of their own.

Imports nothing heavy, so that the handlers stand before torch does: a signal in the middle of an import would kill the rank.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsmoe_ds.parallel.topology import Topology

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STATUS = 75  # EX_TEMPFAIL of sysexits.h: what was begun is saved, the same command goes on
_received: list[int] = []


def install() -> None:
    """From here on such a signal is noted and does nothing else."""
    for each in SIGNALS:
        signal.signal(each, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def agreed(topology: Topology) -> str | None:
    """Name of a signal that any rank has received since the last call, the same on all ranks. Called by every rank."""
    number = max(_received, default=0)
    _received.clear()
    if topology.world > 1:
        import torch
        import torch.distributed as dist

        found = torch.tensor(number, device=topology.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        number = int(found)
    return signal.Signals(number).name if number else None

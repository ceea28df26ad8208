"""Checkpoints: whole or absent, and exact.

``checkpoints/step-N/`` holds DeepSpeed's files (weights, experts, optimizer), the random state of every rank,
``state.json`` (step, layout, position in the data) and ``manifest.json`` (sizes and checksums of all of them). It is
written under another name, synced, and renamed when it is whole; a run killed at any instant keeps its last one.
"""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from lsmoe_ds.convert.consolidate import read_checkpoint
from lsmoe_ds.convert.optimizer import open_optimizer
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files, read_json, sync, write_json
from lsmoe_ds.model.initialization import global_names, partition_dimension
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.run_folder import list_checkpoints, to_remove
from lsmoe_ds.training.resharding import load_resharded, write_pieces

UNFINISHED = ".writing-"


class Saver:
    """Writes the checkpoints of a run and keeps the newest ``keep`` and the ``best`` by dev loss.

    Training stands still while the state is copied out of the engine; sums, syncing and renaming go on beside the next steps, in a
    thread of the main rank. Leaving the context waits for it. All methods are called by every rank.
    """

    def __init__(self, run: Path, topology: Topology, keep: int, best: int = 0) -> None:
        self.run, self.topology, self.keep, self.best = run, topology, keep, best
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._unfinished: Future[None] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After an error the ranks may be out of step: no barrier then, and the first error is the one to tell.
        with self._thread:
            if kind is None:
                self.finish()

    def save(self, engine: Any, step: int, position: dict[str, Any], dev_loss: float | None = None) -> None:
        """Begins ``checkpoints/step-N``, after finishing the one before; when it returns the weights may change.

        Raises UserError, here or in :meth:`finish`, if it cannot be written.
        """
        self.finish()
        topology, folder = self.topology, self.run / "checkpoints"
        partial, final = folder / f"{UNFINISHED}step-{step}", folder / f"step-{step}"
        if topology.is_main:
            for leftover in folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with _explained(partial, final):
            engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
            torch.save(compat.random_state(topology.tensor), partial / f"random-rank-{topology.rank:05d}.pt")
            write_pieces(engine, partial, topology)
            partition = _gather_partition(engine.module, topology)
            if topology.is_main:
                state = {"step": step, **layout(engine, topology), "dev_loss": dev_loss, "position": position, "partition": partition}
                write_json(partial / "state.json", state)
            dist.barrier()
        if topology.is_main:
            self._unfinished = self._thread.submit(self._complete, partial, final)

    def finish(self) -> None:
        """Waits until what was saved is whole, or raises what went wrong."""
        if self._unfinished is not None:
            unfinished, self._unfinished = self._unfinished, None
            unfinished.result()
        dist.barrier()

    def _complete(self, partial: Path, final: Path) -> None:
        with _explained(partial, final):
            write_json(partial / "manifest.json", {"files": describe_files(partial, (p.name for p in partial.iterdir()))})
            sync(partial)
            if final.exists():  # damaged, or training would have gone on from it
                _remove(final)
            partial.rename(final)
            sync(final.parent, contents=False)
            for old in to_remove(list_checkpoints(self.run), self.keep, self.best):
                _remove(old)


def _remove(checkpoint: Path) -> None:
    """Under another name first: a checkpoint is whole or absent while it goes, too."""
    leftover = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}-removed")
    checkpoint.rename(leftover)
    shutil.rmtree(leftover)


@contextmanager
def _explained(partial: Path, final: Path) -> Iterator[None]:
    """What keeps a checkpoint from being written, as a UserError; what there was of it is removed."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its archive writer.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or shutil.disk_usage(final.parent).free < 2**20
        if not full and isinstance(error, RuntimeError):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        reason = "the disk is full" if full else str(error)
        raise UserError(f"checkpoint {final} cannot be written: {reason}; earlier checkpoints are untouched") from error


def _gather_partition(model: torch.nn.Module, topology: Topology) -> dict[str, int]:
    """Dimension of each parameter that is spread over tensor-parallel ranks, by global name."""
    names = global_names(model, topology)
    dimensions = {names[name]: partition_dimension(parameter) for name, parameter in model.named_parameters()}
    return {name: dimension for name, dimension in dimensions.items() if dimension is not None}


def layout(engine: Any, topology: Topology) -> dict[str, int]:
    """What decides which rank holds what."""
    sizes = {"world": topology.world, "tensor": topology.tensor, "expert": topology.expert}
    return {**sizes, "stage": int(engine.zero_optimization_stage())}


def describe_change(engine: Any, checkpoint: Path, topology: Topology) -> str | None:
    """In words, if the checkpoint was written by another layout."""
    now = layout(engine, topology)
    before = {key: (read_json(checkpoint / "state.json") or {}).get(key, value) for key, value in now.items()}

    def named(sizes: dict[str, int]) -> str:
        return "{world} x (tensor {tensor}, expert {expert}, ZeRO {stage})".format(**sizes)

    return None if before == now else f"written by {named(before)}, dealt anew to {named(now)}"


def load(engine: Any, checkpoint: Path, topology: Topology) -> dict[str, Any]:
    """Restores weights and optimizer; returns ``state.json``. Called by every rank.

    In the layout that wrote the checkpoint, this rank's random state too; in another one random numbers begin anew.
    """
    state = read_json(checkpoint / "state.json")
    try:
        if describe_change(engine, checkpoint, topology) is not None:
            load_resharded(engine, read_checkpoint(checkpoint).weights, open_optimizer(checkpoint), topology)
        else:
            with compat.trusted_checkpoint_loading():
                engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
                random = torch.load(checkpoint / f"random-rank-{topology.rank:05d}.pt")
            compat.restore_random_state(random, topology.tensor)
    except pickle.UnpicklingError:
        raise UserError(f"{checkpoint} holds something other than tensors and settings, which could run code: it is not loaded") from None
    assert state is not None
    return state

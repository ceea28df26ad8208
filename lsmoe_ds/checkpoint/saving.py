"""Save and load checkpoints: complete or absent, and bit-exact.

``checkpoints/step-N/`` holds DeepSpeed's files (weights, experts, optimizer), the random state of every rank,
``state.json`` (step, layout, position in the data) and ``manifest.json`` (sizes and checksums of all of
them). It is written under another name, synced, and renamed when it is complete, so a run killed at any time
keeps its last checkpoint.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from lsmoe_ds.checkpoint.frozen import frozen_parameters, open_frozen, write_frozen
from lsmoe_ds.checkpoint.optimizer import open_optimizer
from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.checkpoint.resharding import load_frozen, load_resharded, write_pieces
from lsmoe_ds.checkpoint.run_folder import FROZEN, list_checkpoints, to_remove
from lsmoe_ds.checkpoint.sparse import pack, unpack
from lsmoe_ds.checkpoint.tensors import BUFFERS
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files, read_json, sync, write_json
from lsmoe_ds.parallel import compat, deepspeed_engine
from lsmoe_ds.parallel.parameters import global_name, global_names, named_state, partition_dimension, places
from lsmoe_ds.parallel.topology import Topology

UNFINISHED = ".writing-"
WRITTEN = "written-"  # prefix of a rank's note to the main rank: empty, or its error
POLL, PATIENCE = 0.02, 10.0  # seconds; after an error, PATIENCE limits the wait for the ranks' notes


class Saver:
    """Write the checkpoints of a run and keep the newest ``keep`` and the ``best`` by dev loss, or
    ``by_chrf``.

    ``frozen`` is the checksum of the frozen base in the checkpoint from which the run resumes. If it is None,
    the base, if there is one, is written with the first checkpoint.

    Training waits while the state is copied in memory, or, without memory for copies, while it is written. A
    thread of each rank does the rest (writing, checksums, syncing, renaming) during the next steps. Leaving
    the context waits for it. All methods are called by every rank.
    """

    def __init__(
        self,
        run: Path,
        topology: Topology,
        keep: int,
        best: int = 0,
        frozen: str | None = None,
        by_chrf: bool = False,
    ) -> None:
        self.run, self.topology, self.keep, self.best, self.frozen = run, topology, keep, best, frozen
        self.by_chrf = by_chrf
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writes: list[Future[None]] = []
        self._unfinished: Future[None] | None = None
        self._failed = Event()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error ranks may be at different points, so no barrier then; the first error is reported.
        with self._thread:
            if kind is None:
                self.finish()
            else:
                self._failed.set()

    def save(
        self, engine: Any, step: int, position: dict[str, Any], dev: Mapping[str, float] | None = None
    ) -> None:
        """Finish the previous checkpoint and begin ``checkpoints/step-N``; afterwards the weights may change.

        ``dev`` holds the results of a validation in this step. Raises UserError, here or in :meth:`finish`,
        if the checkpoint cannot be written.
        """
        self.finish()
        if self.frozen is None:
            self.frozen = write_frozen(engine, self.run, self.topology)
        topology, folder = self.topology, self.run / "checkpoints"
        partial, final = folder / f"{UNFINISHED}step-{step}", folder / f"step-{step}"
        if topology.is_main:
            for leftover in folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        frozen = frozen_parameters(engine, topology)
        with _explained(partial, final, topology.is_main, self._settle):
            # DeepSpeed has put the global number of the expert into its names.
            left_out = lambda name: global_name(name, 0, 0) in frozen  # noqa: E731
            deepspeed_engine.save_engine(engine, folder, partial.name, self._write, left_out)
            torch.save(compat.random_state(topology.tensor), partial / f"random-rank-{topology.rank:05d}.pt")
            write_pieces(engine, partial, topology)
            partition = _gather_partition(engine.module, topology)
            if topology.is_main:
                state: dict[str, Any] = {"step": step, **layout(engine, topology)}
                state |= {"dev_loss": None, **(dev or {})}
                state |= {"position": position, "partition": partition}
                state |= {} if self.frozen is None else {FROZEN: self.frozen}
                held = {name for name, _ in engine.module.named_buffers()}
                stored = places(engine.module, topology).items()
                buffers = sorted(name for name, (local, _) in stored if local in held)
                state |= {BUFFERS: buffers} if buffers else {}
                write_json(partial / "state.json", state)
            dist.barrier()
        self._unfinished = self._thread.submit(self._complete, partial, final)

    def finish(self) -> None:
        """Wait until the last checkpoint is complete, or raise its error."""
        if self._unfinished is not None:
            unfinished, self._unfinished = self._unfinished, None
            unfinished.result()
        dist.barrier()

    def _write(self, state: Any, path: str) -> None:
        """Write one of DeepSpeed's files: a copy in the background if there is memory for copies of all ranks
        of the machine, otherwise at once.
        """
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.topology.world))
        copied = 2 * ranks * _size(state) < psutil.virtual_memory().available
        alone = _alone(state, copied)
        if copied:
            self._writes.append(self._thread.submit(_save, alone, path))
        else:
            _save(alone, path)

    def _settle(self) -> None:
        """Wait for background writes, whose folder cannot be removed before they end."""
        writes, self._writes = self._writes, []
        for write in writes:
            write.cancel()
        wait(writes)

    def _complete(self, partial: Path, final: Path) -> None:
        writes, self._writes = self._writes, []
        own = partial / f"{WRITTEN}{self.topology.rank:05d}"
        with _explained(partial, final, self.topology.is_main):
            try:
                for write in writes:
                    write.result()
            except (OSError, RuntimeError) as error:
                note = own.with_name(f".{own.name}")
                note.write_text(str(error))
                note.rename(own)  # atomic, because an empty note means success
                raise
            own.touch()
            if not self.topology.is_main:
                return
            self._wait_for_all(partial)
            write_json(
                partial / "manifest.json",
                {"files": describe_files(partial, (p.name for p in partial.iterdir()))},
            )
            sync(partial)
            if final.exists():  # it is damaged, otherwise training would have resumed from it
                _remove(final)
            partial.rename(final)
            sync(final.parent, contents=False)
            for old in to_remove(list_checkpoints(self.run), self.keep, self.best, self.by_chrf):
                _remove(old)

    def _wait_for_all(self, partial: Path) -> None:
        """Wait for a note from each rank that its files are written.

        Notes are files, because only training may use collectives. Raises OSError if a rank could not write,
        or did not end after an error.
        """
        patience = PATIENCE / POLL
        for rank in range(self.topology.world):
            note = partial / f"{WRITTEN}{rank:05d}"
            while not note.exists():
                time.sleep(POLL)
                patience -= self._failed.is_set()
                if patience < 0:
                    raise OSError(f"rank {rank} did not end")
            if wrong := note.read_text():
                raise OSError(f"on rank {rank}: {wrong}")
            note.unlink()


def _save(state: Any, path: str) -> None:
    torch.save(pack(state), path)


def _size(value: Any) -> int:
    """Count the bytes of the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if type(value) in (list, tuple) else ()
    return sum(_size(part) for part in parts)


def _alone(value: Any, copied: bool) -> Any:
    """Return nested containers with their tensors on the CPU.

    No tensor is a view of a larger one, because ``torch.save`` would write that completely. With ``copied``,
    training cannot change the result.
    """
    if isinstance(value, torch.Tensor):
        whole = value.untyped_storage().nbytes() == value.nbytes
        return value.detach().to("cpu", copy=copied or not whole)
    if isinstance(value, dict):
        return type(value)((key, _alone(part, copied)) for key, part in value.items())
    if type(value) in (list, tuple):
        return type(value)(_alone(part, copied) for part in value)
    return copy(value) if copied else value


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, after renaming it, so that a kill leaves no part of it under its name."""
    leftover = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}-removed")
    checkpoint.rename(leftover)
    shutil.rmtree(leftover)


@contextmanager
def _explained(
    partial: Path, final: Path, main: bool, settle: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Turn a failed write of a checkpoint into a UserError; the main rank removes the partial one."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its archive writer.
        full = (
            getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            or shutil.disk_usage(final.parent).free < 2**20
        )
        if not full and isinstance(error, RuntimeError):
            raise
        settle()
        if main:  # only here, because other ranks may still write their notes into the folder
            shutil.rmtree(partial, ignore_errors=True)
        reason = "the disk is full" if full else str(error)
        raise UserError(
            f"checkpoint {final} cannot be written: {reason}; earlier checkpoints are untouched"
        ) from error


def _gather_partition(model: torch.nn.Module, topology: Topology) -> dict[str, int]:
    """Map the global name of each parameter and buffer that tensor-parallel ranks split to that dimension."""
    names = global_names(model, topology)
    dimensions = {names[name]: partition_dimension(value) for name, value in named_state(model)}
    return {name: dimension for name, dimension in dimensions.items() if dimension is not None}


def layout(engine: Any, topology: Topology) -> dict[str, int]:
    """Return the sizes that decide which rank holds what."""
    sizes = {"world": topology.world, "tensor": topology.tensor, "expert": topology.expert}
    return {**sizes, "stage": int(engine.zero_optimization_stage())}


def describe_change(engine: Any, checkpoint: Path, topology: Topology) -> str | None:
    """Describe the change of layout since a checkpoint was written; None if there is none."""
    now = layout(engine, topology)
    before = {key: (read_json(checkpoint / "state.json") or {}).get(key, value) for key, value in now.items()}

    def named(sizes: dict[str, int]) -> str:
        return "{world} x (tensor {tensor}, expert {expert}, ZeRO {stage})".format(**sizes)

    return None if before == now else f"written by {named(before)}, resharded to {named(now)}"


def load(engine: Any, checkpoint: Path, topology: Topology) -> dict[str, Any]:
    """Restore weights and optimizer, and return ``state.json``. Called by every rank.

    This rank's random state is restored only in the layout that wrote the checkpoint; in another one it
    starts afresh.
    """
    state = read_json(checkpoint / "state.json")
    try:
        if describe_change(engine, checkpoint, topology) is not None:
            load_resharded(engine, read_checkpoint(checkpoint).weights, open_optimizer(checkpoint), topology)
        else:
            deepspeed_engine.load_engine(engine, checkpoint, unpack)
            if frozen_parameters(engine, topology):
                load_frozen(engine, open_frozen(checkpoint.resolve().parent.parent)[0], topology)
            with compat.trusted_checkpoint_loading():
                random = torch.load(checkpoint / f"random-rank-{topology.rank:05d}.pt")
            compat.restore_random_state(random, topology.tensor)
    except pickle.UnpicklingError:
        raise UserError(
            f"{checkpoint} holds something other than tensors and settings, which could run code: it is not "
            "loaded"
        ) from None
    assert state is not None
    return state

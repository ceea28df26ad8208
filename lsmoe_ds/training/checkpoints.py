"""Checkpoints: whole or absent, and exact.

``checkpoints/step-N/`` holds DeepSpeed's files (weights, experts, optimizer), the random state of every rank,
``state.json`` (step, layout, position in the data) and ``manifest.json`` (sizes and checksums of all of them). It is
written under another name, synced, and renamed when it is whole; a run killed at any instant keeps its last one.
"""

from __future__ import annotations

import errno
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files, read_json, sync, write_json
from lsmoe_ds.model.initialization import global_names, partition_dimension
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.run_folder import list_checkpoints, to_remove
from lsmoe_ds.training.resharding import load_resharded, write_pieces

UNFINISHED = ".writing-"


def save(
    engine: Any, run: Path, step: int, position: dict[str, Any], topology: Topology, keep: int, best: int = 0, dev_loss: float | None = None
) -> Path:
    """Writes ``checkpoints/step-N`` and removes all but the newest ``keep`` and the ``best`` by ``dev_loss``. Called by every rank."""
    folder = run / "checkpoints"
    partial, final = folder / f"{UNFINISHED}step-{step}", folder / f"step-{step}"
    if topology.is_main:
        for leftover in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
        torch.save(compat.random_state(topology.tensor), partial / f"random-rank-{topology.rank:05d}.pt")
        write_pieces(engine, partial, topology)
        partition = _gather_partition(engine.module, topology)
        if topology.is_main:
            state = {"step": step, **layout(engine, topology), "dev_loss": dev_loss, "position": position, "partition": partition}
            write_json(partial / "state.json", state)
        dist.barrier()
        if topology.is_main:
            write_json(partial / "manifest.json", {"files": describe_files(partial, (p.name for p in partial.iterdir()))})
            sync(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(folder, contents=False)
            for old in to_remove(list_checkpoints(run), keep, best):
                shutil.rmtree(old)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its archive writer.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or shutil.disk_usage(folder).free < 2**20
        if not full and isinstance(error, RuntimeError):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        reason = "the disk is full" if full else str(error)
        raise UserError(f"checkpoint {final} cannot be written: {reason}; earlier checkpoints are untouched") from error
    dist.barrier()
    return final


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
            load_resharded(engine, checkpoint, topology)
        else:
            with compat.trusted_checkpoint_loading():
                engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
                random = torch.load(checkpoint / f"random-rank-{topology.rank:05d}.pt")
            compat.restore_random_state(random, topology.tensor)
    except pickle.UnpicklingError:
        raise UserError(f"{checkpoint} holds something other than tensors and settings, which could run code: it is not loaded") from None
    assert state is not None
    return state

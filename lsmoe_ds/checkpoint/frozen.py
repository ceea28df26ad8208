"""Store the frozen base of a run, the parameters that do not train, once for all of its checkpoints.

``RUN/frozen/`` holds whole parameters, by global name and in the type in which the run computes, as
:func:`lsmoe_ds.checkpoint.tensors.save_tensors` writes them, with a ``manifest.json`` of sizes and checksums.
Each checkpoint's ``state.json`` has the checksum of that manifest, so that a changed or missing base is
noticed, and a run folder can be copied elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lsmoe_ds.checkpoint.run_folder import FROZEN
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors, open_tensors, save_tensors
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import checker, describe_files, read_fields, replaced, sha256, write_json
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.collectives import on_main
from lsmoe_ds.parallel.parameters import partition_dimension, places
from lsmoe_ds.parallel.topology import Topology


def open_frozen(run: Path) -> tuple[Tensors, dict[str, str]]:
    """Open the frozen base of a run, and return it with the sha256 of its files.

    Each file's checksum is compared when its first tensor is read.
    :func:`lsmoe_ds.checkpoint.run_folder.frozen_damage` tells whether the base belongs to a checkpoint.
    """
    folder = run / FROZEN
    files = read_fields(folder / "manifest.json", files=dict)["files"]
    sums = {f"{FROZEN}/{name}": each["sha256"] for name, each in files.items()}
    return open_tensors(folder, check=checker(folder, files)), sums


def frozen_parameters(engine: Any, topology: Topology) -> dict[str, tuple[nn.Parameter, int]]:
    """Return the frozen parameters of all ranks by global name, in the same order on every rank.

    The value is this rank's parameter, or one of the same shape, and the expert-parallel rank that holds it.
    """
    mine = {name: each for name, each in engine.module.named_parameters() if not each.requires_grad}
    found = places(engine.module, topology) if mine else {}
    return {name: (mine[local], rank) for name, (local, rank) in sorted(found.items()) if local in mine}


def write_frozen(engine: Any, run: Path, topology: Topology) -> str | None:
    """Write the frozen base of a run and return the sha256 of its manifest; None where all parameters train.

    Called by every rank: the main one collects the parameters from the others, one after another. Raises
    UserError, on all of them, if it cannot be written.
    """
    parameters = frozen_parameters(engine, topology)
    if not parameters:
        return None
    folder, waiting = run / FROZEN, list(parameters)

    def collect(name: str) -> Tensor:
        assert waiting.pop(0) == name, "the ranks take the parameters in one order"
        return _whole(*parameters[name], topology)

    def entry(name: str) -> LazyTensor:
        parameter = parameters[name][0]
        dimension, shape = partition_dimension(parameter), list(parameter.shape)
        if dimension is not None:
            shape[dimension] *= topology.tensor
        return LazyTensor(tuple(shape), lambda: collect(name).cpu(), parameter.dtype)

    def write() -> str:
        with replaced(folder) as new:
            names = save_tensors(Tensors({name: entry(name) for name in parameters}), new)
            write_json(new / "manifest.json", {"files": describe_files(new, names)})
        return sha256(folder / "manifest.json")

    told: list[str | UserError] = []
    try:
        if topology.is_main:
            told.append(write())
    except UserError as error:
        told.append(error)
    for name in list(waiting):  # after an error of the main rank, the others still wait for these
        collect(name)

    def result() -> str:
        if isinstance(told[0], UserError):
            raise told[0]
        return told[0]

    return on_main(result)


@torch.no_grad()
def _whole(parameter: nn.Parameter, owner: int, topology: Topology) -> Tensor:
    """Return the whole parameter on the main rank, collected from the ranks; elsewhere maybe a part."""
    dimension = partition_dimension(parameter)
    if dimension is not None and _with_main(topology.tensor_group):
        parts = [torch.empty_like(parameter) for _ in range(topology.tensor)]
        dist.all_gather(parts, parameter.detach().contiguous(), group=topology.tensor_group)
        return torch.cat(parts, dimension)
    if topology.expert > 1 and compat.is_expert_parameter(parameter) and _with_main(topology.expert_group):
        whole = parameter.detach().clone(memory_format=torch.contiguous_format)
        assert topology.expert_group is not None
        dist.broadcast(whole, dist.get_global_rank(topology.expert_group, owner), group=topology.expert_group)
        return whole
    return parameter.detach()


def _with_main(group: dist.ProcessGroup | None) -> bool:
    return group is not None and 0 in dist.get_process_group_ranks(group)

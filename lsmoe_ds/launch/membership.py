"""Find this process's rank, the number of ranks and the launcher: a pure function of the environment.

Launchers nest: srun may start one torchrun per node, mpirun may start its daemons by srun. The innermost
launcher, which started this process, decides; the outer ones must not contradict it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lsmoe_ds.errors import UserError

ALONE = "alone"
BY_HAND = "the environment"  # RANK and WORLD_SIZE, set by no launcher that we know
PORTS = range(15000, 30000)  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True)
class Membership:
    """One of ``world`` processes.

    Rank 0 listens at ``address`` and ``port``. They are None under mpirun, which does not say.
    """

    launcher: str = ALONE
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str | None = "127.0.0.1"
    port: int | None = None

    @property
    def is_alone(self) -> bool:
        return self.launcher == ALONE

    def environment(self) -> dict[str, str]:
        """Return the environment variables that torch, DeepSpeed and Megatron read."""
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Said:
    """The ranks according to one launcher."""

    launcher: str
    rank: int
    world: int
    local_rank: int
    local_world: int


def find(environment: Mapping[str, str]) -> Membership:
    """Return the membership that the environment variables of the launchers describe.

    Raises UserError for variables that are not numbers, are incomplete, or contradict each other.
    """
    srun, mpirun, named = _srun(environment), _mpirun(environment), _named(environment)
    launchers = [said for said in (mpirun, srun) if said is not None]
    if named is not None and named.launcher == BY_HAND:  # perhaps a script repeated what its launcher says
        named = next(
            (said for said in launchers if (said.rank, said.world) == (named.rank, named.world)), named
        )
    innermost = named or mpirun or srun
    if innermost is None:
        if "RANK" in environment:
            raise UserError("RANK is set and WORLD_SIZE is not: set both, or neither to train alone")
        return Membership()
    _refuse_contradictions(environment, innermost, [said for said in launchers if said is not innermost])
    address, port = environment.get("MASTER_ADDR"), _number(environment, "MASTER_PORT")
    if innermost is srun:
        address = address or first_host(
            environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
        )
        port = port if port is not None else _port(environment)
    elif (address is None) != (port is None) or (address is None and innermost is not mpirun):
        missing = "MASTER_ADDR" if address is None else "MASTER_PORT"
        raise UserError(
            f"{innermost.launcher} says that this is rank {innermost.rank} of {innermost.world}, but "
            f"{missing} is not set: set it"
        )
    return Membership(
        innermost.launcher,
        innermost.rank,
        innermost.world,
        innermost.local_rank,
        innermost.local_world,
        address,
        port,
    )


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Tell whether a launcher has started this process; true also if :func:`find` raises."""
    try:
        return not find(environment).is_alone
    except UserError:
        return True


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's list: ``gpu[03-07,9],login`` -> ``gpu03``. UserError if empty."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(
            "srun does not say which nodes it runs on (SLURM_STEP_NODELIST): set MASTER_ADDR to the host of "
            "rank 0"
        )
    return re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", first[0])


def tasks_of(node: int, counts: str) -> int | None:
    """Return the tasks on a node by SLURM's list ``counts``, or None if the list does not say.

    ``4(x2),1`` means 4 tasks on nodes 0 and 1, and 1 task on node 2.
    """
    known: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        known += [int(count)] * int(times or 1)
    return known[node] if 0 <= node < len(known) else None


def _refuse_contradictions(environment: Mapping[str, str], inner: _Said, outer: list[_Said]) -> None:
    said = f"{inner.launcher} says that this is rank {inner.rank} of {inner.world}"
    if not 0 <= inner.rank < inner.world:
        raise UserError(f"{said}: ranks go from 0 to {inner.world - 1}")
    world = _number(environment, "WORLD_SIZE")
    if world is not None and world != inner.world:
        raise UserError(f"{said}, but WORLD_SIZE is {world}: start as many processes, or unset it")
    if inner.launcher == BY_HAND and outer:
        other = f"{outer[0].launcher} has started it as rank {outer[0].rank} of {outer[0].world}"
        raise UserError(f"{said}, but {other}: unset RANK and WORLD_SIZE")
    agents = {"torchrun": "GROUP_WORLD_SIZE", "deepspeed": "CROSS_SIZE"}.get(inner.launcher)
    around = outer[-1].world if outer else 1
    if agents is not None and around > 1 and (known := _number(environment, agents)) not in (None, around):
        raise UserError(
            f"{outer[-1].launcher} has started {inner.launcher} {around} times, but {inner.launcher} knows of"
            f" {known}: start it once on each node and tell it of all of them"
        )


def _named(environment: Mapping[str, str]) -> _Said | None:
    """Read torch's variables. Further variables tell torchrun and deepspeed from other launchers."""
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank is None or world is None:
        return None
    launcher = (
        "torchrun"
        if "TORCHELASTIC_RUN_ID" in environment
        else "deepspeed"
        if "CROSS_RANK" in environment
        else BY_HAND
    )
    local_world = next(
        (n for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if (n := _number(environment, name)) is not None),
        world,
    )
    local_rank = _number(environment, "LOCAL_RANK")
    return _Said(launcher, rank, world, rank % local_world if local_rank is None else local_rank, local_world)


def _mpirun(environment: Mapping[str, str]) -> _Said | None:
    """Read the variables of Open MPI, or of MPICH and its relatives.

    srun sets MPICH's PMI variables too, but without a local rank; those are ignored.
    """
    for rank, world, local_rank, local_world in (
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        numbers = [_number(environment, name) for name in (rank, world, local_rank, local_world)]
        if (found := [number for number in numbers if number is not None]) and len(found) == len(numbers):
            return _Said("mpirun", *found)
    return None


def _srun(environment: Mapping[str, str]) -> _Said | None:
    """Read srun's variables, in a step of several tasks.

    None in a batch script, and in a step of one task: both are places from which a training is started.
    """
    rank, world = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
    if "SLURM_STEP_ID" not in environment or rank is None or world is None or world == 1:
        return None
    local_world = tasks_of(
        _number(environment, "SLURM_NODEID") or 0, environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    )
    return _Said("srun", rank, world, _number(environment, "SLURM_LOCALID") or 0, local_world or world)


def _port(environment: Mapping[str, str]) -> int:
    """Return a port that all ranks of a step agree on; another step on the same node rarely has the same."""
    job, step = _number(environment, "SLURM_JOB_ID") or 0, _number(environment, "SLURM_STEP_ID") or 0
    return PORTS[(job * 31 + step) % len(PORTS)]


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise UserError(f"{name} is '{value}': it should be a whole number")
    return int(value)

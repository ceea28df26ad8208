"""``lsmoe doctor``: report what is installed, what this machine can run and what is missing.

Started by a launcher, it also checks whether the ranks can join.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from lsmoe_ds import __version__
from lsmoe_ds.errors import UserError
from lsmoe_ds.launch.membership import Membership, find

GIB = 2**30
NEEDED = {
    "torch": "torch",
    "deepspeed": "deepspeed",
    "megatron-core": "megatron.core",
    "sentencepiece": "sentencepiece",
    "sacrebleu": "sacrebleu",
    "safetensors": "safetensors",
}
OPTIONAL = {
    "mpi4py": "joining under mpirun (pip install mpi4py)",
    "ctranslate2": "lsmoe convert --as ctranslate2, and serving it (pip install ctranslate2)",
    "peft": "a converted adapter of Hugging Face (pip install peft)",
    "fastapi": "lsmoe serve (pip install '.[serve]')",
    "transformers": "running a converted Hugging Face folder (pip install transformers)",
}
PROGRAMS = {
    "deepspeed": ("--version", "several processes on one machine"),
    "torchrun": (None, "ranks started by torchrun"),
    "sbatch": ("--version", "slurm/submit.sh and the scripts beside it"),
    "srun": ("--version", "ranks on the nodes of a SLURM job"),
    "mpirun": ("--version", "ranks started by MPI"),
}
MESSAGE = 2**24  # bytes of the test message


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    ``verdict`` is "ok", "missing" (something optional cannot be done) or "wrong" (training cannot work).
    """

    part: str
    name: str
    found: str
    verdict: str = "ok"


@dataclass(frozen=True)
class Findings:
    """The whole report."""

    findings: list[Finding]

    @property
    def can_train(self) -> bool:
        return all(each.verdict != "wrong" for each in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"can_train": self.can_train, "findings": [asdict(each) for each in self.findings]}

    def table(self) -> Table:
        table = Table(caption="this can train" if self.can_train else "this cannot train: see what is wrong")
        for column in ("", "", "found", ""):
            table.add_column(column, overflow="fold")
        last = ""
        for each in self.findings:
            if last not in ("", each.part):
                table.add_section()
            color = {"ok": "green", "missing": "yellow", "wrong": "red"}[each.verdict]
            table.add_row(
                each.part if each.part != last else "", each.name, each.found, f"[{color}]{each.verdict}[/]"
            )
            last = each.part
        return table


def examine() -> Findings | None:
    """Examine this process and machine. Under a launcher all ranks join; all but the first return None."""
    findings = [*_software(), *_machine(), *_programs(), *_storage(Path.cwd())]
    try:
        membership = find(os.environ)
        process, together = [_process(membership)], []
        if not membership.is_alone and all(each.verdict != "wrong" for each in findings):
            together = _together(membership)
    except UserError as error:
        return (
            Findings([*findings, Finding("processes", "this one", str(error), "wrong")])
            if _is_first()
            else None
        )
    return Findings([*findings, *process, *together]) if membership.rank == 0 else None


def _is_first() -> bool:
    from lsmoe_ds.notices import guess_rank

    return guess_rank(os.environ) == 0


def _software() -> list[Finding]:
    found = [
        Finding("software", "Python", platform.python_version()),
        Finding("software", "lsmoe_ds", __version__),
    ]
    for package, module in NEEDED.items():
        version = _version(package)
        there = version is not None and importlib.util.find_spec(module.split(".")[0]) is not None
        found.append(Finding("software", package, version or "not installed", "ok" if there else "wrong"))
    if all(each.verdict == "ok" for each in found):
        from lsmoe_ds.parallel.compat import check_versions

        try:
            check_versions()
        except UserError as error:
            found.append(Finding("software", "versions", str(error), "wrong"))
    for package, purpose in OPTIONAL.items():
        version = _version(package)
        found.append(
            Finding(
                "software",
                package,
                version or f"not installed; for {purpose}",
                "ok" if version else "missing",
            )
        )
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> list[Finding]:
    memory = psutil.virtual_memory()
    found = [
        Finding("machine", "host", _host()),
        Finding("machine", "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} for this process"),
        Finding("machine", "memory", f"{memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} available"),
    ]
    if _version("torch") is not None:
        import torch

        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        named = ", ".join(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus)
        found.append(Finding("machine", "GPUs", named or "none: training on the CPU, through gloo"))
    interfaces = [
        f"{name}={os.environ[name]}"
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        if name in os.environ
    ]
    known = psutil.net_if_addrs()
    named = ", ".join(interfaces) or f"chosen by address; there are {', '.join(sorted(known))}"
    gloo = os.environ.get("GLOO_SOCKET_IFNAME")
    found.append(
        Finding("machine", "network", named, "ok" if gloo is None or gloo.split(",")[0] in known else "wrong")
    )
    return found


def _host() -> str:
    name = socket.gethostname()
    try:
        return f"{name}, {socket.gethostbyname(name)}"
    except OSError:
        return f"{name}, which has no address: ranks on other machines cannot reach it by that name"


def _programs() -> list[Finding]:
    found = []
    for program, (option, purpose) in PROGRAMS.items():
        beside = Path(sys.executable).with_name(program)
        path = str(beside) if beside.exists() else shutil.which(program)
        if path is None:
            found.append(Finding("programs", program, f"not found; for {purpose}", "missing"))
            continue
        found.append(
            Finding(
                "programs", program, _first_line([path, option]) if option and path != str(beside) else path
            )
        )
    return found


def _first_line(command: list[str]) -> str:
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return f"{command[0]}, which does not answer"
    return next((line.strip() for line in said if line.strip()), command[0])


def _storage(folder: Path) -> list[Finding]:
    """Examine the working directory, in which runs would be written."""
    mounts = [each for each in psutil.disk_partitions(all=True) if folder.is_relative_to(each.mountpoint)]
    kind = max(mounts, key=lambda each: len(each.mountpoint)).fstype if mounts else "unknown"
    free = f"{shutil.disk_usage(folder).free / GIB:.0f} GiB free"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locks = Finding("storage", "locks", "kept: two trainings cannot write one run")
    except OSError as error:
        locks = Finding(
            "storage",
            "locks",
            f"none ({error.strerror}): nothing keeps two trainings from writing one run",
            "missing",
        )
    return [Finding("storage", "this folder", f"{kind}, {free}"), locks]


def _process(membership: Membership) -> Finding:
    if membership.is_alone:
        return Finding(
            "processes", "this one", "started by no launcher: `lsmoe train --nproc N` starts N of them"
        )
    at = (
        "rank 0 tells where it is through MPI"
        if membership.address is None
        else f"rank 0 is at {membership.address}:{membership.port}"
    )
    return Finding(
        "processes",
        "this one",
        f"rank {membership.rank} of {membership.world}, started by {membership.launcher}; {at}",
    )


def _together(membership: Membership) -> list[Finding]:
    """Join the other ranks, check a sum over all ranks, and time an all-reduce. Called by every rank."""
    import torch
    import torch.distributed as dist

    from lsmoe_ds.launch import joining

    begun = time.perf_counter()
    party = joining.join(membership)
    met = time.perf_counter() - begun
    here, world = joining.device(), party.membership.world
    total = torch.tensor(party.membership.rank, device=here)
    dist.all_reduce(total)
    right = int(total) == world * (world - 1) // 2
    message = torch.ones(MESSAGE // 4, device=here)
    seconds = []
    for _ in range(4):
        begun = time.perf_counter()
        dist.all_reduce(message)
        float(message[0])  # waits until the GPU is done
        seconds.append(time.perf_counter() - begun)
    dist.barrier()
    dist.destroy_process_group()
    return [
        Finding("processes", "all", f"{party.describe()}; met in {met:.1f} s"),
        Finding("processes", "sums", "right on all ranks" if right else "wrong", "ok" if right else "wrong"),
        Finding(
            "processes",
            "speed",
            f"{MESSAGE / 2**20:.0f} MiB are summed over all ranks in {min(seconds[1:]) * 1000:.0f} ms",
        ),
    ]

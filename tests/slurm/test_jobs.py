"""Trainings on a real SLURM, 2 nodes with 2 ranks each: through every launcher the same losses as on one
machine, and the same to the bit after whatever happens to a job.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster import Cluster
from processes import wait_until
from small_training import BIN, STEPS

from lsmoe_ds.checkpoint.run_folder import list_checkpoints

OF_LOSSES = ("loss", "nll", "balance", "grad_norm", "learning_rate")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(work) -> list[tuple]:
    """Train on this machine without interruption, and return the losses of each step (:func:`curve`)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [BIN / "lsmoe", "train", "recipe.yaml", "--nproc", "4", "--out", "alone"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return curve(work / "alone")


def curve(run: Path) -> list[tuple]:
    """Return the losses, gradient norm and learning rate of each step.

    Fails if a step is missing or recorded twice.
    """
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [tuple(record[name] for name in OF_LOSSES) for record in records]


def step_of(run: Path) -> int:
    """Return the last step that a running training has recorded, or 0 if there is none."""
    try:
        *_, last = (run / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(last)["step"])
    except (OSError, ValueError):
        return 0


def wait_for_step(cluster: Cluster, job: int, run: Path, step: int) -> None:
    def there() -> bool:
        assert cluster.state(job) not in ("COMPLETED", "FAILED", "CANCELLED"), cluster.log(job)
        return step_of(run) >= step

    wait_until(there, 120, f"step {step} of {run.name}")


def assert_undisturbed(cluster: Cluster, job: int, run: Path, alone: list[tuple]) -> None:
    """Assert that the job completed with losses bit-equal to those of the uninterrupted run."""
    assert cluster.wait(job, 180) == "COMPLETED", cluster.log(job)
    assert list_checkpoints(run)[-1].name == f"step-{STEPS}"
    assert curve(run) == alone


def ranks_of(run: Path) -> dict[int, int]:
    """Process of each rank of a run, on whatever node: they are all on this machine."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = dict(
                each.split(b"=", 1) for each in (folder / "environ").read_bytes().split(b"\0") if b"=" in each
            )
        except OSError:
            continue
        if (
            b"train" in command
            and run.name.encode() in command
            and Path(os.fsdecode(command[0])).name.startswith("python")
        ):
            found[int(environment.get(b"SLURM_PROCID", b"-1"))] = int(folder.name)
    return found


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpirun", "deepspeed"], indirect=True)
def test_every_launcher_trains_the_same(cluster, launcher, work, submit, alone, monkeypatch):
    monkeypatch.setitem(cluster.environment, "LAUNCH", launcher)
    job = submit("recipe.yaml", "--set", "training.steps=12", "--out", launcher)
    assert cluster.wait(job, 120) == "COMPLETED", cluster.log(job)
    started_by = {"deepspeed": "srun"}.get(launcher, launcher)  # which it calls
    assert f"4 ranks on node1 (0-1), node2 (2-3), started by {started_by}" in cluster.log(job)
    for ours, undisturbed in zip(curve(work / launcher), alone[:12], strict=True):
        assert ours == pytest.approx(undisturbed, rel=1e-5)


def test_three_interruptions_leave_no_trace(cluster, work, submit, alone):
    run = work / "interrupted"
    job = submit("recipe.yaml", "--out", run.name)
    for first, last in ((4, 20), (34, 50), (64, 76)):
        wait_for_step(cluster, job, run, random.randint(first, last))
        before = cluster.requeues(job)
        cluster.run(
            "scancel", "--batch", "--signal=USR1", str(job)
        )  # as --signal=B:USR1@N does before the time limit
        wait_until(lambda before=before: cluster.requeues(job) == before + 1, 60, "the requeue")
    assert_undisturbed(cluster, job, run, alone)
    said = cluster.log(job)
    saved = [int(step) for step in re.findall(r"SIGUSR1: saved after step (\d+)", said)]
    resumed = [int(step) for step in re.findall(r"resuming from \S+step-(\d+)", said)]
    assert len(saved) == 3 and saved == resumed and cluster.requeues(job) == 3
    assert "Terminated" not in said


def test_it_goes_on_on_another_number_of_nodes(cluster, work, submit, alone):
    first = submit("recipe.yaml", "--set", "training.steps=10", "--out", "fewer")
    then = submit(
        "recipe.yaml", "--set", "training.steps=20", "--out", "fewer", nodes=1, dependency=f"afterok:{first}"
    )
    assert cluster.wait(then, 120) == "COMPLETED", cluster.log(then)
    assert "2 ranks on node1 (0-1), started by srun" in cluster.log(
        then
    ) and "resharded to 2 x (tensor 1" in cluster.log(then)
    for ours, undisturbed in zip(curve(work / "fewer"), alone[:20], strict=True):
        assert ours == pytest.approx(undisturbed, rel=1e-5)


def kill(cluster: Cluster, run: Path) -> None:
    os.kill(ranks_of(run)[3], signal.SIGKILL)


def stop(cluster: Cluster, run: Path) -> None:
    os.kill(ranks_of(run)[1], signal.SIGSTOP)


def set_down(cluster: Cluster, run: Path) -> None:
    cluster.node_down("node2")


def power_off(cluster: Cluster, run: Path) -> None:
    cluster.power_off("node2")


def test_whatever_happens_the_job_goes_on_from_its_last_checkpoint(cluster, work, submit, alone):
    """One job, to which everything happens."""
    run = work / "unlucky"
    job = submit("recipe.yaml", "--set", "training.hang_timeout=20", "--out", run.name)
    for number, (happens, mended) in enumerate(
        ((kill, None), (stop, None), (set_down, cluster.resume), (power_off, cluster.power_on))
    ):
        wait_for_step(cluster, job, run, 20 * number + random.randint(11, 19))
        assert cluster.requeues(job) == number, cluster.log(job)
        begun = time.monotonic()
        happens(cluster, run)
        wait_until(
            lambda number=number: cluster.requeues(job) == number + 1,
            120,
            f"the requeue after '{happens.__name__}'",
        )
        print(f"{happens.__name__}: requeued after {time.monotonic() - begun:.0f} s")
        if mended is not None:
            mended("node2")
    assert_undisturbed(cluster, job, run, alone)
    said = cluster.log(job)
    assert re.search(r"lsmoe: rank [012] on node[12] has lost another rank \(in step \d+\)", said)
    assert "[rank 0]" in said and "stopped or dead: rank 1 on node1" in said


def test_without_progress_it_gives_up(cluster, work, submit, monkeypatch):
    monkeypatch.setitem(cluster.environment, "ATTEMPTS", "2")
    (work / "break").mkdir()
    (work / "break/sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('SLURM_PROCID') == '1': os._exit(9)\n"
    )
    monkeypatch.setitem(cluster.environment, "PYTHONPATH", str(work / "break"))
    job = submit("recipe.yaml", "--out", "hopeless")
    assert cluster.wait(job, 120) == "FAILED"
    assert cluster.requeues(job) == 1
    assert "given up, as 2 attempts in a row saved nothing newer" in cluster.log(job)


def test_what_does_not_fit_is_told_once_and_all_leave(cluster, work, submit):
    job = submit("recipe.yaml", "--set", "parallel.expert=4", "--out", "unfit", nodes=1, ntasks_per_node=3)
    assert cluster.wait(job, 60) == "FAILED"
    said = cluster.log(job)
    assert (
        said.count("parallel.expert is 4, which does not divide the 3 processes: start a multiple of 4") == 1
    )
    assert "Traceback" not in said and cluster.requeues(job) == 0


def test_a_launcher_that_does_not_exist_is_tried_once(cluster, work, submit, monkeypatch):
    """Neither one that the job looks for, nor one that only the node lacks."""
    monkeypatch.setitem(cluster.environment, "LAUNCH", "mpirun")
    monkeypatch.setitem(cluster.environment, "PATH", os.pathsep.join(without("mpirun", work / "programs")))
    job = submit("recipe.yaml", "--out", "launcherless")
    assert cluster.wait(job, 60) == "FAILED" and cluster.requeues(job) == 0
    assert "LAUNCH is 'mpirun', which is not installed on node1" in cluster.log(job)
    (work / "programs/mpirun").write_text("#!/nonexistent/interpreter\n")
    (work / "programs/mpirun").chmod(0o755)
    job = submit("recipe.yaml", "--out", "launcherless")
    assert cluster.wait(job, 60) == "FAILED" and cluster.requeues(job) == 0
    assert re.search(r"given up, a command (was not found|cannot be run) \(status 12[67]\)", cluster.log(job))


def without(name: str, programs: Path) -> list[str]:
    """Return the folders of PATH with one program hidden.

    Each folder that has the program is replaced by ``programs``, which is filled with links to the programs
    whose names do not begin with ``name``.
    """
    programs.mkdir()
    folders = [BIN, programs]
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        if not (folder / name).exists():
            folders.append(folder)
            continue
        for program in folder.iterdir():
            if not program.name.startswith(name) and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)
    return list(map(str, folders))


def test_the_doctor_under_srun(cluster, work, submit):
    said = cluster.run("srun", "-N2", "--ntasks-per-node=2", BIN / "lsmoe", "doctor").stdout
    assert "4 ranks on node1 (0-1), node2 (2-3), started by srun" in said and "right on all ranks" in said

"""The private cluster that the other tests of this folder run on: its nodes are as separate as a real
cluster's, and it leaves no trace.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import cluster as module
import pytest
from cluster import TEMPORARY, Cluster
from processes import wait_until

HERE = Path(__file__).parent


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of all processes that were started for the cluster in ``folder``.

    They are found by the cluster's settings in their environment, which they inherit.
    """
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURM_CONF={folder}/slurm.conf".encode() in environment.read_bytes():
                found.append((environment.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.fixture
def folder(tmp_path):
    """Yield the path of a folder for a cluster, and remove the cluster afterwards.

    Its name is short because the path of a socket has at most 107 characters.
    """
    path = TEMPORARY / f"lsmoe-slurm-own-{os.getpid()}"
    yield path
    Cluster(path).down()


def test_two_nodes_and_their_ranks(cluster):
    said = cluster.run(
        "srun", "-N2", "--ntasks-per-node=2", "bash", "-c", "echo $SLURM_PROCID $(hostname)"
    ).stdout
    assert sorted(said.splitlines()) == ["0 node1", "1 node1", "2 node2", "3 node2"]


def test_temporary_folders_are_private_and_shared_ones_shared(cluster, tmp_path):
    name = f"local-{os.getpid()}"
    cluster.run("srun", "-w", "node1", "touch", f"/tmp/{name}", f"/dev/shm/{name}", tmp_path / "shared")
    said = cluster.run(
        "srun", "-w", "node2", "bash", "-c", f"ls /tmp /dev/shm {tmp_path}; getent hosts node1"
    ).stdout
    assert "shared" in said and name not in said and "127.0.0.11" in said
    assert (
        (tmp_path / "shared").exists()
        and not Path("/tmp", name).exists()
        and not Path("/dev/shm", name).exists()
    )


def test_a_job_that_fails_and_one_of_several_tasks(cluster, tmp_path):
    failing = cluster.submit(None, wrap="echo begun; exit 3", output=tmp_path / "failing")
    array = cluster.submit(
        None,
        wrap="echo $SLURM_ARRAY_TASK_ID; exit $((SLURM_ARRAY_TASK_ID == 2))",
        array="1-3",
        output=tmp_path / "%a",
    )
    assert (
        cluster.wait(failing) == "FAILED"
        and cluster.show(failing)[0]["ExitCode"] == "3:0"
        and cluster.log(failing) == "begun\n"
    )
    assert cluster.wait(array) == "FAILED" and sorted(cluster.log(array).split()) == ["1", "2", "3"]
    with pytest.raises(RuntimeError, match="invalid partition"):
        cluster.submit(None, wrap="true", partition="absent")


def test_a_node_that_lost_power_comes_back(cluster, tmp_path):
    script, mark = tmp_path / "job.sh", tmp_path / "node2"
    script.write_text(f"#!/bin/bash\nsrun bash -c 'while sleep 0.1; do touch {tmp_path}/$(hostname); done'\n")
    job = cluster.submit(script, nodes=2, requeue=True, output=tmp_path / "log")
    wait_until(mark.exists, 20, "the tasks' start")
    cluster.power_off("node2")
    last = mark.stat().st_mtime
    time.sleep(0.5)
    assert mark.stat().st_mtime == last, "a task outlived its node"
    assert not cluster.running("node2") and cluster.requeues(job) == 0
    cluster.power_on("node2")
    wait_until(lambda: mark.stat().st_mtime > last, 40, "the requeued job")
    assert cluster.requeues(job) == 1 and cluster.state(job) == "RUNNING"


def test_after_a_test_all_is_in_order_again(cluster, tmp_path):
    mark = tmp_path / "mark"
    orphan = f"(setsid bash -c 'while sleep 0.1; do touch {mark}; done' < /dev/null > /dev/null 2>&1 &)"
    cluster.submit(
        None, wrap=f"trap '' TERM; {orphan}; sleep 1000", output=tmp_path / "log", nodelist="node1"
    )
    wait_until(mark.exists, 20, "the job")
    cluster.node_down("node1")
    cluster.power_off("node2")
    cluster.tidy()
    last = mark.stat().st_mtime
    assert cluster.node_states() == {"node1": "idle", "node2": "idle"}
    assert not cluster.run("squeue", "--noheader").stdout
    time.sleep(0.3)
    assert mark.stat().st_mtime == last, "an orphan of the job goes on"


def test_by_hand_it_starts_and_leaves_no_trace(cluster, folder):
    """The command, beside the cluster of the tests."""
    hosts = Path("/etc/hosts").read_bytes()
    command = [sys.executable, HERE / "cluster.py"]
    said = subprocess.run(
        [*command, "up", "--nodes", "3", "--folder", folder], capture_output=True, text=True, check=True
    ).stdout
    names = subprocess.run(
        ["bash", "-c", f"{said.strip()}\nsrun -N3 hostname"], capture_output=True, text=True
    ).stdout
    assert sorted(names.split()) == ["node1", "node2", "node3"]
    again = subprocess.run([*command, "up", "--folder", folder], capture_output=True, text=True)
    assert again.returncode == 1 and "runs already" in again.stderr
    assert processes_of(folder)
    subprocess.run([*command, "down", "--folder", folder], check=True)
    assert not processes_of(folder) and not folder.exists()
    assert Path("/etc/hosts").read_bytes() == hosts
    assert cluster.run("srun", "hostname").stdout == "node1\n"


def test_it_dies_with_its_starter_and_its_folder_can_be_used_again(cluster, folder):
    lines = (
        f"from pathlib import Path\nfrom cluster import Cluster\nCluster(Path('{folder}')).up()\nprint('up', "
        "flush=True)\ninput()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", lines], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert starter.stdout.readline() == b"up\n"
    starter.kill()
    starter.wait()
    wait_until(lambda: not processes_of(folder), 10, "the end of all processes")
    again = Cluster(folder, nodes=1)
    again.up()
    assert again.node_states() == {"node1": "idle"}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "work").touch()
    with pytest.raises(FileExistsError, match="holds no cluster"):
        Cluster(tmp_path).up()
    Cluster(tmp_path).down()
    assert (tmp_path / "work").exists()


def test_without_slurm_the_tests_are_skipped_in_one_line_or_fail(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LSMOE_REQUIRE_SLURM", "0")
    assert re.fullmatch(r"slurmctld, .* not installed \(apt-get install .*munge\)", module.missing())
    command = [sys.executable, "-m", "pytest", str(HERE / "test_cluster.py"), "-k", "two_nodes or temporary"]
    skipped = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert (
        "2 skipped" in skipped.stdout
        and skipped.stdout.count("apt-get install") == 1
        and skipped.returncode == 0
    )
    monkeypatch.setenv("LSMOE_REQUIRE_SLURM", "1")
    failed = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert "2 errors" in failed.stdout and "not installed" in failed.stdout and failed.returncode == 1


def test_without_root_or_namespaces_it_says_so(cluster, monkeypatch):
    monkeypatch.setattr(module, "NAMESPACES", ("unshare", "--uts", "--absent"))
    assert module.missing().startswith("namespaces are not permitted here (")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert module.missing().startswith("it needs root")

"""The scripts in `slurm/` on a real SLURM, with a training that is played: SLURM takes what they ask for, and
they know what it does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import REPOSITORY
from processes import wait_until

SLURM = REPOSITORY / "slurm"
PLAYED = f"""#!{sys.executable}
import os, signal, socket, sys, time
if sys.argv[1] == "plan":
    os.execv(sys.executable, [sys.executable, "-m", "lsmoe_ds", *sys.argv[1:]])
if sys.argv[1:3] == ["slurm", "begin"]:
    print("run")
elif sys.argv[1:3] == ["slurm", "end"]:
    print("lsmoe: the end", file=sys.stderr)
    sys.exit({{"0": 0, "75": 75}}.get(sys.argv[-1], 2))
elif sys.argv[1] == "train":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    here = os.environ["TMPDIR"]
    with open(f"rank-{{os.environ['SLURM_PROCID']}}", "w") as note:
        note.write(f"{{socket.gethostname()}} {{here}} {{os.path.isdir(here)}}")
    time.sleep(float(os.environ.get("STAY", "0")))
    sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def work(cluster, tmp_path, monkeypatch) -> Path:
    """Return a folder that all nodes see, with a stub of `lsmoe` that their PATH finds first."""
    (tmp_path / "lsmoe").write_text(PLAYED)
    (tmp_path / "lsmoe").chmod(0o755)
    for name, value in {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LSMOE_SLURM": str(SLURM)}.items():
        monkeypatch.setitem(cluster.environment, name, value)
    return tmp_path


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_sbatch_takes_every_script(cluster, script):
    assert "to start at" in cluster.run("sbatch", "--test-only", script, "argument").stderr


def test_sbatch_takes_the_whole_chain(cluster, work):
    arguments = [
        REPOSITORY / "recipes/demo.yaml",
        "--ntasks-per-node",
        "1",
        "--convert",
        "en-de",
        "--test-only",
    ]
    done = cluster.run(SLURM / "submit.sh", *arguments, cwd=work)
    assert done.stderr.count("to start at") == 4
    with pytest.raises(RuntimeError, match="invalid partition"):
        cluster.run(SLURM / "submit.sh", *arguments, "--", "--partition=absent", cwd=work)


def test_each_node_has_a_folder_for_caches_while_the_job_runs(cluster, work):
    job = cluster.submit(SLURM / "train.sbatch", "recipe", chdir=work)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    seen = [(work / f"rank-{rank}").read_text() for rank in range(4)]
    assert seen == [f"{node} /tmp/lsmoe-{job} True" for node in ("node1", "node1", "node2", "node2")]
    assert not list(cluster.folder.glob(f"node*/tmp/lsmoe-{job}"))


def test_what_was_canceled_stays_so(cluster, work, monkeypatch):
    monkeypatch.setitem(cluster.environment, "STAY", "60")
    job = cluster.submit(SLURM / "train.sbatch", "recipe", chdir=work)
    wait_until(lambda: len(list(work.glob("rank-*"))) == 4, 30, "the ranks")
    cluster.run("scancel", str(job))
    assert cluster.wait(job) == "CANCELLED" and cluster.requeues(job) == 0
    assert f"job {job} was canceled" in cluster.log(job), cluster.log(job)


def test_when_training_fails_the_rest_is_canceled(cluster, work, monkeypatch):
    monkeypatch.setitem(cluster.environment, "STATUS", "2")
    chain = [REPOSITORY / "recipes/demo.yaml", "--ntasks-per-node", "1", "--convert", "en-de"]
    said = cluster.run(SLURM / "submit.sh", *chain, cwd=work).stdout
    jobs = dict(re.findall(r"^(\d+) +(\S+)", said, re.MULTILINE))
    assert list(jobs.values()) == ["train", "evaluate", "merge", "convert-en-de"]
    first, *others = map(int, jobs)
    assert cluster.wait(first) == "FAILED" and cluster.show(first)[0]["ExitCode"] == "2:0"
    for job in others:
        assert (
            cluster.wait(job) == "CANCELLED" and cluster.show(job)[0]["Reason"] == "DependencyNeverSatisfied"
        )
    why = re.search(r"Why it failed: +(grep .*)", said)
    assert (
        why
        and subprocess.run(why[1], shell=True, cwd=work, capture_output=True, text=True).stdout
        == "lsmoe: the end\n"
    )

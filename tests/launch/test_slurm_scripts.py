"""The scripts in `slurm/` without a cluster: what they ask SLURM for, and what they do about signals and
statuses.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.played_slurm import RANK, SLURM

SCRIPTS = sorted(path.name for path in SLURM.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_and_shellcheck_find_nothing(name):
    done = subprocess.run(["bash", "-n", name], cwd=SLURM, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    done = subprocess.run(
        ["shellcheck", "--external-sources", name], cwd=SLURM, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.endswith(".sbatch")])
def test_without_arguments_a_script_says_how_it_is_used(played, name):
    assert played.run(name) == 2
    assert f"slurm/{name} " in played.said and "#" not in played.said


def test_no_option_of_sbatch_stands_where_it_is_not_read():
    for name in SCRIPTS:
        lines = (SLURM / name).read_text().splitlines()
        options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
        assert not options or options[-1] < commands[0]


def test_training_finishes(played):
    assert played.run("train.sbatch", "r.yaml", "--set", "a.b=c d") == 0, played.said
    mkdir, ranks, remove = played.calls("srun")
    on_every_node = "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1"
    assert mkdir == f"{on_every_node} mkdir -p -m 700 {played.folder}/local/lsmoe-7"
    assert ranks.startswith("--kill-on-bad-exit=1 bash -c")
    assert ranks.endswith("shield lsmoe train r.yaml --set a.b=c d --out runs/played")
    assert remove == f"{on_every_node} rm -rf {played.folder}/local/lsmoe-7" and not list(
        (played.folder / "local").iterdir()
    )
    assert played.calls("lsmoe")[0] == "slurm begin r.yaml --set a.b=c d --attempts 4"
    assert played.calls("lsmoe")[-1] == "slurm end runs/played --status 0"
    assert played.calls("rank") == ["sees TMPDIR"] and not played.calls("scontrol")[1:]


def test_a_bad_recipe_starts_no_rank(played):
    assert played.run("train.sbatch", "r.yaml", BEGIN="2") == 2
    assert not played.calls("rank") and len(played.calls("srun")) == 2, "the folders, and nothing else"


def test_a_failure_is_requeued(played):
    assert played.run("train.sbatch", "r.yaml", WORK="70", VERDICT="75") == -signal.SIGTERM
    assert played.calls("lsmoe")[-1] == "slurm end runs/played --status 70"
    assert played.calls("scontrol")[-1] == "requeue 7" and not played.calls("scancel")


def test_what_is_given_up_is_not_requeued(played):
    assert played.run("train.sbatch", "r.yaml", WORK="2", VERDICT="2") == 2
    assert "requeue 7" not in played.calls("scontrol")


def test_a_controller_that_does_not_answer_is_asked_again(played):
    text = (played.folder / "programs/scontrol").read_text()
    silent = '(($(grep -c "^scontrol .*$1" "$CALLS") % 3 == 0)) || [[ $2 == hostnames ]] || exit 1\n'
    (played.folder / "programs/scontrol").write_text(text.replace('case "$2"', silent + 'case "$2"'))
    assert played.run("train.sbatch", "r.yaml", WORK="70", VERDICT="75") == -signal.SIGTERM, played.said
    asked = ["--oneliner show job 7"] * 3 + ["requeue 7"] * 3
    assert played.calls("scontrol")[-6:] == asked, played.calls("scontrol")


def test_a_controller_that_never_answers_is_named(played):
    (played.folder / "programs/scontrol").write_text("#!/bin/bash\n[[ $2 == hostnames ]] || exit 1\n")
    assert played.run("train.sbatch", "r.yaml", WORK="70", VERDICT="75") == 75
    assert "slurmctld does not answer: job 7 is not requeued; submit it anew" in played.said


@pytest.mark.parametrize("asked", ["show job", "requeue"])
def test_the_warning_of_the_time_limit_does_not_end_the_questions(played, asked):
    """The first call fails, and USR1 comes to the script meanwhile."""
    text = (played.folder / "programs/scontrol").read_text()
    warned = f'[[ "$*" != *"{asked}"* ]] || (($(grep -c "^scontrol .*{asked}" "$CALLS") > 1)) || '
    warned += "{ kill -USR1 $PPID; exit 1; }\n"  # the script, or its subshell
    (played.folder / "programs/scontrol").write_text(text.replace('case "$2"', warned + 'case "$2"'))
    assert played.run("train.sbatch", "r.yaml", WORK="70", VERDICT="75") == -signal.SIGTERM, played.said
    assert sum(asked in each for each in played.calls("scontrol")) == 2


def test_a_requeue_that_fails_is_a_failure(played):
    assert played.run("train.sbatch", "r.yaml", WORK="1", VERDICT="75", REQUEUE="1") == 75
    assert "job 7 could not be requeued: submit it anew" in played.said


def test_a_requeued_job_that_is_not_ended_is_a_failure(played):
    (played.folder / "programs/scontrol").write_text("#!/bin/bash\necho JobState=RUNNING\n")
    assert played.run("train.sbatch", "r.yaml", WORK="1", VERDICT="75") == 75
    assert "job 7 was requeued, but not ended" in played.said


@pytest.mark.parametrize("launch", ["srun", "mpirun", "torchrun", "deepspeed"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_asked_to_stop_the_ranks_are_told_and_the_job_is_requeued(played, launch, number):
    status = played.signaled(number, "train.sbatch", "r.yaml", VERDICT="75", LAUNCH=launch)
    assert status == -signal.SIGTERM, played.said
    assert played.calls("lsmoe")[-1] == "slurm end runs/played --status 75"
    assert played.calls("scontrol")[-2:] == ["--oneliner show job 7", "requeue 7"]
    assert (launch == "mpirun") == (played.calls("scancel") == [])


def test_ranks_that_do_not_hear_are_told_again(played):
    text = (played.folder / "programs/scancel").read_text()
    (played.folder / "programs/scancel").write_text(
        text.replace("[[ $1 !=", '(($(grep -c ^scancel "$CALLS") < 3)) || [[ $1 !=')
    )
    played.signaled(signal.SIGUSR1, "train.sbatch", "r.yaml", VERDICT="75")
    assert played.calls("scancel") == ["--signal=USR1 7"] * 3


def test_the_status_of_a_rank_that_was_ended_by_another_does_not_count(played):
    (played.folder / "rank.py").write_text(RANK.replace("sys.exit(75)", "sys.exit(143)"))
    played.signaled(signal.SIGUSR1, "train.sbatch", "r.yaml", VERDICT="75")
    assert played.calls("lsmoe")[-1] == "slurm end runs/played --status 75"


def test_a_signal_before_the_ranks_are_started_is_not_forgotten(played):
    assert (
        played.signaled(signal.SIGUSR1, "train.sbatch", "r.yaml", VERDICT="75", BEGIN="slow")
        == -signal.SIGTERM
    ), played.said
    assert not played.calls("rank") and played.calls("lsmoe")[-1] == "slurm end runs/played --status 75"


@pytest.mark.parametrize(
    ("state", "requeued"),
    [
        ("JobState=COMPLETING PreemptTime=None", False),  # canceled, or being requeued by SLURM
        ("JobState=COMPLETING PreemptTime=2026-11-22T02:16:00", True),
        ("JobState=COMPLETING Reason=TimeLimit PreemptTime=None", True),
    ],
)
def test_what_was_canceled_is_not_requeued(played, state, requeued):
    status = played.signaled(signal.SIGTERM, "train.sbatch", "r.yaml", VERDICT="75", STATE=state)
    assert (status, "requeue 7" in played.calls("scontrol")) == (
        (-signal.SIGTERM, True) if requeued else (75, False)
    ), played.said


def test_launchers(played):
    for launch in ("torchrun", "mpirun", "deepspeed"):
        assert played.run("train.sbatch", "r.yaml", LAUNCH=launch) == 0, played.said
    (torchrun,) = played.calls("torchrun")
    assert (
        torchrun
        == "--nnodes=2 --nproc-per-node=2 --master-addr=n1 --master-port=15007 -m lsmoe_ds train r.yaml --out"
        " runs/played"
    )
    assert played.calls("node") == ["rank 0"]
    (mpirun,) = played.calls("mpirun")
    assert mpirun.startswith("-n 4 bash -c") and mpirun.endswith("lsmoe train r.yaml --out runs/played")
    (deepspeed,) = played.calls("deepspeed")
    script = SLURM.parent / "lsmoe_ds/__main__.py"
    assert f" --launcher_args=--kill-on-bad-exit=1 {script} train r.yaml --out runs/played" in deepspeed
    assert played.calls("n1") == played.calls("n2") == ["slots=2"]


def test_a_launcher_that_is_not_there_is_refused_before_an_attempt_is_counted(played):
    assert played.run("train.sbatch", "r.yaml", LAUNCH="pdsh") == 2
    assert "LAUNCH is 'pdsh': srun, torchrun, mpirun and deepspeed are allowed" in played.said
    os.remove(played.folder / "programs/mpirun")
    programs = [played.folder / "programs", Path(sys.executable).parent, played.folder / "system"]
    (played.folder / "system").mkdir()
    for name in (
        "bash",
        "rm",
        "mkdir",
        "sed",
        "hostname",
        "basename",
        "timeout",
        "grep",
        "cat",
    ):  # the system's, but no mpirun
        os.symlink(shutil.which(name), played.folder / "system" / name)
    status = played.run("train.sbatch", "r.yaml", LAUNCH="mpirun", PATH=":".join(map(str, programs)))
    assert status == 2 and re.search(
        r"lsmoe: LAUNCH is 'mpirun', which is not installed on \S+: install it, or use LAUNCH=srun",
        played.said,
    )
    assert not played.calls("lsmoe") and not played.calls("rank") and not played.calls("scontrol")[1:]


@pytest.mark.parametrize("environment", [{}, {"PARTS": "8"}])
def test_evaluation_and_study_take_their_part(played, environment):
    array = {
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_NNODES": "1",
        **environment,
    }
    part = f"3/{environment.get('PARTS', 4)}"
    (played.folder / "local").mkdir()
    assert played.run("evaluate.sbatch", "runs/r", "--beam", "2", **array) == 0, played.said
    assert played.run("study.sbatch", "s.yaml", "--out", "o", **array) == 0, played.said
    assert played.calls("lsmoe") == [
        f"evaluate runs/r --beam 2 --part {part}",
        f"study s.yaml --out o --nproc 4 --part {part}",
    ]
    assert not list((played.folder / "local").iterdir())


@pytest.mark.parametrize(("ends", "calls"), [("0", 1), ("2", 1), ("1", 2)])
def test_preparing_goes_on_where_a_process_has_died(played, ends, calls):
    assert played.run("prepare.sbatch", "r.yaml", "--workers", "3", WORK=ends) == int(ends), played.said
    ours = "data prepare r.yaml --workers 3"
    assert played.calls("srun")[1] == f"--kill-on-bad-exit=0 lsmoe {ours}"
    assert played.calls("lsmoe") == [ours] * calls
    assert ("may have left" in played.said) == (calls == 2)


def test_merge_and_convert(played):
    assert played.run("merge.sbatch", "runs/r", "8", "--beam", "2") == 0
    assert played.run("convert.sbatch", "runs/r", "en", "de", "dense", "o", "--check", "5") == 0
    converted = "convert runs/r --from en --to de --as dense --out o --check 5"
    assert played.calls("lsmoe") == ["evaluate runs/r --merge 8 --beam 2", "report runs/r", converted]
    assert (
        played.run("merge.sbatch", "runs/r", "8", WORK="1") == 1
        and played.calls("lsmoe")[-1] == "evaluate runs/r --merge 8"
    )


def test_a_study_that_is_asked_to_stop_is_requeued_alone_of_its_array(played):
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert played.signaled(signal.SIGUSR1, "study.sbatch", "s.yaml", **array) == -signal.SIGTERM, played.said
    assert played.calls("scontrol")[-1] == "requeue 5_3"
    played.pid_file.unlink()
    assert played.signaled(signal.SIGUSR1, "study.sbatch", "s.yaml", SLURM_RESTART_COUNT="50", **array) == 1
    assert played.calls("scontrol").count("requeue 5_3") == 1

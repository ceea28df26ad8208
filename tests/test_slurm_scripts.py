"""The scripts in `slurm/` without a cluster: what they ask SLURM for, and what they do about signals and
statuses. SLURM's programs are played by small ones that note how they were called.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import make_recipe

from lsmoe_ds.launch.processes import KEEP_LARGE_BLOCKS

SLURM = Path(__file__).resolve().parents[1] / "slurm"
SCRIPTS = sorted(path.name for path in SLURM.iterdir())
NOTE = 'echo "$(basename "$0") $*" >> "$CALLS"\n'
PLAYED = {
    "srun": NOTE + 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "mpirun": NOTE + 'exec python "$RANK"',
    "deepspeed": NOTE + 'cat "$2" >> "$CALLS"; exec python "$RANK"',
    "torchrun": NOTE + 'echo "node rank $PET_NODE_RANK" >> "$CALLS"; python "$RANK"',
    "lsmoe": NOTE
    + """case "$1 $2" in
    "slurm begin")
        [[ $BEGIN != slow ]] || { echo begun > "$PID" && /bin/sleep 0.5; }
        echo runs/played && exit "${BEGIN/slow/0}" ;;
    "slurm end") exit "$VERDICT" ;;
    "plan "*) exec python -m lsmoe_ds "$@" ;;
    study*) [[ $WORK != stay ]] || python "$RANK"; exit ;;
    *) exec python "$RANK" ;;
    esac""",
    "scancel": NOTE + '[[ $1 != --signal=USR1 ]] || kill -USR1 "$(cat "$PID")"',
    "scontrol": NOTE
    + """case "$2" in
    hostnames) printf 'n1\\nn2\\n' ;;
    show) echo "JobId=7 $STATE" ;;
    *) [[ $REQUEUE == 0 ]] && kill -TERM $PPID; exit "$REQUEUE" ;;
    esac""",
    "sbatch": NOTE + '[[ $* != *"$REFUSED"* ]] || exit 1\necho $((100 + $(grep -c ^sbatch "$CALLS")))\\;name',
    "sleep": "exec /bin/sleep 0.1  # nobody waits that long",
}
RANK = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
with open(os.environ["PID"], "w") as file:
    file.write(str(os.getpid()))
with open(os.environ["CALLS"], "a") as calls:
    print("rank sees", "TMPDIR" if os.path.isdir(os.environ["TMPDIR"]) else "none", file=calls)
work = os.environ["WORK"]
if work == "stay":
    time.sleep(30)
sys.exit(int(work))
"""


class Played:
    """A folder with the programs, and what they were told to do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file, self.pid_file = folder, folder / "calls", folder / "pid"
        programs = folder / "programs"
        programs.mkdir()
        for name, text in PLAYED.items():
            (programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (programs / name).chmod(0o755)
        (folder / "rank.py").write_text(RANK)
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM", "SBATCH", "OMP_"))
            },
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "PID": str(self.pid_file),
            "RANK": str(folder / "rank.py"),
            "BEGIN": "0",  # status of `lsmoe slurm begin`; "slow": 0, but not at once
            "WORK": "0",  # status of the training; "stay" until it is told to stop
            "VERDICT": "0",  # of `lsmoe slurm end`
            "STATE": "JobState=RUNNING",
            "REQUEUE": "0",
            "REFUSED": "@none@",  # what sbatch refuses
            "SLURM_SUBMIT_DIR": str(SLURM.parent),
            "SLURM_TMPDIR": str(folder / "local"),
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS": "4",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        self.said = ""

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SLURM / script), *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> int:
        """The status in which the script ends."""
        return self.finish(self.start(script, *arguments, **environment))

    def finish(self, process: subprocess.Popen[str]) -> int:
        self.said, _ = process.communicate(timeout=60)
        return process.returncode

    def signaled(self, number: int, script: str, *arguments: str, **environment: str) -> int:
        """The same, with a signal once the ranks run."""
        process = self.start(script, *arguments, WORK="stay", **environment)
        deadline = time.monotonic() + 30
        while not (self.pid_file.exists() and self.pid_file.read_text()):
            assert time.monotonic() < deadline and process.poll() is None, self.finish(process) or self.said
            time.sleep(0.02)
        process.send_signal(number)
        return self.finish(process)

    def calls(self, program: str) -> list[str]:
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        return [
            line.removeprefix(f"{program} ") for line in text.splitlines() if line.startswith(f"{program} ")
        ]


@pytest.fixture
def played(tmp_path):
    return Played(tmp_path)


# --- the scripts


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


def test_the_allocator_is_set_as_on_one_machine():
    exports = dict(re.findall(r"(MALLOC_\w+)=(\S+)", (SLURM / "job.sh").read_text()))
    assert exports == KEEP_LARGE_BLOCKS


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


def test_merge_and_convert(played):
    assert played.run("merge.sbatch", "runs/r", "8", "--beam", "2") == 0
    assert played.run("convert.sbatch", "runs/r", "en", "de", "dense", "o", "--check", "5") == 0
    converted = "convert runs/r --from en --to-language de --to dense --out o --check 5"
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


# --- submit.sh


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(make_recipe(tmp_path, None, None).to_yaml())
    return file


def test_the_chain_has_its_dependencies(played, recipe):
    chosen = [
        "--nodes",
        "2",
        "--ntasks-per-node",
        "1",
        "--cpus-per-task",
        "3",
        "--array",
        "4",
        "--beam",
        "2",
        "--set",
        "training.steps=9",
    ]
    converted = ["--convert", "en-de", "--convert", "de-en:dense"]
    assert (
        played.run("submit.sh", str(recipe), *chosen, *converted, "--", "--time=9", "--gpus-per-node=8") == 0
    ), played.said
    train, evaluate, merge, first, second = played.calls("sbatch")
    assert (
        train == "--parsable --job-name=lsmoe-train --output=logs/%x-%j.out --nodes=2 --ntasks-per-node=1 "
        f"--cpus-per-task=3 --time=9 --gpus-per-node=8 {SLURM}/train.sbatch {recipe} --set "
        "training.steps=9 --out runs/small"
    )
    after, one = (
        "--dependency=afterok:{} --kill-on-invalid-dep=yes --output=logs/%x-%j.out --cpus-per-task=3",
        f"{SLURM}/",
    )
    assert (
        evaluate
        == f"--parsable --job-name=lsmoe-evaluate {after.format(101)} --output=logs/%x-%A_%a.out --array=1-4 "
        f"{one}evaluate.sbatch runs/small --beam 2"
    )
    assert (
        merge
        == f"--parsable --job-name=lsmoe-merge {after.format(102)} {one}merge.sbatch runs/small 4 --beam 2"
    )
    assert (
        first
        == f"--parsable --job-name=lsmoe-convert-en-de {after.format(101)} {one}convert.sbatch runs/small en "
        "de ctranslate2 runs/small-en-de-ctranslate2"
    )
    assert second.endswith("convert.sbatch runs/small de en dense runs/small-de-en-dense")
    rows = [line.split() for line in played.said.splitlines()[1:6]]
    assert rows == [["101", "train", "-"], ["102", "evaluate", "101"], ["103", "merge", "102"]] + [
        [str(104 + i), f"convert-{direction}", "101"] for i, direction in enumerate(("en-de", "de-en"))
    ]
    assert "scancel 101 102 103 104 105" in played.said and (played.folder / "logs").is_dir()


def test_only_asked_nothing_is_submitted(played, recipe):
    assert played.run("submit.sh", str(recipe), "--test-only", "--convert", "en-de") == 0, played.said
    assert len(played.calls("sbatch")) == 4 and all(
        call.startswith("--test-only ") for call in played.calls("sbatch")
    )
    assert not (played.folder / "logs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "0"], "--nodes is '0': it should be a whole number from 1 on"),
        (["--array"], "--array is '': it should be"),
        (["--convert", "en"], "--convert is 'en': it should be A-B or A-B:KIND"),
        (["--convert", "en-de:onnx"], "--convert is 'en-de:onnx'"),
        (["--out"], "--out lacks its value"),
        (["--node", "2"], "there is no option --node"),
        (["other.yaml"], "'other.yaml' is one recipe too many"),
        (["--set", "parallel.tensor=3"], "tensor"),
        (["--nodes", "3", "--ntasks-per-node", "1"], "multiple of 3"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_submitted(played, recipe, arguments, said):
    assert played.run("submit.sh", str(recipe), *arguments) == 2
    assert said in played.said and len(played.said.splitlines()) == 1 and not played.calls("sbatch")


def test_without_lsmoe_nothing_is_submitted_and_its_environment_is_asked_for(played, recipe):
    (played.folder / "programs" / "lsmoe").unlink()
    path = f"{played.folder / 'programs'}:/usr/bin:/bin"
    assert played.run("submit.sh", str(recipe), PATH=path) == 2
    assert played.said.startswith("lsmoe: lsmoe is not found: activate the environment that has it")
    assert len(played.said.splitlines()) == 1 and not played.calls("sbatch")


def test_half_a_chain_is_taken_back(played, recipe):
    assert (
        played.run("submit.sh", str(recipe), "--nodes", "1", "--ntasks-per-node", "1", REFUSED="merge.sbatch")
        == 2
    )
    assert played.calls("scancel") == ["101 102"] and "none is left in the queue" in played.said

"""A closed terminal sends SIGHUP: a training saves and leaves, and under nohup it goes on."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest
from support.loops import recipe_in
from support.running_commands import Command, records_in
from support.small_run import write_corpus

from lsmoe_ds.checkpoint.run_folder import list_checkpoints, step_of
from lsmoe_ds.data.prepare import prepare


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hangup")
    write_corpus(folder)
    recipe = recipe_in(folder, steps=20000, every=10000)
    prepare(recipe)
    (folder / "small.yaml").write_text(recipe.to_yaml())
    return folder / "small.yaml"


def ignore_hangups() -> None:
    """Do what nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def hear_hangups() -> None:
    """Undo what nohup did to whatever runs these tests."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_hangup_saves_and_leaves(file, tmp_path):
    run = tmp_path / "run"
    training = Command(tmp_path / "log", "train", file, "--out", run, before=hear_hangups)
    training.wait_for(lambda: records_in(run) > 1)
    status, said = training.asked(signal.SIGHUP)
    saved = re.search(r"^SIGHUP: saved after step (\d+); the same command resumes$", said, re.MULTILINE)
    assert status == 75 and saved and "Traceback" not in said, said
    assert int(saved[1]) == step_of(list_checkpoints(run)[-1])


def test_under_nohup_it_goes_on(file, tmp_path):
    run = tmp_path / "run"
    training = Command(tmp_path / "log", "train", file, "--out", run, before=ignore_hangups)
    training.wait_for(lambda: records_in(run) > 1)
    status, said = training.asked(signal.SIGHUP, signal.SIGTERM, after=0.1)
    assert status == 75 and "SIGTERM: saved after step" in said and "SIGHUP" not in said, said


@pytest.mark.parametrize("ignored", [(), ("SIGHUP",), ("SIGINT",), ("SIGINT", "SIGHUP")])
def test_ranks_ignore_what_their_launcher_was_started_with(ignored):
    """Between both all signals are ignored, so that none arrives before a rank has its handlers."""
    program = (
        "import signal, sys; from lsmoe_ds import interrupt as i\n"
        f"for name in {ignored}: signal.signal(signal.Signals[name], signal.SIG_IGN)\n"
        "i.shield()\n"
        "assert all(signal.getsignal(each) is signal.SIG_IGN for each in i.SIGNALS)\n"
        "i.save_and_leave(alone=False)\n"
        "print(*(each.name for each in i.SIGNALS if signal.getsignal(each) is signal.SIG_IGN))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=_hear_signals
    )
    assert done.stdout.split() == list(ignored), done.stderr


def _hear_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)

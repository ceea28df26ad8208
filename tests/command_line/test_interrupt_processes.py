"""Signals to commands that wait for other processes or have workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import psutil
import pytest

from lsmoe_ds import interrupt
from lsmoe_ds.data.workers import Workers
from lsmoe_ds.launch import processes as launch


def test_what_is_waited_for_is_told_and_ends_with_this_process(tmp_path):
    """`lsmoe study` waits so for its trainings. The one that is played saves for a moment, and does not care
    about Ctrl-C.
    """
    played = (
        "trap 'echo TERM; sleep 0.3; exit 75' TERM; trap 'echo INT' INT; echo ready; while :; do sleep 0.05; "
        "done"
    )
    for numbers, says in (
        ((signal.SIGTERM,), "ready\nTERM\n"),
        ((signal.SIGINT, signal.SIGINT), "ready\nINT\n"),
    ):
        with (tmp_path / "said").open("w+") as said, ThreadPoolExecutor() as other:

            def ask(numbers=numbers) -> None:
                while not (tmp_path / "said").read_text():
                    time.sleep(0.02)
                for count, number in enumerate(numbers, 1):
                    os.kill(os.getpid(), number)
                    # On a busy machine the same signal, sent twice before its handler runs, is one.
                    while len(interrupt._State.received) < count:
                        time.sleep(0.02)
                    time.sleep(interrupt.AGAIN + 0.1)

            asking = other.submit(ask)
            with pytest.raises(interrupt.Interrupted) as asked:
                launch.run(["bash", "-c", played], stdout=said)
            asking.result()
            assert asked.value.number == numbers[0] and (tmp_path / "said").read_text() == says


def signals_of(_: object) -> tuple[bool, bool]:
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return ignored, bool(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_workers_start_with_signals_blocked_and_leave_ctrl_c_to_their_parent(monkeypatch):
    blocked = []
    true_submit = ProcessPoolExecutor.submit

    def submit(*arguments):
        blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return true_submit(*arguments)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    with Workers(1) as workers:
        assert list(workers.map(signals_of, [0])) == [(True, False)]
    assert blocked == [set(interrupt.SIGNALS)] and not signal.pthread_sigmask(signal.SIG_BLOCK, ())


WORKING = """
import time

from lsmoe_ds.console import run_command
from lsmoe_ds.data.workers import Workers


def work():
    with Workers(2) as workers:
        for _ in workers.map(time.sleep, [0] * 6 + [600] * 6):
            print("working", flush=True)


run_command(work)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_workers_in_the_middle_of_a_task(number, status):
    """With one line: no semaphore of the pool is left for Python's tracker to complain about."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORKING], **pipes) as process:
        assert process.stdout.readline() == "working\n"
        began = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - began < interrupt.GRACE
    assert (process.returncode, said) == (status, f"lsmoe: stopped by {interrupt.name_of(number)}\n")


def test_a_job_in_the_background_goes_on_ignoring_ctrl_c():
    with interrupt._restored():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupt.save_and_leave(alone=True)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is interrupt._handle


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_a_benchmark_with_one_line(number, status):
    command = [sys.executable, "-m", "lsmoe_ds", "bench", "moe"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        script = None
        while script is None:  # it is started, and imports
            assert process.poll() is None
            script = next(
                (
                    child
                    for child in psutil.Process(process.pid).children()
                    if "moe.py" in " ".join(child.cmdline())
                ),
                None,
            )
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (status, f"lsmoe: stopped by {interrupt.name_of(number)}\n")
    assert not psutil.pid_exists(script.pid) or script.status() == psutil.STATUS_ZOMBIE

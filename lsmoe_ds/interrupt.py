"""Signals that ask a command to stop, and the status it leaves with.

Training saves after the current step: 130 on SIGINT (Ctrl-C), as shells expect, and 75 on SIGTERM and SIGUSR1. Before the first
step there is nothing to save, and it leaves at once. Every other command cleans up and leaves with 130 on SIGINT.

This module imports nothing heavy, so that the handlers are in place before torch is: a signal during an import would kill the
process without a word.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsmoe_ds.parallel.topology import Topology

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STATUS = 75  # EX_TEMPFAIL of sysexits.h: what was begun is saved, the same command continues it
CTRL_C = 128 + signal.SIGINT
SHIELDED = "LSMOE_SHIELDED"  # tells ranks that SIGINT is ignored only until they have a handler
AGAIN = 0.5  # seconds: a second SIGINT within this time is the first one, delivered twice
GRACE = 5.0  # seconds that a command has to clean up
GRACE_BEFORE_TRAINING = 1.0  # where nothing is to be cleaned up


class Interrupted(BaseException):
    """A signal has asked this command to stop. Raised in the main thread.

    No Exception, so that no library swallows it; no KeyboardInterrupt, to which libraries have answers of their own.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _State:
    """What this process does when a signal arrives, and all that have arrived: (signal, time)."""

    action: Callable[[int], None] | None = None
    received: list[tuple[int, float]] = []  # noqa: RUF012  there is one process
    told = 0  # how many of them :func:`agreed` has looked at
    watched = False
    waiting_for = ""


def status_of(number: int) -> int:
    """Return the exit status of a process that a signal has asked to stop."""
    return CTRL_C if number == signal.SIGINT else STATUS


def name_of(number: int) -> str:
    """Return a signal's name for messages: ``SIGTERM``, ``SIGINT (Ctrl-C)``."""
    name = signal.Signals(number).name
    return f"{name} (Ctrl-C)" if number == signal.SIGINT else name


# --- what a process does


def clean_up_and_leave() -> None:
    """From here on SIGINT raises :class:`Interrupted` in the main thread; a second one ends the process at once."""
    if SHIELDED not in os.environ:  # a rank is ended by its command
        _act(_raise, (signal.SIGINT,))


def leave_before_training() -> None:
    """From here on each of :data:`SIGNALS` ends the process at once, with one line: there is nothing to save yet.

    A rank of several does so on SIGTERM only while it is :func:`waiting` for others. Launchers send it to the rest when
    one rank has failed, and srun takes the highest status for all: a recipe that is refused with 2 must not end as 75.
    """
    _act(_leave, SIGNALS)


def save_and_leave(alone: bool) -> None:
    """From here on each of :data:`SIGNALS` is noted for :func:`agreed`. ``alone``: a second SIGINT ends the process at once."""
    _act(_note_alone if alone else _note, SIGNALS)


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """Inside, what :func:`clean_up_and_leave` says holds, unless something else was chosen before; then all is as it was."""
    if _State.action is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _restored():
        clean_up_and_leave()
        yield


@contextlib.contextmanager
def collected() -> Iterator[list[tuple[int, float]]]:
    """Inside, each of :data:`SIGNALS` is added, with its time, to the list that is yielded, and nothing else: for a command that
    waits for other processes and tells them."""
    with _restored():
        _State.received.clear()
        _act(_note, SIGNALS)
        yield _State.received


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    before, action = [(each, signal.getsignal(each)) for each in SIGNALS], _State.action
    try:
        yield
    finally:
        if action is _leave:  # training has begun meanwhile
            _State.action = _note
        else:
            _State.action = action
            for each, handler in before:
                signal.signal(each, handler)


def _act(action: Callable[[int], None], signals: tuple[signal.Signals, ...]) -> None:
    """Take ``action`` on ``signals`` from now on. Only the main thread may call it."""
    _State.action = action
    in_background = signal.getsignal(signal.SIGINT) is signal.SIG_IGN and SHIELDED not in os.environ
    for each in signals:
        if not (in_background and each == signal.SIGINT):
            signal.signal(each, _handle)
    if not _State.watched:
        _watch()


def _handle(number: int, frame: FrameType | None) -> None:
    _State.received.append((number, time.monotonic()))
    if _State.action is not None:
        _State.action(number)


def _raise(number: int) -> None:
    if insisted(_State.received):
        _stop(number)
    raise Interrupted(number)


def _note(number: int) -> None:
    """Do nothing more: it is in the list."""


def _note_alone(number: int) -> None:
    if insisted(_State.received):
        say("SIGINT (Ctrl-C) again: leaving at once; the same command continues from the last checkpoint")
        os._exit(CTRL_C)


def _leave(number: int) -> None:
    from lsmoe_ds.launch.membership import is_one_of_several
    from lsmoe_ds.notices import guess_rank

    if number == signal.SIGTERM and not _State.waiting_for and is_one_of_several(os.environ):
        return
    rank, missing = guess_rank(os.environ), f", waiting for {_State.waiting_for}" if _State.waiting_for else ""
    if rank == 0 or _State.waiting_for.startswith("rank 0"):  # which is not there to say anything
        who = f"rank {rank}: " if rank else ""
        say(f"{who}{name_of(number)} before the first step{missing}: nothing to save; the same command starts again")
    os._exit(status_of(number))


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Inside, this rank waits for ``what``. It leaves on any signal, also on one that came before."""
    _State.waiting_for = what
    try:
        if _State.action is _leave and _State.received:
            _leave(_State.received[0][0])
        yield
    finally:
        _State.waiting_for = ""


def _stop(number: int) -> None:
    say(f"stopped by {name_of(number)}")
    os._exit(status_of(number))


# --- what was received


def insisted(received: list[tuple[int, float]]) -> bool:
    """Whether SIGINT has come a second time: the person does not want to wait any longer."""
    times = [when for number, when in received if number == signal.SIGINT]
    return len(times) > 1 and times[-1] - times[0] >= AGAIN


def agreed(topology: Topology) -> int | None:
    """Return the first signal that any rank has noted since the last call, the same on all ranks. Called by every rank."""
    number = next((each for each, _ in _State.received[_State.told :]), 0)
    _State.told = len(_State.received)
    if topology.world > 1:
        import torch
        import torch.distributed as dist

        found = torch.tensor(number, device=topology.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        number = int(found)
    return number or None


def say(text: str) -> None:
    """Write a line to standard error; safe within a signal handler."""
    with contextlib.suppress(OSError):
        os.write(2, f"lsmoe: {text}\n".encode())


# --- processes that others start


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Inside, signals wait. A process that is started here begins with them blocked, until it calls :func:`shield`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield() -> None:
    """Ignore :data:`SIGNALS` in this process, and in those it starts until they have handlers of their own."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        os.environ[SHIELDED] = "1"
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


# --- where the main thread cannot


def _watch() -> None:
    """Start a thread that ends the process when the main thread does not: Python's handlers run between two of its instructions,
    and a call into C may last for minutes (a vocabulary is trained, rank 0 has not come)."""
    _State.watched = True
    ends = os.pipe()
    reader, writer = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends)
    for end in ends:  # 0 to 2 where a standard stream is closed: what is printed there would be taken for signals
        os.close(end)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # or we would hear the signals of a child
    threading.Thread(target=_look, args=(reader,), daemon=True, name="signals").start()
    hook = sys.unraisablehook

    def unraisable(told: Any) -> None:  # raised within a callback of an import's locks it is lost: the thread will see to it
        if not isinstance(told.exc_value, Interrupted):
            hook(told)

    sys.unraisablehook = unraisable


def _look(reader: int) -> None:
    while True:
        numbers = [number for number in os.read(reader, 64) if number in SIGNALS]
        if not numbers:
            continue
        if _State.action is _leave:
            time.sleep(GRACE_BEFORE_TRAINING)
        elif _State.action is _raise:
            time.sleep(GRACE)
        if _State.action is _leave:
            _leave(numbers[0])
        if _State.action is _raise:
            _stop(numbers[0])

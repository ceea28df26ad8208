"""Signals that ask a command to stop, and its exit status.

Training saves after the current step and exits with 130 on SIGINT (Ctrl-C), as shells expect, and with 75 on
SIGTERM, SIGUSR1 and SIGHUP, which a terminal or an ssh connection sends when it is closed. A process that
inherits an ignored SIGHUP (nohup) or an ignored SIGINT (a shell's background) keeps ignoring it. Before the
first step there is nothing to save, and training exits at once. Every other command cleans up and exits
with 130 on SIGINT and with 75 on SIGTERM.

This module imports nothing heavy, so that the handlers are installed before torch is imported: a signal
during an import would kill the process without a message.
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

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
IGNORABLE = (signal.SIGINT, signal.SIGHUP)  # stay ignored if the process inherits them as ignored
STATUS = 75  # EX_TEMPFAIL of sysexits.h: the work is saved, the same command resumes it
CTRL_C = 128 + signal.SIGINT
SHIELDED = "LSMOE_SHIELDED"  # lists to ranks the IGNORABLE signals ignored only until they have a handler
AGAIN = 0.5  # seconds: a second SIGINT within this time is the first one, delivered twice
GRACE = 5.0  # seconds that a command has to clean up
GRACE_BEFORE_TRAINING = 1.0  # seconds, where there is nothing to clean up


class Interrupted(BaseException):
    """Raised in the main thread when a signal asks this command to stop.

    It is not an Exception, so that no library swallows it, and not a KeyboardInterrupt, which some libraries
    handle in their own way.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _State:
    """What this process does when a signal arrives, and all signals that have arrived: (signal, time)."""

    action: Callable[[int], None] | None = None
    received: list[tuple[int, float]] = []  # noqa: RUF012  there is one process
    told = 0  # the number of received signals that :func:`agreed` has read
    watched = False
    waiting_for = ""


def status_of(number: int) -> int:
    """Return the exit status for a process that a signal asks to stop."""
    return CTRL_C if number == signal.SIGINT else STATUS


def name_of(number: int) -> str:
    """Return a signal's name for messages: ``SIGTERM``, ``SIGINT (Ctrl-C)``."""
    name = signal.Signals(number).name
    return f"{name} (Ctrl-C)" if number == signal.SIGINT else name


# --- what a process does


def clean_up_and_leave() -> None:
    """Let SIGINT and SIGTERM raise :class:`Interrupted` in the main thread; a second SIGINT ends the process
    at once.
    """
    if SHIELDED not in os.environ:  # a rank is stopped by the command that started it
        _act(_raise, (signal.SIGINT, signal.SIGTERM))


def leave_before_training() -> None:
    """Let each of :data:`SIGNALS` end the process at once, with one line: there is nothing to save yet.

    With several ranks SIGTERM does so only while the rank is :func:`waiting` for others. When one rank fails,
    launchers send SIGTERM to the rest, and srun returns the highest status of all ranks: a refused recipe,
    status 2, must not become status 75.
    """
    _act(_leave, SIGNALS)


def save_and_leave(alone: bool) -> None:
    """Let each of :data:`SIGNALS` be recorded for :func:`agreed`.

    If the process is ``alone``, a second SIGINT ends it at once.
    """
    _act(_note_alone if alone else _note, SIGNALS)


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """Handle signals inside the block as :func:`clean_up_and_leave` says, and restore the handlers after it.

    Does nothing if the process has chosen its handlers before, or outside the main thread.
    """
    if _State.action is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _restored():
        clean_up_and_leave()
        yield


@contextlib.contextmanager
def collected() -> Iterator[list[tuple[int, float]]]:
    """Only append each of :data:`SIGNALS`, with its time, to the yielded list, inside the block.

    This is for a command that waits for other processes and passes signals on to them.
    """
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
    """Take ``action`` on ``signals`` from now on, except on :data:`IGNORABLE` ones that stay ignored.

    Only the main thread may call it.
    """
    _State.action = action
    shielded = os.environ.get(SHIELDED, "").split()
    for each in signals:
        is_ignored = each in IGNORABLE and signal.getsignal(each) is signal.SIG_IGN
        if not is_ignored or each.name in shielded:
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
    """Do nothing: the signal is already recorded."""


def _note_alone(number: int) -> None:
    if insisted(_State.received):
        say("SIGINT (Ctrl-C) again: leaving at once; the same command continues from the last checkpoint")
        os._exit(CTRL_C)


def _leave(number: int) -> None:
    from lsmoe_ds.launch.membership import is_one_of_several
    from lsmoe_ds.notices import guess_rank

    if number == signal.SIGTERM and not _State.waiting_for and is_one_of_several(os.environ):
        return
    rank, missing = (
        guess_rank(os.environ),
        f", waiting for {_State.waiting_for}" if _State.waiting_for else "",
    )
    if rank == 0 or _State.waiting_for.startswith("rank 0"):  # rank 0 has not joined and cannot print it
        who = f"rank {rank}: " if rank else ""
        say(
            f"{who}{name_of(number)} before the first step{missing}: nothing to save; the same command starts"
            " again"
        )
    os._exit(status_of(number))


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Mark inside the block that this rank waits for ``what``.

    Before training it then exits on any signal, including one that came earlier.
    """
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
    """Tell whether SIGINT has come a second time: the user does not want to wait any longer."""
    times = [when for number, when in received if number == signal.SIGINT]
    return len(times) > 1 and times[-1] - times[0] >= AGAIN


def agreed(topology: Topology) -> int | None:
    """Return a signal that a rank has recorded since the last call, the same on all ranks, or None.

    Called by every rank. Each rank contributes its first signal; the highest number wins.
    """
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
    """Block signals inside the block; they are delivered after it.

    A process started here inherits the blocked signals until it calls :func:`shield`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield() -> None:
    """Ignore :data:`SIGNALS` in this process, and in the processes it starts until these install handlers."""
    heard = [each.name for each in IGNORABLE if signal.getsignal(each) is not signal.SIG_IGN]
    os.environ[SHIELDED] = " ".join(heard)
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


# --- when the main thread cannot run handlers


def _watch() -> None:
    """Start a thread that ends the process if the main thread does not.

    Python runs handlers only between two bytecode instructions, and a call into C may last for minutes, such
    as the training of a vocabulary or the wait for rank 0.
    """
    _State.watched = True
    ends = os.pipe()
    reader, writer = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends)
    # If a standard stream is closed, the pipe may have got numbers 0 to 2, and output would be read as
    # signals; the duplicates have higher numbers.
    for end in ends:
        os.close(end)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # not a child's signals
    threading.Thread(target=_look, args=(reader,), daemon=True, name="signals").start()
    hook = sys.unraisablehook

    # Interrupted is lost if it is raised within a callback of an import's locks; the thread then ends the
    # process.
    def unraisable(told: Any) -> None:
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

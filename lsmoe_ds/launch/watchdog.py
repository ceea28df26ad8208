"""The hang timeout: a rank that is stopped, dead or stuck would keep all others waiting in a collective for ever.

Every rank counts its progress; the sum over all ranks is in the store that they share. When no rank has made progress for
``hang_timeout`` seconds, each prints the stacks of its threads and leaves; rank 0 names those that did not answer any more.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

from lsmoe_ds.launch.joining import Party
from lsmoe_ds.notices import counted

STATUS = 70  # EX_SOFTWARE of sysexits.h: another rank died, or none made progress
MOST, LEAST = 10.0, 0.1  # seconds between two looks
HEARING = 3.0  # seconds for which ranks wait for one another's last words


class _Progress:
    """Progress of this process, and of all. Plain counts, so that the threads need no lock between them."""

    count = 0
    doing = "starting"
    since = time.monotonic()
    of_all = 0
    leaving = False


def beat(doing: str) -> None:
    """Note that this rank has made progress, and what it begins. Costs nothing worth counting."""
    _Progress.count += 1
    _Progress.doing, _Progress.since = doing, time.monotonic()


@contextlib.contextmanager
def watch(party: Party, hang_timeout: float) -> Iterator[None]:
    """End the process with :data:`STATUS` once no rank has called :func:`beat` for ``hang_timeout`` seconds, inside the context."""
    beat("starting")
    ended, poll = threading.Event(), min(MOST, max(LEAST, hang_timeout / 8))
    # Each with a connection of its own, made now: a main rank that is stopped holds the store and answers nobody.
    telling, leaving = (cast(Any, party.store).clone() for _ in range(2))
    for work, arguments in ((_tell, (telling,)), (_look, (party, leaving, hang_timeout))):
        threading.Thread(target=work, args=(*arguments, poll, ended), daemon=True, name=work.__name__).start()
    try:
        yield
    finally:
        ended.set()
        faulthandler.cancel_dump_traceback_later()


def _tell(store: Any, poll: float, ended: threading.Event) -> None:
    """Add this rank's progress to that of all, in a thread that may wait for ever."""
    told = 0
    with contextlib.suppress(RuntimeError):  # the main rank is gone
        while not ended.wait(poll):
            count = _Progress.count
            _Progress.of_all = store.add("beats", count - told)
            told = count


def _look(party: Party, store: Any, hang_timeout: float, poll: float, ended: threading.Event) -> None:
    known, quiet = -1, 0.0
    while not ended.wait(poll):
        # Should nothing in Python get to run any more, not even this thread: then at least it is seen where.
        faulthandler.dump_traceback_later(hang_timeout + 2 * poll)
        quiet += poll  # no clock: a job that was suspended as a whole has not stood still
        if _Progress.of_all != known:
            known, quiet = _Progress.of_all, 0.0
        if quiet >= hang_timeout:
            _leave(party, store, hang_timeout, poll)


def _leave(party: Party, store: Any, hang_timeout: float, poll: float) -> NoReturn:
    """Print the stacks of this rank, at once so that ranks do not mix their lines, and end the process. No rank ends before rank 0
    has heard from all, or its launcher would end the others."""
    _Progress.leaving = True
    rank = party.membership.rank
    waited = time.monotonic() - _Progress.since
    passed, own = (counted(round(seconds), "second") for seconds in (hang_timeout, waited))
    head = f"no rank has made progress for {passed} (training.hang_timeout); rank {rank} on {socket.gethostname()} is"
    _say(f"{head} {_Progress.doing} for {own}:\n" + "".join(f"  [rank {rank}] {line}\n" for line in _stacks()))
    _within(HEARING, lambda: store.set(f"standing/{rank}", "here"))
    hearing = poll + HEARING  # they look once in a while
    if rank == 0:
        _within(hearing + 1, lambda: _say(_silent(party, store, hearing)))
        _within(1, lambda: store.set("heard", ""))
    else:
        _within(hearing + 1, lambda: store.wait(["heard"]))
    os._exit(STATUS)


def _say(text: str) -> None:
    os.write(2, f"lsmoe: {text.rstrip()}\n".encode())


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do something that may never end, and wait no longer than that; it may also fail, where rank 0 has left already."""

    def try_it() -> None:
        with contextlib.suppress(RuntimeError):
            work()

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(seconds)


def _stacks() -> list[str]:
    """Return the stacks of the main thread and of others that are in our own code; the newest call is last."""
    frames, lines, package = sys._current_frames(), [], os.path.dirname(os.path.dirname(__file__))
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.ident not in frames or thread.name == _tell.__name__:
            continue
        stack = traceback.extract_stack(frames[thread.ident])
        if thread is threading.main_thread() or any(call.filename.startswith(package) for call in stack):
            lines += [f"{thread.name}:", *"".join(traceback.format_list(stack)).splitlines()]
    return lines


def _silent(party: Party, store: Any, hearing: float) -> str:
    """Say which ranks do not answer any more."""
    deadline, silent = time.monotonic() + hearing, list(range(party.membership.world))
    while silent and time.monotonic() < deadline:
        silent = [rank for rank in silent if not store.check([f"standing/{rank}"])]
        time.sleep(LEAST)
    if not silent:
        return "all ranks still answer"
    return "stopped or dead: " + ", ".join(f"rank {rank} on {party.hosts[rank]}" for rank in silent)


def leave_behind(party: Party) -> NoReturn:
    """End the process after a collective that broke: another rank has died, and its own output says why. The usual handshakes at
    the end of a process would wait for it."""
    while _Progress.leaving:  # the other thread says more
        time.sleep(1)
    _say(f"rank {party.membership.rank} on {socket.gethostname()} has lost another rank ({_Progress.doing})")
    os._exit(STATUS)

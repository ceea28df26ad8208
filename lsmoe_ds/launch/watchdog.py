"""The hang timeout: end a run in which no rank makes progress.

Without it a stopped, dead or stuck rank would keep all others waiting in a collective for ever. Every rank
counts its progress and adds it to a total in the shared store. When no rank has made progress for
``hang_timeout`` seconds, each rank prints the stacks of its threads and exits; rank 0 names the ranks that no
longer answer.
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
MOST, LEAST = 10.0, 0.1  # limits of the polling interval, in seconds
HEARING = 3.0  # seconds for which ranks wait for each other's last message


class _Progress:
    """Progress of this process and of all ranks, in plain counts, so that threads need no lock."""

    count = 0
    doing = "starting"
    since = time.monotonic()
    of_all = 0
    leaving = False


def beat(doing: str) -> None:
    """Record that this rank has made progress, and what it does next. The cost is negligible."""
    _Progress.count += 1
    _Progress.doing, _Progress.since = doing, time.monotonic()


@contextlib.contextmanager
def watch(party: Party, hang_timeout: float) -> Iterator[None]:
    """Watch for hangs inside the block.

    Once no rank has called :func:`beat` for ``hang_timeout`` seconds, the process exits with :data:`STATUS`.
    """
    beat("starting")
    ended, poll = threading.Event(), min(MOST, max(LEAST, hang_timeout / 8))
    # Each thread opens its own connection now: a stopped rank 0, which holds the store, would not accept one
    # later.
    telling, leaving = (cast(Any, party.store).clone() for _ in range(2))
    for work, arguments in ((_tell, (telling,)), (_look, (party, leaving, hang_timeout))):
        threading.Thread(target=work, args=(*arguments, poll, ended), daemon=True, name=work.__name__).start()
    try:
        yield
    finally:
        ended.set()
        faulthandler.cancel_dump_traceback_later()


def _tell(store: Any, poll: float, ended: threading.Event) -> None:
    """Add this rank's progress to the total of all ranks, in a thread that may block for ever."""
    told = 0
    with contextlib.suppress(RuntimeError):  # rank 0 is gone
        while not ended.wait(poll):
            count = _Progress.count
            _Progress.of_all = store.add("beats", count - told)
            told = count


def _look(party: Party, store: Any, hang_timeout: float, poll: float, ended: threading.Event) -> None:
    known, quiet = -1, 0.0
    while not ended.wait(poll):
        # If no Python code can run any more, not even this thread, at least the stacks are printed.
        faulthandler.dump_traceback_later(hang_timeout + 2 * poll)
        quiet += poll  # instead of a clock, so that the suspension of a whole job is no hang
        if _Progress.of_all != known:
            known, quiet = _Progress.of_all, 0.0
        if quiet >= hang_timeout:
            _leave(party, store, hang_timeout, poll)


def _leave(party: Party, store: Any, hang_timeout: float, poll: float) -> NoReturn:
    """Print the stacks of this rank and end the process.

    The stacks are one write, so that the lines of different ranks do not mix. No rank exits before rank 0 has
    heard from all, because the launcher would then kill the others.
    """
    _Progress.leaving = True
    rank = party.membership.rank
    waited = time.monotonic() - _Progress.since
    passed, own = (counted(round(seconds), "second") for seconds in (hang_timeout, waited))
    head = (
        f"no rank has made progress for {passed} (training.hang_timeout); rank {rank} on "
        f"{socket.gethostname()} is"
    )
    _say(
        f"{head} {_Progress.doing} for {own}:\n" + "".join(f"  [rank {rank}] {line}\n" for line in _stacks())
    )
    _within(HEARING, lambda: store.set(f"standing/{rank}", "here"))
    hearing = poll + HEARING  # the other ranks notice the hang up to ``poll`` seconds later
    if rank == 0:
        _within(hearing + 1, lambda: _say(_silent(party, store, hearing)))
        _within(1, lambda: store.set("heard", ""))
    else:
        _within(hearing + 1, lambda: store.wait(["heard"]))
    os._exit(STATUS)


def _say(text: str) -> None:
    os.write(2, f"lsmoe: {text.rstrip()}\n".encode())


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Run ``work``, which may never return, and wait at most ``seconds``. RuntimeErrors in it are ignored."""

    def try_it() -> None:
        with contextlib.suppress(RuntimeError):
            work()

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(seconds)


def _stacks() -> list[str]:
    """Return the stacks of the main thread and of threads in this package's code; the newest call is last."""
    frames, lines, package = sys._current_frames(), [], os.path.dirname(os.path.dirname(__file__))
    for thread in threading.enumerate():
        if (
            thread is threading.current_thread()
            or thread.ident not in frames
            or thread.name == _tell.__name__
        ):
            continue
        stack = traceback.extract_stack(frames[thread.ident])
        if thread is threading.main_thread() or any(call.filename.startswith(package) for call in stack):
            lines += [f"{thread.name}:", *"".join(traceback.format_list(stack)).splitlines()]
    return lines


def _silent(party: Party, store: Any, hearing: float) -> str:
    """Describe the ranks that no longer answer."""
    deadline, silent = time.monotonic() + hearing, list(range(party.membership.world))
    while silent and time.monotonic() < deadline:
        silent = [rank for rank in silent if not store.check([f"standing/{rank}"])]
        time.sleep(LEAST)
    if not silent:
        return "all ranks still answer"
    return "stopped or dead: " + ", ".join(f"rank {rank} on {party.hosts[rank]}" for rank in silent)


def leave_behind(party: Party) -> NoReturn:
    """End the process after a broken collective: another rank has died, and its own output has the reason.

    A normal exit would wait for the dead rank in the usual handshakes.
    """
    while _Progress.leaving:  # the watching thread is about to print more and exit
        time.sleep(1)
    _say(f"rank {party.membership.rank} on {socket.gethostname()} has lost another rank ({_Progress.doing})")
    os._exit(STATUS)

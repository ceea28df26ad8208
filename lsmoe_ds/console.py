"""How the command meets the person: streams in UTF-8 whatever the locale, one sentence for what is wrong, and
an exit status.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from lsmoe_ds import interrupt
from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.notices import LINE_EVERY, guess_rank

CLOSED = "standard output is closed, so there is nowhere to print to: leave out '>&-', or redirect it"
BROKEN_PIPE = 141  # as a shell says of a process that SIGPIPE ended


def run_command(command: Callable[[], None]) -> None:
    """Run a command; an error meant for the person is one sentence on standard error and status 2."""
    open_streams()
    try:
        with interrupt.cleaning_up():
            try:
                try:
                    command()
                finally:
                    sys.stdout.flush()  # what is still buffered may fail, too
            except UserError as error:
                _leave(error)
    except interrupt.Interrupted as asked:
        interrupt.say(f"stopped by {interrupt.name_of(asked.number)}")
        sys.exit(interrupt.status_of(asked.number))
    except Exception:
        if "RANK" not in os.environ:
            raise
        traceback.print_exc()
        end_at_once(1)


def _leave(error: UserError) -> None:
    """Print the error once: rank 0 prints it, other ranks wait for that and print only what may be their
    own.
    """
    rank = guess_rank(os.environ)
    if rank:  # its launcher may end it meanwhile, which is not to change its status
        interrupt.save_and_leave(alone=False)
        time.sleep(1 if isinstance(error, SharedError) else 3)
    if not (rank and isinstance(error, SharedError)):
        print(f"lsmoe: {error}", file=sys.stderr, flush=True)
    end_at_once(2) if "RANK" in os.environ else sys.exit(2)


def end_at_once(status: int) -> None:
    """Exit at once: other ranks may wait in a collective for this one, and the usual end of a process for
    their handshakes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Output(io.FileIO):
    """Standard output, whose errors are the person's: a full disk is a UserError, a reader that has left ends
    the command.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _discard(self.fileno())
            raise SystemExit(BROKEN_PIPE) from None
        except OSError as error:
            _discard(self.fileno())
            raise UserError(f"standard output cannot be written: {error.strerror}") from None


class _Errors(io.FileIO):
    """Standard error, whose own errors end nothing: a full disk, a reader that has left, a lost terminal."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


class _Closed(io.RawIOBase):
    """Standard output that was closed before the command began."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise UserError(CLOSED)


def open_streams() -> None:
    """Make standard output UTF-8 with the errors of :class:`_Output`, and standard error an :class:`_Errors`;
    do nothing where something else has replaced them, as tests do.
    """
    closed = [number for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)) if stream is None]
    for (
        _
    ) in closed:  # the next files to be opened would get these numbers, and C libraries would print into them
        os.open(os.devnull, os.O_RDWR)
    old = sys.stderr
    if old is None or (old is sys.__stderr__ and isinstance(old, io.TextIOWrapper)):
        told = io.BufferedWriter(_Errors(2, "w", closefd=False))
        encoding, errors = ("utf-8", None) if old is None else (old.encoding, old.errors)
        # where it is None, as it is where it is closed, print() would print to standard output
        sys.stderr = io.TextIOWrapper(told, encoding, errors, line_buffering=True)
    old = sys.stdout
    if old is None:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Closed(), 1), "utf-8", write_through=True)
    elif old is sys.__stdout__ and isinstance(old, io.TextIOWrapper):
        old.flush()
        raw = io.BufferedWriter(_Output(old.fileno(), "w", closefd=False))
        line_buffering, write_through = old.line_buffering, old.write_through
        sys.stdout = io.TextIOWrapper(raw, "utf-8", "replace", None, line_buffering, write_through)


def check_output() -> None:
    """Raise UserError if standard output is closed: before the work whose result is printed, not after it."""
    if isinstance(getattr(getattr(sys.stdout, "buffer", None), "raw", None), _Closed):
        raise UserError(CLOSED)


def standard_input(how: str) -> BinaryIO:
    """Return standard input, in bytes. Raises UserError, which says ``how`` to give the text, if it is
    closed.
    """
    if sys.stdin is None:
        raise UserError(f"standard input is closed: give the text there, {how}")
    return sys.stdin.buffer


def _discard(descriptor: int) -> None:
    """Send what is still buffered nowhere, so that the end of the process does not complain a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal what takes long."""
    from rich.console import Console

    with Console(stderr=True, soft_wrap=True, highlight=False).status(what):
        yield


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of ``total`` sentences are done; the function that is given is told how many more are.

    That is a bar on a terminal, and otherwise a line every half minute.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done, said = 0, time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            bar.update(task, advance=count)
            if not console.is_terminal and (now := time.monotonic()) - said >= LINE_EVERY:
                said = now
                print(f"lsmoe: {what}: {done:,} of {total:,} sentences", file=sys.stderr, flush=True)

        yield advance


def print_json(value: Any) -> None:
    """Print a value for programs."""
    print(json.dumps(value, ensure_ascii=False, indent=1))


def show_table(table: Any) -> None:
    """Print a rich table; into a file or pipe as wide as it wants to be."""
    from rich.console import Console

    (Console() if sys.stdout.isatty() else Console(width=200)).print(table)

"""Handle the command's streams (UTF-8 whatever the locale), its error messages of one sentence, and its exit
status.
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
BROKEN_PIPE = 141  # 128 + SIGPIPE, a shell's status of a process ended by it


def run_command(command: Callable[[], None]) -> None:
    """Run a command; a UserError becomes one sentence on standard error and status 2."""
    open_streams()
    try:
        with interrupt.cleaning_up():
            try:
                try:
                    command()
                finally:
                    sys.stdout.flush()  # writing what is still buffered may fail, too
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
    """Print the error once and exit: rank 0 prints it first; other ranks wait, and print it unless it is
    shared.
    """
    rank = guess_rank(os.environ)
    if rank:  # a signal from its launcher must not change its status meanwhile
        interrupt.save_and_leave(alone=False)
        time.sleep(1 if isinstance(error, SharedError) else 3)
    if not (rank and isinstance(error, SharedError)):
        print(f"lsmoe: {error}", file=sys.stderr, flush=True)
    end_at_once(2) if "RANK" in os.environ else sys.exit(2)


def end_at_once(status: int) -> None:
    """Exit at once. A normal exit could hang in handshakes with other ranks, which may wait for this one in a
    collective.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Output(io.FileIO):
    """Standard output. A full disk raises UserError; if the reader is gone, the command ends."""

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
    """Standard error. Its own errors are ignored: a full disk, a missing reader, a lost terminal."""

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
    """Make standard output a UTF-8 :class:`_Output`, and standard error an :class:`_Errors`.

    Streams that something else has replaced, such as a test, stay unchanged.
    """
    closed = [number for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)) if stream is None]
    for _ in closed:  # otherwise new files would get these numbers, and C libraries would print into them
        os.open(os.devnull, os.O_RDWR)
    old = sys.stderr
    if old is None or (old is sys.__stderr__ and isinstance(old, io.TextIOWrapper)):
        told = io.BufferedWriter(_Errors(2, "w", closefd=False))
        encoding, errors = ("utf-8", None) if old is None else (old.encoding, old.errors)
        # if standard error is closed, it is None, and print() would print to standard output
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
    """Raise UserError if standard output is closed. Call it before the work whose result is printed."""
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
    """Discard buffered output, so that the end of the process does not report the error again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show ``what`` on a terminal while the block runs."""
    from rich.console import Console

    with Console(stderr=True, soft_wrap=True, highlight=False).status(what):
        yield


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of ``total`` sentences are done; call the yielded function with the number of further
    ones.

    Shows a bar on a terminal, otherwise prints a line every half minute.
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
    """Print a value as JSON."""
    print(json.dumps(value, ensure_ascii=False, indent=1))


def show_table(table: Any) -> None:
    """Print a rich table; into a file or pipe at its full width."""
    from rich.console import Console

    (Console() if sys.stdout.isatty() else Console(width=200)).print(table)

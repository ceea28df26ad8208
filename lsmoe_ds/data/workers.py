"""Process text in chunks on all cores, in order, with few chunks in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from lsmoe_ds import interrupt
from lsmoe_ds.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _start_worker() -> None:
    """Ignore Ctrl-C, which the parent handles, and exit when the parent ends.

    Otherwise a worker whose parent was killed would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupt.SIGNALS)

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Workers:
    """A pool of ``count`` processes; with 0 the work is done in this process.

    The processes start at first use; they are spawned, so that they inherit no state.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._pool is None:
            return
        if kind is not None and issubclass(kind, interrupt.Interrupted):
            # A task may outlast the time that a command has to clean up; a command that then ends without
            # shutting down the pool makes Python's resource tracker complain about semaphores.
            for worker in list(self._pool._processes.values()):
                worker.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results in the order of the items; about two items per worker are in progress."""
        if not self.count:
            yield from map(function, items)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.count, multiprocessing.get_context("spawn"), initializer=_start_worker
            )
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                with interrupt.blocked():  # a worker that starts here has no handler yet
                    waiting.append(self._pool.submit(function, item))
                if len(waiting) > 2 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory: the same command "
                "resumes; give it fewer workers by '--workers N'"
            ) from None

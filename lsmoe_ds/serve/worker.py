"""The thread of one engine, which translates lines that arrive within a short time as one batch.

The event loop submits a :class:`Job` and awaits its lines. Nothing is translated, loaded or converted in the
event loop's own thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from lsmoe_ds.directions import Direction
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.engine import Engine
from lsmoe_ds.inference.translate import translate_lines
from lsmoe_ds.serve.settings import Settings

Found = list[str] | Exception  # the translations of a line, best first, or why there are none


class Job:
    """Lines of one request in one direction, and how many translations of each are wanted at most.

    Create it in the event loop, which then awaits each line.
    """

    def __init__(self, direction: Direction, lines: Sequence[str], n_best: int = 1) -> None:
        self.direction, self.lines, self.n_best = direction, lines, n_best
        self.taken = 0  # lines that the worker has begun; only the worker changes it
        self.cancelled = False
        self._found: list[Found | None] = [None] * len(lines)
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()

    def deliver(self, found: Sequence[tuple[int, Found]]) -> None:
        """Deliver translations or errors by line number; may be called from any thread."""
        with suppress(RuntimeError):  # the loop has ended, so nobody waits
            self._loop.call_soon_threadsafe(self._keep, found)

    def fail(self, error: Exception) -> None:
        """Fail the lines that are not translated yet; may be called from any thread."""
        self.deliver([(number, error) for number in range(len(self.lines))])

    def _keep(self, found: Sequence[tuple[int, Found]]) -> None:
        for number, each in found:
            if self._found[number] is None:
                self._found[number] = each
        self._changed.set()

    async def line(self, number: int) -> list[str]:
        """Wait for the translations of a line and return them, best first, or raise its error."""
        while (found := self._found[number]) is None:
            self._changed.clear()
            await self._changed.wait()
        if isinstance(found, Exception):
            raise found
        return found


class Worker:
    """A thread that opens an engine, translates the jobs in its queue, and closes the engine on request.

    The thread calls ``open_engine``; ``failed`` if that raises an error, before the jobs fail with this
    error; and ``batched`` with the number of lines of each batch.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        open_engine: Callable[[], Engine],
        failed: Callable[[], None] = lambda: None,
        batched: Callable[[int], None] = lambda lines: None,
    ) -> None:
        self._settings, self._open, self._failed, self._batched = settings, open_engine, failed, batched
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"serve {name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, job: Job) -> bool:
        """Queue a job; return False if the worker is closing."""
        with self._changed:
            if self._closing:
                return False
            self._jobs.append(job)
            self._changed.notify()
            return True

    def close(self) -> None:
        """Accept no more jobs, finish those in the queue, then close the engine. Does not wait."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, seconds: float | None = None) -> bool:
        """Wait until the thread ends, at most ``seconds``; return whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            engine = self._open()
        except Exception as error:
            self._failed()
            with self._changed:
                self._closing = True
                jobs, self._jobs = self._jobs, deque()
            for job in jobs:
                job.fail(error)
            return
        try:
            while batch := self._take():
                self._translate(engine, batch)
        finally:
            close_engine(engine)

    def _take(self) -> list[tuple[Job, int]]:
        """Wait for lines, then a short time for more; return some of one search, by job and number.

        Returns an empty list if the worker is closing.
        """
        with self._changed:
            while True:
                while not self._waiting():
                    if self._closing:
                        return []
                    self._changed.wait()
                until = time.monotonic() + self._settings.batch_wait
                while 0 < self._waiting() < self._settings.batch_size and not self._closing:
                    if (left := until - time.monotonic()) <= 0:
                        break
                    self._changed.wait(left)
                if self._waiting():  # not all were cancelled meanwhile
                    return self._choose()

    def _choose(self) -> list[tuple[Job, int]]:
        """Choose lines of the first job's direction and number of translations, in turn from all such jobs.

        So a long text does not delay short ones.
        """
        first = self._jobs[0]
        wanted = first.direction, first.n_best
        turn = deque(job for job in self._jobs if (job.direction, job.n_best) == wanted)
        batch: list[tuple[Job, int]] = []
        while turn and len(batch) < self._settings.batch_size:
            job = turn.popleft()
            batch.append((job, job.taken))
            job.taken += 1
            if job.taken < len(job.lines):
                turn.append(job)
        served = {id(job) for job, _ in batch}
        rest = [job for job in self._jobs if job.taken < len(job.lines)]
        self._jobs = deque(
            sorted(rest, key=lambda job: id(job) in served)
        )  # the next batch begins with the other jobs
        return batch

    def _waiting(self) -> int:
        """Drop cancelled jobs, and count the lines that are not begun."""
        if any(job.cancelled for job in self._jobs):
            self._jobs = deque(job for job in self._jobs if not job.cancelled)
        return sum(len(job.lines) - job.taken for job in self._jobs)

    def _translate(self, engine: Engine, batch: list[tuple[Job, int]]) -> None:
        """Translate a batch. If it fails, translate each line alone, so that only bad lines fail."""
        self._batched(len(batch))
        found: list[Found]
        try:
            found = list(self._search(engine, batch))
        except Exception as error:
            found = [error] if len(batch) == 1 else [self._alone(engine, each) for each in batch]
        by_job: dict[int, list[tuple[int, Found]]] = {}
        for (job, number), each in zip(batch, found, strict=True):
            by_job.setdefault(id(job), []).append((number, each))
        for job in {id(job): job for job, _ in batch}.values():
            job.deliver(by_job[id(job)])

    def _alone(self, engine: Engine, line: tuple[Job, int]) -> Found:
        try:
            return self._search(engine, [line])[0]
        except Exception as error:
            return error

    def _search(self, engine: Engine, batch: Sequence[tuple[Job, int]]) -> list[list[str]]:
        """Return the translations of each line of a batch, best first."""
        first, _ = batch[0]
        search = Search(self._settings.beam, self._settings.length_penalty, n_best=first.n_best)
        lines = [job.lines[number] for job, number in batch]
        found = translate_lines(engine, first.direction, lines, search, advance=lambda count: None)
        return [[each.text for each in several] for several in found]


def close_engine(engine: Engine) -> None:
    """Free an engine's memory now, not only when its last reference disappears."""
    from lsmoe_ds.inference.ctranslate2 import CTranslate2

    if isinstance(engine, CTranslate2):
        engine.translator.unload_model()

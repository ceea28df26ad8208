"""The loaded engines. Each has a worker, and together they stay within a memory limit.

An engine is opened when the first line for it arrives. To make room, the least recently used engine is closed
first, after its worker has finished its jobs. One engine is always loaded, however large it is.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import check_can_write
from lsmoe_ds.inference.engine import Engine
from lsmoe_ds.pages import size
from lsmoe_ds.serve.cuts import Ready, prepare
from lsmoe_ds.serve.metrics import Metrics
from lsmoe_ds.serve.models import Served
from lsmoe_ds.serve.settings import Settings
from lsmoe_ds.serve.worker import Job, Worker

Key = tuple[str, Direction | None]  # the name of a model, and the direction of a sub-network


class Closed(Exception):
    """The server is stopping."""


class Unavailable(Exception):
    """An engine could not be loaded; the log says why."""


@dataclass
class Slot:
    """A worker, and the model from which its engine was loaded; None until then."""

    worker: Worker
    ready: Ready | None = None


class Pool:
    """Give lines to the worker of their direction.

    All methods may be called from any thread, except :meth:`submit`, which needs the event loop's.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._slots: OrderedDict[Key, Slot] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()
        self._loading = (
            threading.Lock()
        )  # one engine is loaded at a time: two would not see the memory that the other is about to use
        self._is_closed = False
        self._leaving: list[Worker] = []  # those that had not ended when the pool was closed
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if settings.cache is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="lsmoe-serve-")
            self._cache = Path(self._temporary.name)
        else:
            check_can_write(settings.cache, "choose another folder with --cache")
            self._cache = settings.cache

    def submit(self, served: Served, direction: Direction, lines: Sequence[str], n_best: int) -> Job:
        """Queue lines, for at most ``n_best`` translations each. Raises Closed if the server is stopping."""
        job, key = Job(direction, lines, n_best), (served.name, served.unit(direction))
        with self._lock:
            if self._is_closed:
                raise Closed
            slot = self._slots.get(key)
            if slot is None or not slot.worker.put(job):
                slot = self._start(served, key)
                slot.worker.put(job)
            self._slots.move_to_end(key)
        return job

    def ready(self, served: Served, direction: Direction) -> Ready | None:
        """Return the model from which a direction's engine was loaded; None if it is not loaded."""
        with self._lock:
            slot = self._slots.get((served.name, served.unit(direction)))
            return None if slot is None else slot.ready

    def loaded(self) -> dict[Key, int]:
        """Return the bytes of each loaded engine, the least recently used first."""
        with self._lock:
            return {key: slot.ready.bytes for key, slot in self._slots.items() if slot.ready is not None}

    def close(self, seconds: float = 2.0) -> bool:
        """Let all workers finish and close; return whether all did within ``seconds``."""
        with self._lock:
            self._is_closed = True
            self._leaving += [slot.worker for slot in self._slots.values()]
            self._slots.clear()
        for worker in self._leaving:
            worker.close()
        until = time.monotonic() + seconds
        self._leaving = [each for each in self._leaving if not each.join(max(0.0, until - time.monotonic()))]
        self._count()
        if self._temporary is not None:
            self._temporary.cleanup()
        return not self._leaving

    def _start(self, served: Served, key: Key) -> Slot:
        """Start the worker of an engine. The caller holds the lock."""

        def failed() -> None:
            with self._lock:
                if self._slots.get(key) is slot:
                    del self._slots[key]
            self._count()

        name = str(key[1] or served.name)
        worker = Worker(
            name, self._settings, lambda: self._load(served, key, slot), failed, self._metrics.batch
        )
        slot = self._slots[key] = Slot(worker)
        worker.start()
        return slot

    def _load(self, served: Served, key: Key, slot: Slot) -> Engine:
        """Prepare a model if necessary, make room for it, and load it. Runs in the worker's thread."""
        direction, began = key[1], time.monotonic()
        what = f"{direction} of {served.name}" if direction else f"{served.name}"
        try:
            with self._loading:
                ready = prepare(served, direction, self._settings, self._cache)
                self._make_room(key, ready.bytes)
                try:
                    engine = ready.open()
                except UserError:
                    if served.way == "whole" or ready.cut:
                        raise
                    # The folder in the cache is damaged: make it again.
                    ready = prepare(served, direction, self._settings, self._cache, anew=True)
                    engine = ready.open()
                with self._lock:
                    slot.ready = ready
        except UserError as error:
            say(f"{what} cannot be loaded: {error}")
            raise Unavailable(f"the model of {what} cannot be loaded: the server's log says why") from None
        except Exception as error:
            say(f"{what} cannot be loaded: {type(error).__name__}: {UserError(str(error))}")
            raise Unavailable(f"the model of {what} cannot be loaded: the server's log says why") from error
        self._metrics.load(ready.cut)
        self._count()
        made = (
            "extracted and loaded"
            if ready.cut and direction
            else "converted and loaded"
            if ready.cut
            else "loaded"
        )
        seconds = time.monotonic() - began
        has = f"{served.engine}, {ready.parameters:,} parameters, {size(ready.bytes)}"
        say(f"{what}: {made} in {seconds:.1f} s; {has}")
        return engine

    def _make_room(self, key: Key, count: int) -> None:
        """Close engines until there is room for ``count`` bytes, or no other loaded engine is left."""
        leaving: dict[Key, Slot] = {}
        with self._lock:
            held = {
                other: slot.ready.bytes
                for other, slot in self._slots.items()
                if other != key and slot.ready is not None
            }
            for other in list(held):
                if sum(held.values()) + count <= self._settings.memory:
                    break
                leaving[other] = self._slots.pop(other)
                del held[other]
        for slot in leaving.values():
            slot.worker.close()
        for (name, direction), slot in leaving.items():
            slot.worker.join()  # after that its memory is free
            self._metrics.evict()
            say(f"{f'{direction} of {name}' if direction else name} has made room")
        self._count()

    def _count(self) -> None:
        held = self.loaded()
        self._metrics.held(len(held), sum(held.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return the number and bytes of loaded engines, for the server's health report."""
        held = self.loaded()
        return {"loaded": len(held), "bytes": sum(held.values())}


def say(text: str) -> None:
    """Print a line to the log, which is standard error."""
    print(f"lsmoe: {text}", file=sys.stderr, flush=True)

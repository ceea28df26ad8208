"""Prefetch the steps of a stream in a thread."""

from __future__ import annotations

import threading
from queue import Queue
from types import TracebackType
from typing import Any, Protocol

import torch

from lsmoe_ds.data.batches import Step

AHEAD = 2  # steps that are ready; one more may be in preparation


class Stream(Protocol):
    def __next__(self) -> Step: ...
    def state_dict(self) -> dict[str, Any]: ...


class Prefetched:
    """Yield the steps of a stream in their order, and prepare the next ones while the caller computes.

    Use it as a context manager; the thread ends with the block. On a machine with GPUs tensors are in pinned
    memory, so that they are copied while the GPU computes. Errors of the stream are raised by ``next``.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._state = stream.state_dict()
        self._ready: Queue[tuple[Step, dict[str, Any]] | BaseException] = Queue(AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetching", daemon=True)

    def __enter__(self) -> Prefetched:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            if not self._ready.empty():
                self._ready.get_nowait()  # lets a blocked thread see that it must stop
            self._thread.join(0.01)

    def __iter__(self) -> Prefetched:
        return self

    def __next__(self) -> Step:
        made = self._ready.get()
        if isinstance(made, BaseException):
            raise made
        step, self._state = made
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position after the last step that was returned, not the last one prepared."""
        return self._state

    def _work(self) -> None:
        pin = torch.cuda.is_available()
        try:
            while not self._stopped.is_set():
                step = next(self._stream)
                if pin:
                    step = step.pinned()
                self._ready.put((step, self._stream.state_dict()))
        except BaseException as error:
            self._ready.put(error)

"""Import large libraries in less time."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quick_import() -> Iterator[None]:
    """Suppress warnings and garbage collection while the block imports.

    An import creates hundreds of thousands of permanent objects. Afterwards they are exempt from garbage
    collection, also at the end of the process.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()

"""Language-specific mixture-of-experts training for multilingual machine translation.

``load``, ``plan`` and ``read_pairs`` are the Python interface (:mod:`lsmoe_ds.api`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsmoe_ds.api import Model, load, plan, read_pairs

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load", "plan", "read_pairs"]


def __getattr__(name: str) -> Any:
    """Import the interface when it is first used, so that the command starts quickly."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lsmoe_ds import api

    return getattr(api, name)

"""Notices to the person on standard error: each once, and of several ranks only the first one's."""

from __future__ import annotations

import os
import sys
from functools import cache

from lsmoe_ds.parallel.membership import guess_rank


@cache
def notice(text: str) -> None:
    """Print ``lsmoe: TEXT`` unless this process, or a rank before this one, has done so."""
    if guess_rank(os.environ) == 0:
        print(f"lsmoe: {text}", file=sys.stderr, flush=True)

"""Print notices on standard error, once and only on the first rank; format lists and counts in sentences."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from functools import cache

SHOWN = 8  # names in one sentence
LINE_EVERY = 30.0  # seconds between two lines of progress if standard error is not a terminal


def listed(names: Iterable[str], between: str = ", ") -> str:
    """Join distinct names; if there are many, only the first ones and the number of the others."""
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return between.join(found[:SHOWN]) + more


def counted(number: int, noun: str) -> str:
    """Return ``1 bitext``, ``1,000 bitexts`` or ``2 processes``."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def guess_rank(environment: Mapping[str, str]) -> int:
    """Guess the rank before the ranks have met, so that an error is printed once."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return 0


@cache
def notice(text: str) -> None:
    """Print ``lsmoe: TEXT``, on the first rank only and once per process."""
    if guess_rank(os.environ) == 0:
        print(f"lsmoe: {text}", file=sys.stderr, flush=True)

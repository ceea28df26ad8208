"""What replicas of the experts of English change in a training step of an English-centric model.

    python benchmarks/replicas.py [--rounds 20]

The models, text and batches of exchange.py: two processes, a dense encoder, 32 experts in every second layer
of the decoder, 16 languages to and from English, so that half of the target tokens are English. Assigned
(static) experts of English are on one rank; where a learned router has put them is chance.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import argument_parser, write
from exchange import run

ROUTINGS: dict[str, dict[str, Any]] = {
    "assigned": {"routing": "static", "task": "target"},
    "learned": {"routing": "task", "task": "target"},
}
CONTESTANTS = {
    f"{name}, {said}": ("mixed", routing | {"replicas": tasks})
    for name, routing in ROUTINGS.items()
    for said, tasks in (("no replicas", None), ("replicas of English", ["en"]))
}


def main() -> None:
    parser = argument_parser(__doc__, rounds=20)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (result := run(__file__, arguments, CONTESTANTS)) is not None:
        write(result, arguments.out)


if __name__ == "__main__":
    main()

"""The process between ``lsmoe train`` and its ranks on this machine: DeepSpeed's launcher, with signals ignored.

Its own answer to a signal would be to end the ranks after 30 seconds, saved or not, and to leave with status 1. Here whoever
started it hands signals to the ranks (:mod:`lsmoe_ds.launch.processes`), which ignore them until they have handlers. The
``deepspeed`` command itself would import everything once more, and take other GPUs than CUDA_VISIBLE_DEVICES names.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from lsmoe_ds import interrupt


class _Signals:
    """What DeepSpeed's launcher takes for the module ``signal``."""

    SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM

    @staticmethod
    def signal(number: int, handler: Any) -> None:
        """Leave the signal ignored."""


def run(arguments: list[str]) -> int:
    """Start the ranks and wait for them; return the status of the first that failed, 128 + N if signal N killed it."""
    from lsmoe_ds.parallel import compat

    compat.import_deepspeed()
    from deepspeed.launcher import launch

    launch.signal = _Signals
    sys.argv[1:] = arguments
    try:
        launch.main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
        if status >= 0:
            return status
        name = signal.Signals(-status).name
        interrupt.say(f"a rank was killed by {name}{', perhaps for lack of memory' * (name == 'SIGKILL')}")
        return 128 - status
    return 0


if __name__ == "__main__":
    interrupt.shield()
    sys.exit(run(sys.argv[1:]))

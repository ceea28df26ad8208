"""Run DeepSpeed's launcher, with signals ignored, between ``lsmoe train`` and its ranks on this machine.

On a signal DeepSpeed's launcher would kill the ranks after 30 seconds, saved or not, and exit with status 1.
Here the process that started the launcher sends signals to the ranks instead
(:mod:`lsmoe_ds.launch.processes`); ranks ignore signals until they have handlers. The ``deepspeed`` command
would import everything once more, and use other GPUs than CUDA_VISIBLE_DEVICES names.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from lsmoe_ds import interrupt


class _Signals:
    """Replace the module ``signal`` inside DeepSpeed's launcher."""

    SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM

    @staticmethod
    def signal(number: int, handler: Any) -> None:
        """Install no handler: the signal stays ignored."""


def run(arguments: list[str]) -> int:
    """Start the ranks and wait for them.

    Returns the exit status of the first rank that failed, 128 + N if signal N killed it; 0 if none failed.
    """
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

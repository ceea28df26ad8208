"""Worker processes that prepare data."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def test_workers_end_with_a_killed_parent() -> None:
    code = (
        "import os, time\nfrom lsmoe_ds.data.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    pool = Workers(1)\n    print(next(iter(pool.map(len, ['abc']))), flush=True)\n"
        "    print(*pool._pool._processes, flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "3\n"
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "zombie" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")

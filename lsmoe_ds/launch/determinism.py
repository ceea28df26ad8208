"""Make training on GPUs bit-exact when it is repeated on the same machines."""

from __future__ import annotations

import os

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with these cuBLAS is deterministic; the first is faster


def make_deterministic() -> None:
    """Make torch, cuBLAS and cuDNN choose algorithms that add up in one order in every run.

    Call it before any computation on a GPU, because cuBLAS reads its environment variable only once;
    processes started later inherit it. An operation without such an algorithm then raises a RuntimeError that
    names it.
    """
    import torch

    if os.environ.get(CUBLAS) not in WORKSPACES:
        os.environ[CUBLAS] = WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    # Filling all that torch.empty returns would only cost time: DeepSpeed's buckets are written before they
    # are read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

"""Let a training on GPUs give the same bits whenever it is repeated on the same machines."""

from __future__ import annotations

import os

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS computes alike in every run; the first is faster


def make_deterministic() -> None:
    """Make torch, cuBLAS and cuDNN choose algorithms that add up in one order in every run.

    Call it before anything is computed on a GPU, as cuBLAS reads its variable but once; processes started
    later inherit that. An operation without such an algorithm then raises a RuntimeError that names it.
    """
    import torch

    if os.environ.get(CUBLAS) not in WORKSPACES:
        os.environ[CUBLAS] = WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    # Filling all that torch.empty returns would only cost time: DeepSpeed's buckets are written before they
    # are read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

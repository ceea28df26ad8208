"""Compute plain experts on a CPU: several at a time, each on one thread.

MKL divides every single product among all threads, which gains little if it has few rows. With two threads,
128 experts of 2 to 16 rows take about half the time if each thread computes its own experts.

N rows with E experts, H hidden, F feed-forward width.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Rows from which on all threads compute one expert together: MKL divides its products well, and one thread
# alone would keep the others waiting.
LARGE = 256
# Bytes of weights whose gradients a backward pass computes together, but at least those of some experts: more
# need more memory, fewer let threads wait for one another more often. It must not depend on a rank's threads
# or rows, since ZeRO 2 fills its buckets in the order in which gradients arrive.
TOGETHER, LEAST = 256 * 2**20, 16
TENSORS = 4  # of an expert: the weight and the bias of both layers


def computes(rows: Tensor) -> bool:
    """Tell whether :func:`compute` can take these rows; under autocast the types would be others."""
    return rows.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def compute(experts: Sequence[Any], rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Apply experts to rows [N, H], sorted by expert, of which each has its ``counts``: [N, H].

    An expert computes ``relu(x W_1 + b_1) W_2 + b_2``. Each gets a gradient.
    """
    each = len(experts)
    if torch.is_grad_enabled():
        each = max(LEAST, TOGETHER // sum(tensor.nbytes for tensor in _tensors(experts[0])))
    outputs, starts = [], [0, *accumulate(counts)]
    for first in range(0, len(experts), each):
        last = min(first + each, len(experts))
        weights = [tensor for expert in experts[first:last] for tensor in _tensors(expert)]
        part = rows[starts[first] : starts[last]]
        outputs.append(_FeedForwards.apply(counts[first:last], part, *weights))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _tensors(expert: Any) -> tuple[Tensor, ...]:
    return expert.expand.weight, expert.expand.bias, expert.contract.weight, expert.contract.bias


class _FeedForwards(torch.autograd.Function):
    """Apply E experts to rows [N, H]. The weights are TENSORS tensors of each expert.

    What outlives an expert is allocated by the calling thread: memory of other threads is not kept for later
    tensors (``lsmoe_ds.launch.memory``).
    """

    @staticmethod
    def forward(ctx: Any, counts: Sequence[int], rows: Tensor, *weights: Tensor) -> Tensor:
        spans, kept = _spans(counts), any(ctx.needs_input_grad)
        widths = [weights[TENSORS * e].shape[0] for e in range(len(counts))]
        hidden = [rows.new_empty(*size) for size in zip(counts, widths, strict=True)] if kept else []
        out = torch.empty_like(rows)

        def apply(e: int) -> None:
            expand, expand_bias, contract, contract_bias = weights[TENSORS * e :][:TENSORS]
            inner = hidden[e] if kept else rows.new_empty(counts[e], widths[e])
            torch.addmm(expand_bias, rows[spans[e]], expand.t(), out=inner).relu_()
            torch.addmm(contract_bias, inner, contract.t(), out=out[spans[e]])

        _for_each(apply, counts)
        ctx.counts = counts
        ctx.save_for_backward(rows, *hidden, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, *saved = ctx.saved_tensors
        counts, of_rows, of_weights = ctx.counts, ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        hidden, weights, spans = saved[: len(counts)], saved[len(counts) :], _spans(counts)
        grad_rows = torch.empty_like(rows) if of_rows else None
        found = [
            torch.empty_like(weight) if needed else None
            for weight, needed in zip(weights, of_weights, strict=True)
        ]

        def differentiate(e: int) -> None:
            expand, _, contract, _ = weights[TENSORS * e :][:TENSORS]
            given = gradient[spans[e]]
            inner = given @ contract
            torch.ops.aten.threshold_backward.grad_input(inner, hidden[e], 0, grad_input=inner)
            products = (inner, rows[spans[e]]), (given, hidden[e])
            for layer, (of_output, of_input) in enumerate(products):
                weight, bias = found[TENSORS * e + 2 * layer :][:2]
                if weight is not None:
                    torch.mm(of_output.t(), of_input, out=weight)
                if bias is not None:
                    torch.sum(of_output, 0, out=bias)
            if grad_rows is not None:
                torch.mm(inner, expand, out=grad_rows[spans[e]])

        _for_each(differentiate, counts)
        return None, grad_rows, *found


def _spans(counts: Sequence[int]) -> list[slice]:
    return [slice(*bounds) for bounds in pairwise([0, *accumulate(counts)])]


def _for_each(work: Callable[[int], None], counts: Sequence[int]) -> None:
    """Call ``work`` with the number of each expert. It must not need gradients."""
    threads = torch.get_num_threads()
    small = [e for e, count in enumerate(counts) if count <= LARGE]
    # A mode, such as one that counts operations, sees only those of the calling thread.
    divided = threads > 1 and len(small) > 1 and not is_in_torch_dispatch_mode()
    pool = _pool(threads) if divided else None
    for e, count in enumerate(counts):
        if pool is None or count > LARGE:
            work(e)
    if pool is None:
        return
    # The busiest first, so that all threads end at about the same time.
    numbers = iter(sorted(small, key=lambda e: -counts[e]))
    inference = torch.is_inference_mode_enabled()

    def drain() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for e in numbers:
                work(e)

    begun: list[Future[None]] = []
    try:
        for _ in range(min(threads, len(small))):
            begun.append(pool.submit(drain))
    except RuntimeError:  # the interpreter is shutting down
        drain()
    for each in begun:
        each.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor | None:
    """Return threads that each compute alone; None if this build of torch has no such setting.

    ``torch.set_num_threads`` would change MKL's setting for the calling thread as well.
    """
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    names = ("MKL_Set_Num_Threads_Local", "omp_set_num_threads")
    if not all(hasattr(torch_library, name) for name in names):
        return None

    def compute_alone() -> None:
        torch.get_num_threads()  # torch's own setting for a new thread, which would come later
        for name in names:
            getattr(torch_library, name)(1)

    return ThreadPoolExecutor(threads, "experts", compute_alone)


# A forked process has none of the threads.
os.register_at_fork(after_in_child=_pool.cache_clear)

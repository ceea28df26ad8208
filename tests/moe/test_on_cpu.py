"""Experts on a CPU, of which each thread computes others, against one expert after another."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile
from torch.utils.flop_counter import FlopCounterMode

from lsmoe_ds.model.feed_forward import FeedForward
from lsmoe_ds.moe import on_cpu
from lsmoe_ds.parallel.topology import Topology

HIDDEN, WIDTH = 12, 20
COUNTS = [3, 0, 1, on_cpu.LARGE + 1, 2, 0, 40]


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def experts_of(dtype: torch.dtype = torch.float32) -> list[FeedForward]:
    torch.manual_seed(2)
    made = [FeedForward(HIDDEN, WIDTH, Topology.single()) for _ in COUNTS]
    for expert in made:
        for parameter in expert.parameters():
            torch.nn.init.normal_(parameter)
    return [expert.to(dtype) for expert in made]


def results(experts: list[FeedForward], rows: Tensor, alone: bool) -> list[Tensor | None]:
    """Return the output, and the gradients of the rows and of each parameter over two backward passes."""
    rows = rows.clone().requires_grad_()
    for scale in (1, 2):
        if alone:
            out = torch.cat([e(part) for e, part in zip(experts, rows.split(COUNTS), strict=True)])
        else:
            out = on_cpu.compute(experts, rows, COUNTS)
        (out * torch.linspace(-scale, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = [out.detach(), rows.grad, *(p.grad for expert in experts for p in expert.parameters())]
    for expert in experts:
        expert.zero_grad()
    return found


@pytest.mark.parametrize("least", [2, 16], ids=["gradients in parts", "together"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_one_after_another(monkeypatch, dtype, least):
    monkeypatch.setattr(on_cpu, "LEAST", least)
    monkeypatch.setattr(on_cpu, "TOGETHER", 0)
    experts, rows = experts_of(dtype), torch.randn(sum(COUNTS), HIDDEN).to(dtype)
    found, wanted = (results(experts, rows, alone) for alone in (False, True))
    assert all(gradient is not None for gradient in found), "an expert without rows gets zeros"
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(on_cpu.compute(experts, rows, COUNTS), found[0])


@pytest.mark.parametrize("trained", ["expand.weight", "contract.bias", "nothing"])
def test_frozen_parameters_get_no_gradient(trained):
    experts, rows = experts_of(), torch.randn(sum(COUNTS), HIDDEN)
    for expert in experts:
        for name, parameter in expert.named_parameters():
            parameter.requires_grad_(name == trained)
    found, wanted = (results(experts, rows, alone) for alone in (False, True))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(RuntimeError, match="shape"):
        on_cpu.compute(experts_of(), torch.randn(sum(COUNTS), HIDDEN + 1), COUNTS)


def test_the_calling_thread_keeps_its_threads(threads):
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if not hasattr(library, "MKL_Get_Max_Threads"):
        pytest.skip("this build of torch has no MKL")
    on_cpu.compute(experts_of(), torch.randn(sum(COUNTS), HIDDEN), COUNTS)
    assert torch.get_num_threads() == library.MKL_Get_Max_Threads() == threads
    pool = on_cpu._pool(threads)
    assert pool.submit(library.MKL_Get_Max_Threads).result() == 1
    assert pool.submit(torch.get_num_threads).result() == 1


def test_what_counts_operations_sees_all(threads):
    counts = [1] * len(COUNTS)
    with FlopCounterMode(display=False) as counter:
        on_cpu.compute(experts_of(), torch.randn(sum(counts), HIDDEN), counts).sum().backward()
    forward = 2 * 2 * HIDDEN * WIDTH * sum(counts)
    assert counter.get_total_flops() == 3 * forward - forward // 2, "the rows need no gradient"


def test_a_profile_of_all_threads_sees_all(threads):
    counts = [1] * len(COUNTS)
    config = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as found:
        on_cpu.compute(experts_of(), torch.randn(sum(counts), HIDDEN), counts)
    assert {each.key: each.count for each in found.key_averages()}["aten::addmm"] == 2 * len(counts)


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_rows_are_computed_while_the_interpreter_shuts_down(monkeypatch, threads):
    experts, rows = experts_of(), torch.randn(sum(COUNTS), HIDDEN)
    with torch.no_grad():
        wanted = on_cpu.compute(experts, rows, COUNTS)
        on_cpu._pool(threads).shutdown()
        torch.testing.assert_close(on_cpu.compute(experts, rows, COUNTS), wanted)
    on_cpu._pool.cache_clear()


def test_another_number_of_threads_replaces_the_pool():
    first = on_cpu._pool(2)
    assert first.submit(int).result() == 0
    (thread,) = first._threads
    on_cpu._pool(3)
    del first
    thread.join(60)
    assert not thread.is_alive()


def _in_child() -> None:
    assert on_cpu._pool(2).submit(int).result(timeout=60) == 0


def test_a_forked_process_has_threads_of_its_own():
    assert on_cpu._pool(2).submit(int).result() == 0
    child = multiprocessing.get_context("fork").Process(target=_in_child)
    child.start()
    child.join(90)
    assert child.exitcode == 0

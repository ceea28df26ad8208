"""On a GPU: attention between packed sentences against padded ones in float32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from lsmoe_ds.methods.packing import Packing
from lsmoe_ds.model.packed_attention import attend_packed, has_kernel


def packing_of(lengths: list[int], device: torch.device) -> Packing:
    return Packing(torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_agrees_with_float32(device, causal, dtype):
    lengths = [5, 70, 1, 33], [5, 70, 1, 33] if causal else [9, 2, 64, 40]
    generator, results = torch.Generator().manual_seed(3), {}
    sizes = [sum(lengths[0]), sum(lengths[1]), sum(lengths[1])]
    given = [torch.randn(size, 4, 1, 64, generator=generator).to(dtype) for size in sizes]
    weights = torch.randn(sizes[0], 4, 1, 64, generator=generator).to(dtype)
    for where, kind in ((device, dtype), (torch.device("cpu"), torch.float32)):
        rows = [each.to(where, kind).requires_grad_() for each in given]
        packings = [packing_of(each, where) for each in lengths]
        if where.type == "cuda":
            assert has_kernel(rows[0], 0.0) == (kind != torch.float32)
        out = attend_packed(*rows, packings[0], packings[0] if causal else packings[1], 0.0, causal)
        gradients = torch.autograd.grad((out * weights.to(where, kind)).sum(), rows)
        results[where, kind] = [each.detach().float().cpu() for each in (out, *gradients)]
    found, wanted = results[device, dtype], results[torch.device("cpu"), torch.float32]
    for first, second in zip(found, wanted, strict=True):
        apart = (first - second).norm() / second.norm()
        assert apart < {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3}[dtype]

"""On a GPU: steps of Adam on the host, whose copies overlap them, against torch's own on the device."""

from __future__ import annotations

import pytest
import torch

from lsmoe_ds.training import offloaded_adam
from lsmoe_ds.training.offloaded_adam import OffloadedAdam


@pytest.mark.parametrize("part", [2**25, 1000], ids=["one part", "many parts"])
def test_steps_are_those_on_the_device(device, part, monkeypatch):
    monkeypatch.setattr(offloaded_adam, "PART", part)
    torch.manual_seed(1)
    shapes = [(300, 257), (5,), (40, 999)]
    ours = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    theirs = [torch.nn.Parameter(each.detach().clone()) for each in ours]
    settings = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-9, "weight_decay": 0.1, "fused": True}
    optimizers = OffloadedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert optimizers[0].state[one]["exp_avg"].device.type == "cpu"

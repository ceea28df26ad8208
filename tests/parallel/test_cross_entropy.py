"""Cross-entropy a few tokens at a time, on one rank and with the vocabulary spread over two."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lsmoe_ds.methods.fuse_distillation import FuseDistillation
from lsmoe_ds.methods.objective import Objective
from lsmoe_ds.parallel import cross_entropy as module
from lsmoe_ds.parallel.cross_entropy import cross_entropy
from lsmoe_ds.parallel.topology import Topology

TOKENS, VOCABULARY, SMOOTHINGS = 14, 30, (0.0, 0.1)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(TOKENS, VOCABULARY, generator=generator)).to(dtype)
    return logits.requires_grad_(), torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def found(logits, labels, smoothing, topology=None):
    """Return loss, negative log-likelihoods and the gradient of 3 x the loss."""
    loss, nll = cross_entropy(logits * 1, labels, smoothing, topology or Topology.single())
    return loss.detach(), nll, torch.autograd.grad(3 * loss, logits)[0]


def wanted(logits, labels, smoothing):
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    nll = F.cross_entropy(logits, labels, reduction="none").detach()
    return loss.detach(), nll, torch.autograd.grad(3 * loss, logits)[0]


@pytest.fixture
def three_at_once(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 100)  # three tokens; two are left for the last block


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_equals_torch(three_at_once, smoothing):
    torch.testing.assert_close(found(*inputs(), smoothing), wanted(*inputs(), smoothing))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_of_16_bits_the_gradient_alone_is_rounded(three_at_once, smoothing):
    logits, labels = inputs(torch.bfloat16)
    loss, nll, gradient = found(logits, labels, smoothing)
    exact = wanted(logits.detach().float().requires_grad_(), labels, smoothing)
    assert gradient.dtype == torch.bfloat16 and loss.dtype == nll.dtype == torch.float32
    torch.testing.assert_close((loss, nll), exact[:2])
    torch.testing.assert_close(gradient, exact[2].bfloat16())


def split(topology: Topology, smoothing: float) -> tuple:
    logits, labels = inputs()
    part = logits.detach().chunk(2, 1)[topology.tensor_rank].clone().requires_grad_()
    loss, nll, gradient = found(part, labels, smoothing, topology)
    parts = [torch.empty_like(gradient) for _ in range(2)]
    dist.all_gather(parts, gradient)
    return loss, nll, torch.cat(parts, 1)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_two_ranks_with_half_of_the_vocabulary_equal_one(pool, smoothing):
    for rank in pool.run(2, split, smoothing, tensor=2):
        torch.testing.assert_close(rank, found(*inputs(), smoothing))


class Largest(TorchDispatchMode):
    """Keep the most values of a new tensor."""

    most = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        given = {each.untyped_storage().data_ptr() for each in arguments if isinstance(each, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("objective", (Objective(), FuseDistillation(False), FuseDistillation(True)))
def test_nothing_as_large_as_the_logits_is_stored(three_at_once, objective, dtype):
    logits, labels = inputs(dtype)
    given = logits * 1
    with Largest() as largest:
        loss = objective.losses(given, labels, 0.1, Topology.single()).loss
        torch.autograd.grad(loss, given)
    assert 0 < largest.most <= 2 * 3 * VOCABULARY

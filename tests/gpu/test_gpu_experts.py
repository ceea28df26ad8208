"""On a GPU: the grouped product of the experts against one expert after another, and models in bfloat16
against float32.
"""

from __future__ import annotations

import pytest
import torch
from support.gradients import norm_of
from support.optimizer_steps import recipe_of
from support.sameness import VOCABULARY, ragged_batch
from torch import Tensor

from lsmoe_ds.model.feed_forward import FeedForward
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.moe import experts as module
from lsmoe_ds.moe.experts import Experts
from lsmoe_ds.moe.routers import DROPPED
from lsmoe_ds.parallel.topology import Topology

HIDDEN, WIDTH, EXPERTS, TOP_K = 128, 256, 8, 2
KERNEL = "needs a GPU of compute capability 9 (Hopper), on which experts are computed by grouped products"


@pytest.fixture
def kernel(device, monkeypatch) -> None:
    """Make sure that the device has the grouped product, or skip the test.

    On a CPU, torch's own product takes its place.
    """
    if device.type == "cpu":
        monkeypatch.setattr(module, "has_kernel", lambda device, dtype: dtype == torch.bfloat16)
    elif not module.has_kernel(device, torch.bfloat16):
        pytest.skip(KERNEL)


def experts_on(device: torch.device) -> Experts:
    torch.manual_seed(3)
    experts = [FeedForward(HIDDEN, WIDTH, Topology.single()) for _ in range(EXPERTS)]
    for expert in experts:  # far from zero, or relu would be on in one precision and off in the other
        expert.expand.bias.data.sign_().mul_(8)
    made = Experts(experts, Topology.single()).to(device, torch.bfloat16)
    made.run_idle = True  # as on several ranks
    return made


def spoil_free_memory(device: torch.device) -> None:
    """Fill what the allocator will hand out next, so that a value that nobody writes is found."""
    if device.type == "cuda":
        blocks = [torch.full((2**k,), float("nan"), device=device) for k in range(8, 24) for _ in range(4)]
        del blocks


def results(experts: Experts, rows: Tensor, chosen: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return the outputs and all gradients of the experts."""
    experts.zero_grad()
    rows, weights = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    spoil_free_memory(rows.device)
    out = experts(rows, chosen, weights)
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view_as(out))
    of_parameters = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"out": out.detach(), "rows": rows.grad, "weights": weights.grad, **of_parameters}


CHOSEN = {
    "all experts": lambda n: torch.stack([torch.arange(n) % EXPERTS, (torch.arange(n) + 3) % EXPERTS], 1),
    "the first ones idle": lambda n: torch.stack([5 + torch.arange(n) % 3, torch.full((n,), 4)], 1),
    "the last ones idle": lambda n: torch.stack([torch.arange(n) % 3, torch.full((n,), 3)], 1),
    "every second one idle": lambda n: torch.stack([2 * (torch.arange(n) % 3), torch.full((n,), 6)], 1),
    "one expert": lambda n: torch.stack([torch.full((n,), 2), torch.full((n,), DROPPED)], 1),
    "none": lambda n: torch.full((n, TOP_K), DROPPED),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
@pytest.mark.parametrize("case", CHOSEN)
def test_the_grouped_product_is_as_exact_as_one_expert_after_another(device, case, count, monkeypatch):
    torch.manual_seed(4)
    chosen = CHOSEN[case](count).to(device)
    rows = torch.randn(count, HIDDEN, device=device).bfloat16()
    weights = torch.rand(count, TOP_K, device=device) * (chosen != DROPPED)
    experts = experts_on(device)
    with monkeypatch.context() as patch:
        patch.setattr(Experts, "_separately", None)
        found = results(experts, rows, chosen, weights)
    monkeypatch.setattr(module, "use_grouped", lambda *_: False)
    rival = results(experts, rows, chosen, weights)
    exact = results(experts.float(), rows.float(), chosen, weights)
    used = set(chosen.flatten().tolist())
    for name, value in found.items():
        if "deepspeed_experts" in name and int(name.split(".")[1]) not in used:
            assert not value.any(), f"{name} of an expert without rows"
            continue
        assert value.isfinite().all(), name
        error, of_rival = (float((each[name].float() - exact[name]).norm()) for each in (found, rival))
        # The product is rounded to bfloat16 before the bias is added, once more than a linear layer rounds.
        assert error <= 1.5 * of_rival + 2**-7 * float(exact[name].norm()), name


@pytest.mark.usefixtures("kernel")
def test_the_grouped_product_gives_the_same_bits_twice(device):
    torch.manual_seed(4)
    chosen = CHOSEN["all experts"](1000).to(device)
    rows = torch.randn(1000, HIDDEN, device=device).bfloat16()
    given = experts_on(device), rows, chosen, torch.rand(1000, TOP_K, device=device)
    first = {name: each.clone() for name, each in results(*given).items()}
    assert all(torch.equal(first[name], each) for name, each in results(*given).items())


def test_the_grouped_product_is_taken_on_hopper_in_bfloat16(device):
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    experts = experts_on(device)
    for rows in (0, 5):
        given = torch.zeros(rows, HIDDEN, device=device)
        assert module.use_grouped(experts.deepspeed_experts, given.bfloat16()) == hopper
        assert not module.use_grouped(experts.deepspeed_experts, given)


def losses_and_gradients(model: Transformer, batch) -> tuple[float, dict[str, Tensor]]:
    loss = model(*batch.inputs).loss / batch.target_tokens
    loss.backward()
    gradients = {name: each.grad.float() for name, each in model.named_parameters() if each.grad is not None}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("routing", ["token", "sentence", "target", "static", "dense"])
def test_bfloat16_on_the_device_agrees_with_float32_on_the_cpu(device, routing):
    """All weights are numbers that bfloat16 has, so that both begin with the same."""
    recipe = recipe_of(routing)
    batch = ragged_batch(torch.Generator().manual_seed(2), recipe, 16)
    exact = Transformer(recipe, VOCABULARY)
    initialize(exact, 1, Topology.single())
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    loss, wanted = losses_and_gradients(exact, batch)
    topology = Topology.single(device)
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        model = Transformer(recipe, VOCABULARY, topology)
        model.load_state_dict(exact.state_dict())
        model.to(device, dtype)
        found, gradients = losses_and_gradients(model, batch.to(device))
        assert found == pytest.approx(loss, rel=allowed / 10), dtype
        apart = norm_of({name: gradients[name].cpu() - each for name, each in wanted.items()})
        assert apart <= allowed * norm_of(wanted), (dtype, apart)

"""The grouped product of the experts against one expert after another, and when which is taken."""

from __future__ import annotations

import pytest
import torch
from support.sameness import VOCABULARY, recipe_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.model.feed_forward import FeedForward
from lsmoe_ds.moe import experts as module
from lsmoe_ds.moe.dispatch import Dispatcher
from lsmoe_ds.moe.experts import Assignment, Experts, _Stack, use_grouped
from lsmoe_ds.moe.routers import DROPPED
from lsmoe_ds.parallel import grouped
from lsmoe_ds.parallel.topology import Topology

HIDDEN, WIDTH, EXPERTS = 16, 24, 5
needs_grouped = pytest.mark.skipif(module.grouped_mm is None, reason="torch has no grouped_mm")


def experts_of(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Experts:
    torch.manual_seed(3)
    alone = Topology.single()
    experts = [FeedForward(HIDDEN, width, alone) for _ in range(EXPERTS)]
    for expert in experts:
        expert.expand.bias.data.sign_().mul_(
            2
        )  # far from zero, or relu would be on in one precision and off in the other
    return Experts(experts, alone).to(dtype)


def results(
    experts: Experts, rows: Tensor, chosen: Tensor, weights: Tensor, count: int | None = None
) -> dict[str, Tensor]:
    """Run two forward and backward passes; return the output, and every gradient summed over both."""
    experts.zero_grad()
    rows, weights = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    for scale in (1, 2):
        out = experts(rows, chosen, weights, count)
        (out * torch.linspace(-scale, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    of_parameters = {
        name: parameter.grad.clone()
        for name, parameter in experts.named_parameters()
        if parameter.grad is not None
    }
    return {"out": out.detach(), "rows": rows.grad, "weights": weights.grad} | of_parameters


def grouped_results(monkeypatch, *arguments) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(module, "use_grouped", lambda *_: True)
        patch.setattr(Experts, "_separately", None)
        return results(*arguments)


CHOSEN = {
    "all experts": [[0, 4], [1, 2], [3, 0], [2, 1], [0, 3], [4, 2]],
    "some without rows": [[1, 3], [3, 1], [1, 3], [3, 1]],
    "one row": [[2, 0]],
    "some choices dropped": [[DROPPED, 4], [DROPPED, DROPPED], [3, 0], [DROPPED, 4]],
    "all choices dropped": [[DROPPED, DROPPED], [DROPPED, DROPPED]],
}


@needs_grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CHOSEN)
def test_grouped_gives_what_one_after_another_gives(monkeypatch, case, dtype):
    chosen = torch.tensor(CHOSEN[case])
    torch.manual_seed(4)
    rows, weights = torch.randn(len(chosen), HIDDEN).to(dtype), torch.rand(chosen.shape) * (chosen != DROPPED)
    experts = experts_of(dtype)
    found, rival = (
        grouped_results(monkeypatch, experts, rows, chosen, weights),
        results(experts, rows, chosen, weights),
    )
    exact = results(experts.float(), rows.float(), chosen, weights)
    names = dict(experts.named_parameters())
    assert found.keys() == {"out", "rows", "weights", *names}, "an expert without rows gets zeros, all do"
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name == "weights" else dtype)
        if name not in exact:
            assert not value.any(), name
            continue
        error, of_rival = (float((each[name].float() - exact[name]).norm()) for each in (found, rival))
        assert error <= 1.1 * of_rival + torch.finfo(dtype).eps / 2 * float(exact[name].norm()), name


@pytest.mark.parametrize("forced", [pytest.param(True, marks=needs_grouped), False])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_choice_at_all(monkeypatch, rows, forced):
    experts = experts_of()
    experts.run_idle = True  # as on several ranks
    x, chosen = torch.randn(rows, HIDDEN, requires_grad=True), torch.full((rows, 2), DROPPED)
    monkeypatch.setattr(module, "use_grouped", lambda *_: forced)
    out = experts(x, chosen, torch.zeros(rows, 2))
    out.sum().backward()
    assert out.shape == x.shape and not out.any() and not x.grad.any()
    for parameter in experts.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("forced", [pytest.param(True, marks=needs_grouped), False])
def test_where_no_choice_can_be_dropped_the_results_are_the_same(monkeypatch, forced):
    chosen, rows = torch.tensor(CHOSEN["all experts"]), torch.randn(6, HIDDEN)
    compute = (lambda *a: grouped_results(monkeypatch, *a)) if forced else results
    found, wanted = (compute(experts_of(), rows, chosen, torch.ones(6, 2), count) for count in (12, None))
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


def test_the_dispatcher_passes_on_that_none_is_dropped():
    dispatcher = Dispatcher(
        [FeedForward(HIDDEN, WIDTH, Topology.single()) for _ in range(EXPERTS)], EXPERTS, Topology.single()
    )
    seen = []
    dispatcher.experts.forward = lambda rows, chosen, weights, count: seen.append(count) or rows
    for arguments in ([], [False]):
        dispatcher(torch.randn(1, HIDDEN), torch.tensor([[2]]), torch.ones(1, 1), *arguments)
    assert seen == [None, 1]


@needs_grouped
def test_nothing_waits_for_the_device_where_no_choice_can_be_dropped():
    """A tensor without storage raises where its values are asked for."""
    with FakeTensorMode():
        chosen = torch.empty(7, 2, dtype=torch.long)
        assignment = Assignment.of(chosen, EXPERTS, chosen.numel())
        rows, weights, biases = (
            torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True)
            for shape in ((14, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH))
        )
        products = module.grouped_mm(rows, weights.transpose(1, 2), offs=assignment.ends)
        module._AddBias.apply(products, biases, assignment).relu().sum().backward()
        assert [x.grad.shape for x in (rows, weights, biases)] == [x.shape for x in (rows, weights, biases)]
        with pytest.raises(Exception, match="_local_scalar_dense"):
            Assignment.of(chosen, EXPERTS, None)


def spread(distance: int, count: int = 3, size: int = 16, first: int = 0) -> list[Tensor]:
    """Matrices [2, size / 2] of one flat tensor, so many elements apart, as an optimizer flattens them."""
    flat = torch.arange(first + distance * count, dtype=torch.float32)
    return [
        nn.Parameter(flat[start : start + size].view(2, -1))
        for start in range(first, first + distance * count, distance)
    ]


@pytest.mark.parametrize(
    ("parts", "view"),
    [
        (spread(16), True),
        (spread(20), True),
        (spread(20, count=1), True),
        (spread(16, first=4), True),
        (spread(16, first=1), False),
        (spread(18), False),
        (spread(16)[::-1], False),
        ([*spread(20), *spread(20)], False),
        ([spread(20)[i] for i in (0, 2, 1)], False),
        ([spread(20)[0]] * 3, False),
    ],
    ids=[
        "touching",
        "with gaps",
        "one",
        "later",
        "misaligned",
        "misaligned gaps",
        "backwards",
        "two storages",
        "disordered",
        "the same",
    ],
)
def test_experts_at_one_distance_are_seen_without_copying_and_others_copied(parts, view):
    seen = _Stack.apply(*parts)
    assert torch.equal(seen, torch.stack(parts))
    assert (seen.data_ptr() == parts[0].data_ptr()) == view
    weight = torch.randn_like(seen)
    (seen * weight).sum().backward()
    if parts[0] is not parts[-1] or len(parts) == 1:
        assert all(torch.equal(part.grad, each) for part, each in zip(parts, weight, strict=True))
    else:
        torch.testing.assert_close(parts[0].grad, weight.sum(0))


def test_a_view_never_leaves_its_storage():
    flat = torch.zeros(64)
    # Two storages over one memory, as two allocations that happen to lie side by side.
    near, far = (torch.frombuffer(memoryview(flat.numpy())[i : i + 16], dtype=torch.float32) for i in (0, 16))
    assert near.data_ptr() + 64 == far.data_ptr()
    assert _Stack.apply(near, far).data_ptr() != near.data_ptr()


def are_views(topology, recipe) -> list[bool]:
    """Of each kind of parameter of each layer, whether the experts' are seen as one tensor without
    copying.
    """
    from lsmoe_ds.training.engine import build_engine

    engine = build_engine(recipe, VOCABULARY, topology)
    found = []
    for _, layer in engine.module.moe_layers():
        experts = layer.deepspeed_moe.experts.deepspeed_experts
        for name, first in experts[0].named_parameters():
            found.append(
                _Stack.apply(*[expert.get_parameter(name) for expert in experts]).data_ptr()
                == first.data_ptr()
            )
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_lays_experts_at_one_distance(pool, stage):
    recipe = recipe_for("target", 1, 1, stage)
    recipe.deepspeed = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    (found,) = pool.run(1, are_views, recipe)
    assert found and all(found)


STEPPED_IN_16_BITS = {"adafactor": {"master_weights": False}, "optimizer": "adafactor"}


@pytest.mark.parametrize(
    ("stage", "training"),
    [(0, STEPPED_IN_16_BITS), (1, {"trainable": ["*norm*"]}), (2, {"trainable": ["*norm*"]})],
    ids=["stage 0", "frozen, stage 1", "frozen, stage 2"],
)
def test_experts_without_a_buffer_of_zero_are_laid_together(pool, stage, training):
    recipe = recipe_for("target", 1, 1, stage)
    recipe.deepspeed = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    value = recipe.model_dump(mode="json", exclude_none=True)
    value["training"] |= training
    (found,) = pool.run(1, are_views_where_grouped, Recipe.model_validate(value))
    assert found and all(found)


def are_views_where_grouped(topology, recipe) -> list[bool]:
    """Return what :func:`are_views` finds where bfloat16 has grouped products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "has_kernel", lambda device, dtype: dtype == torch.bfloat16)
        return are_views(topology, recipe)


def test_laying_experts_together_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "has_kernel", lambda device, dtype: dtype == torch.bfloat16)
    experts = experts_of(torch.bfloat16)
    before = {name: value.clone() for name, value in experts.named_parameters()}
    experts.lay_together(lambda parameter: parameter.dim() > 1)
    parts = experts.deepspeed_experts

    def is_view(name: str) -> bool:
        stacked = _Stack.apply(*[expert.get_parameter(name) for expert in parts])
        return stacked.data_ptr() == parts[0].get_parameter(name).data_ptr()

    assert is_view("expand.weight") and is_view("contract.weight") and not is_view("expand.bias")
    place = parts[0].expand.weight.data_ptr()
    experts.pack()
    assert is_view("contract.bias") and parts[0].expand.weight.data_ptr() == place, "moved once"
    assert all(torch.equal(value, before[name]) for name, value in experts.named_parameters())
    single = experts_of()
    places = [value.data_ptr() for value in single.parameters()]
    single.pack()
    assert [value.data_ptr() for value in single.parameters()] == places, "float32 has no grouped product"


def fake_rows(rows: int = 6, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Tensor:
    with FakeTensorMode():
        return torch.empty(rows, HIDDEN, dtype=dtype, device=device)


def changed(change) -> nn.ModuleList:
    experts = experts_of(torch.bfloat16).deepspeed_experts
    change(experts)
    return experts


class OtherFeedForward(FeedForward):
    pass


def test_the_grouped_product_is_taken_where_it_exists_and_is_faster(monkeypatch):
    monkeypatch.setattr(grouped, "grouped_mm", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plain = experts_of(torch.bfloat16).deepspeed_experts
    assert use_grouped(plain, fake_rows())
    assert use_grouped(plain, fake_rows(0)), "or gradients would come in another order on ranks without rows"
    assert not use_grouped(plain, fake_rows(device="cpu"))
    assert not use_grouped(plain, fake_rows(dtype=torch.float32))
    assert not use_grouped(experts_of().deepspeed_experts, fake_rows()), "weights in float32"
    assert not use_grouped(experts_of(torch.bfloat16, width=20).deepspeed_experts, fake_rows()), (
        "not a multiple of 8"
    )
    other = OtherFeedForward(HIDDEN, WIDTH, Topology.single()).bfloat16()
    assert not use_grouped(changed(lambda experts: experts.insert(2, other)), fake_rows())
    linear = type("Linear", (nn.Linear,), {})(WIDTH, HIDDEN, dtype=torch.bfloat16)
    assert not use_grouped(changed(lambda experts: setattr(experts[1], "contract", linear)), fake_rows())
    for other in ((8, 0), (10, 0), (12, 0)):  # in Blackwell's kernel groups without rows get wrong gradients
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, other=other: other)
        assert not use_grouped(plain, fake_rows())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(grouped, "grouped_mm", None)
    assert not use_grouped(plain, fake_rows())


def test_no_group_of_the_optimizer_ends_within_a_layer():
    """At the size of 128 experts of Transformer-Big on 8 ranks: 134M values a layer, of 179M in a group."""
    from lsmoe_ds.parallel import deepspeed_engine

    topology = Topology(world=8, tensor=1, expert=8, rank=0)
    with torch.device("meta"):
        layers = [
            Experts([FeedForward(1024, 4096, Topology.single()) for _ in range(16)], topology)
            for _ in range(3)
        ]
        model = nn.ModuleList(
            nn.ModuleDict({"deepspeed_moe": each, "norm": nn.LayerNorm(8)}) for each in layers
        )
    groups = [{id(each) for each in group["params"]} for group in deepspeed_engine.optimizer_groups(model)]
    assert len(groups) == 1 + 3, "norms, and each layer by itself: two are more than the limit"
    assert sum(map(len, groups)) == len(list(model.parameters()))
    for layer in layers:
        assert {id(each) for each in layer.parameters()} in groups


def test_layers_share_a_group_of_the_optimizer_up_to_its_limit(monkeypatch):
    from lsmoe_ds.parallel import deepspeed_engine

    layers = [Experts([FeedForward(8, 16, Topology.single())] * 1, Topology.single()) for _ in range(5)]
    model = nn.ModuleList(nn.ModuleDict({"deepspeed_moe": each}) for each in layers)
    values = sum(each.numel() for each in layers[0].parameters())
    monkeypatch.setattr(deepspeed_engine, "LARGEST_GROUP", 2 * values)
    assert [len(group["params"]) for group in deepspeed_engine.optimizer_groups(model)] == [8, 8, 4]


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook"])
@pytest.mark.parametrize("part", ["", "expand", "contract"])
def test_an_expert_with_hooks_is_called(part, kind):
    """A model whose experts are read from disk one at a time depends on it."""
    experts, called = experts_of(), []
    hooked = experts.deepspeed_experts[1].get_submodule(part)
    getattr(hooked, f"register_{kind}")(lambda *_: called.append(1))
    rows, chosen = torch.randn(3, HIDDEN), torch.tensor([[1, 0], [1, 2], [1, 4]])
    weights = torch.rand(3, 2)
    torch.testing.assert_close(experts(rows, chosen, weights), experts_of()(rows, chosen, weights))
    assert called == [1]


def test_autocast_decides_the_type(monkeypatch):
    experts, rows, chosen = experts_of(), torch.randn(3, HIDDEN), torch.tensor([[1, 0], [1, 2], [1, 4]])
    true, seen = FeedForward.forward, []

    def noted(*arguments):
        out = true(*arguments)
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(FeedForward, "forward", noted)
    with torch.autocast("cpu", torch.bfloat16):
        experts(rows, chosen, torch.rand(3, 2))
    assert seen == [torch.bfloat16] * 4
    experts(rows, chosen, torch.rand(3, 2))
    assert len(seen) == 4, "without it, none is called"

"""On a GPU: products with the matrices of many languages at once against float32 on the CPU."""

from __future__ import annotations

import pytest
import torch
from support.products import context_of, one_after_another, places_of
from torch import Tensor

from lsmoe_ds.methods.products import Add, Matrices, Multiply
from lsmoe_ds.parallel import grouped

INPUTS, OUTPUTS, LENGTH = 64, 24, 5
RANKS = {"alike": [8] * 40, "odd": [3] * 40, "unlike": [4, 0, 12, 20] * 10}
LANGUAGES = {
    "sorted": [language for language in range(0, 40, 3) for _ in range(4)],
    "unsorted": [(7 * sentence) % 40 for sentence in range(90)],
    "single": [5, 5, 5],
}


@pytest.mark.parametrize("form", ["as it is trained", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("languages", LANGUAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_all_languages_at_once_agree_with_float32(device, ranks, languages, dtype, form, monkeypatch):
    if form == "blocks":
        monkeypatch.setattr(grouped, "is_grouped", lambda device, dtype: False)
    torch.manual_seed(1)
    places, chosen, columns = places_of(RANKS[ranks]), LANGUAGES[languages], slice(0, OUTPUTS)
    shapes = [(len(chosen) * LENGTH, INPUTS), (len(chosen) * LENGTH, OUTPUTS)]
    shapes += [(places[-1].stop, INPUTS), (places[-1].stop, OUTPUTS)]
    exact = [torch.randn(shape).to(dtype).float().requires_grad_() for shape in shapes]
    ours = [each.detach().to(device, dtype).requires_grad_() for each in exact]
    wanted = one_after_another(*exact, places, chosen, columns)
    x, y, down, up = ours
    matrices = Matrices(places, pads=True)
    groups = matrices.groups(context_of(chosen), "target", x)
    z = Multiply.apply(x[:, :OUTPUTS], down[:, :OUTPUTS], matrices, groups, columns)
    found = Add.apply(y.clone(), z, up, matrices, groups, columns)
    weights = torch.randn(wanted.shape).to(dtype)
    mine = results(found, ours, weights.to(device))
    for first, second in zip(mine, results(wanted, exact, weights.float()), strict=True):
        apart = (first.float().cpu() - second).norm() / second.norm().clamp(min=1e-6)
        assert apart < {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3}[dtype]


def results(out: Tensor, given: list[Tensor], weights: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad((out * weights).sum(), given, materialize_grads=True)
    return [out.detach(), *gradients]

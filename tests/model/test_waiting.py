"""How often a forward and backward pass would wait for a GPU, counted on the CPU.

What waits is what needs to know the content of a tensor: numbers made of tensors, copies to the host, and
results whose size depends on values.
"""

from unittest import mock

import pytest
import torch
from support.sameness import VOCABULARY, recipe_for, steps_of
from torch.overrides import TorchFunctionMode

from lsmoe_ds.model import recomputing
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

WAITING = {"tolist", "item", "cpu", "numpy", "nonzero", "argwhere", "bincount", "unique", "masked_select"}
WAITING |= {"__bool__", "__int__", "__float__", "__index__", "unique_consecutive", "equal"}


class Waits(TorchFunctionMode):
    """Keep the names of calls that would wait, those by a mask among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        index = arguments[1] if name in ("__getitem__", "__setitem__") else None
        masks = index if isinstance(index, tuple) else (index,)
        masked = any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in masks)
        if name in WAITING or masked:
            self.found.append(name)
        return function(*arguments, **(options or {}))


def waits(topology: Topology, routing: str, one_by_one: bool, again: bool = False) -> list[str]:
    """Return what waits in the first micro-batch's forward and backward pass, with activation checkpointing
    if layers are computed ``again``.

    Experts computed one by one wait for the numbers of their rows; the grouped product of a GPU does not.
    """
    from lsmoe_ds.moe import experts

    recipe = recipe_for(routing, topology.tensor, topology.expert, 0)
    recipe.training.activation_checkpointing = again
    model = Transformer(recipe, VOCABULARY, topology).train()
    initialize(model, 1, topology)
    batch = steps_of(recipe, topology.data_rank, topology.data)[0].batches[0]
    counts, found = experts.Assignment.counts, Waits()

    def recompute(layer, contexts, x):
        return recomputing.recompute(layer, [*contexts, found], x)  # autograd leaves all such modes

    with found, mock.patch("lsmoe_ds.model.transformer.recompute", recompute):
        if not one_by_one:

            def unseen(assignment: experts.Assignment) -> list[int]:
                before = len(found.found)
                numbers = counts(assignment)
                del found.found[before:]
                return numbers

            experts.Assignment.counts = unseen
        try:
            losses = model(*batch.inputs)
            losses.loss.backward()
        finally:
            experts.Assignment.counts = counts
    return found.found


LABELS, SIDES, LAYERS = 1, 2, 2  # of labels, of real tokens of each side; layers of experts


@pytest.mark.parametrize("routing", ["token", "target", "static"])
def test_a_pass_waits_for_real_tokens_once_a_side(pool, routing):
    ((found),) = pool.run(1, waits, routing, False)
    assert found == ["nonzero"] * (LABELS + SIDES)
    ((found),) = pool.run(1, waits, routing, True)
    assert sorted(found) == ["nonzero"] * (LABELS + SIDES) + ["tolist"] * LAYERS


@pytest.mark.parametrize("routing", ["token", "target", "static", "chunks"])
def test_a_layer_whose_experts_are_spread_waits_once(pool, routing):
    for found in pool.run(2, waits, routing, False, expert=2):
        assert sorted(found) == ["nonzero"] * (LABELS + SIDES) + ["tolist"] * LAYERS


@pytest.mark.parametrize("routing", ["token", "target", "static", "chunks"])
def test_a_layer_that_is_computed_again_waits_for_its_experts_alone(pool, routing):
    ((found),) = pool.run(1, waits, routing, False, True)
    assert found == ["nonzero"] * (LABELS + SIDES)
    for found in pool.run(2, waits, routing, False, True, expert=2):
        assert sorted(found) == ["nonzero"] * (LABELS + SIDES) + ["tolist"] * 2 * LAYERS


def test_what_waits_is_found():
    x = torch.arange(4)
    with Waits() as found:
        x[x > 1]
        x.nonzero()
        bool(x[0])
        float(x[1])
        x.tolist()
        torch.bincount(x)
        x[x]
        x.to("cpu")
    assert found.found == ["__getitem__", "nonzero", "__bool__", "__float__", "tolist", "bincount"]

"""Which low-rank matrices are pruned, and when: those that train, from when they do, up to the ratio."""

from __future__ import annotations

import pytest
import torch
from support.language_layers import recipe_of

from lsmoe_ds.checkpoint.stored import Stored
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.errors import UserError
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training import start_from


def test_a_pruned_model_goes_on_only_pruned(tmp_path):
    prune = {"ratio": 0.5, "epochs": 15}
    before = recipe_of(rank=2, index="target", prune=prune)
    stored = Stored("consolidated", tmp_path, tmp_path, before)
    with pytest.raises(UserError, match=r"its vertical matrices are pruned, .* of the same 'matrices'"):
        start_from._check_same_model(recipe_of(rank=2, index="target"), stored, 96, Tensors.of({}))
    both = recipe_of(rank=2, index="target", prune={**prune, "matrices": "both"})
    both.model.low_rank.check_takes_over(before.model.low_rank)
    with pytest.raises(UserError, match="its flat matrices"):
        before.model.low_rank.check_takes_over(both.model.low_rank)


@pytest.mark.parametrize("over", ["matrix", "layer", "language"])
def test_a_matrix_of_zeros_waits_until_it_is_trained(over):
    prune = {"ratio": 0.5, "start": 0, "length": 1, "over": over, "matrices": "both"}
    recipe = recipe_of(rank=2, index="source", prune=prune)
    model = Transformer(recipe, 96)
    initialize(model, 1, Topology.single())
    matrices = {name: value for name, value in model.named_parameters() if "_low_rank." in name}
    german = slice(0, 2)  # its rows

    def pruned(kind: str, rows: slice = slice(None)) -> float:
        masks = [model.get_buffer(f"{name}_mask")[rows] for name in matrices if name.endswith(kind)]
        return sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    (method,) = model.methods
    assert method.before_step(model, 1, 20)
    assert pruned("vertical") == pytest.approx(0.5, abs=0.01) and not pruned("flat"), "flat ones are 0 still"
    assert not method.before_step(model, 2, 20)
    with torch.no_grad():
        for name, value in matrices.items():
            if name.endswith("flat"):
                value[2:].normal_()
    assert method.before_step(model, 3, 20)
    assert not pruned("flat", german) and pruned("flat", slice(2, None)) == pytest.approx(0.5, abs=0.01)
    assert not method.before_step(model, 4, 20)
    with torch.no_grad():
        for name, value in matrices.items():
            if name.endswith("flat"):
                value[german].normal_()
    assert method.before_step(model, 5, 20)
    assert pruned("flat") == pytest.approx(0.5, abs=0.01) and pruned("flat", german)


def test_pruning_of_frozen_matrices_is_told():
    prune = {"ratio": 0.5, "epochs": 15}
    recipe = recipe_of(rank=2, index="learned", prune=prune)
    for trainable, told in ((["*_low_rank.index"], True), (["*.flat"], True), (["*_low_rank.*"], False)):
        changed = recipe.training.model_copy(update={"trainable": trainable})
        texts = list(recipe.model.low_rank.notices(recipe.model_copy(update={"training": changed})))
        assert [text.startswith("low_rank.prune prunes nothing") for text in texts] == [True] * told


def test_a_run_that_resumes_with_fewer_steps_is_pruned_to_its_ratio():
    """It may be past the epochs in which its ratio grows, as the new number of steps cuts them."""
    recipe = recipe_of(
        rank=2, index="source", prune={"ratio": 0.9, "start": 2, "length": 3, "epochs": 10, "over": "layer"}
    )
    model = Transformer(recipe, 96)
    initialize(model, 1, Topology.single())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("vertical"):
                parameter.normal_()
    for number in range(1, 11):
        model.methods[0].before_step(model, number, 40)

    def pruned() -> float:
        masks = [mask for name, mask in model.named_buffers() if name.endswith("vertical_mask")]
        return sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    assert 0 < pruned() < 0.8
    again = Transformer(recipe, 96)
    again.load_state_dict(model.state_dict())
    model = again  # another process
    changed = model.methods[0].before_step(model, 11, 20)
    assert changed and pruned() == pytest.approx(0.9, abs=0.01)
    before = {name: mask.clone() for name, mask in model.named_buffers()}
    assert not model.methods[0].before_step(model, 12, 20)
    model.methods[0].prune(0.9)
    assert all(torch.equal(mask, before[name]) for name, mask in model.named_buffers()), "again is the same"

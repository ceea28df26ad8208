"""LaSS against its definition in plain torch, and from fine-tuned models to a training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import starts
from support.language_layers import LANGUAGES, ids_of, same_gradients
from support.layouts import train as train_in
from support.starts import FOUR, FOUR_ZERO, ONE, changed, first_steps, recipe_from
from torch import nn

from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.export.grown import Likeness
from lsmoe_ds.inference.load import load
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.lass.method import MaskedWeight, largest
from lsmoe_ds.methods.sites import LinearSite
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training import start

root = starts.root  # fixture

INPUTS, OUTPUTS, LENGTH = 6, 5, 4
NUMBERS = [0, 3, 3, 5, 2, 0]
DIRECTIONS = len(LANGUAGES.directions)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_the_threshold_of_a_tensor(ratio):
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    count = round(ratio * 77)
    ordered = sorted(weight.abs().flatten().tolist())
    wanted = weight.abs() > ordered[count - 1] if count else torch.ones(7, 11, dtype=torch.bool)
    assert torch.equal(largest(weight, ratio), wanted)
    assert int(largest(weight, ratio).sum()) == 77 - count


def masked() -> tuple[nn.Linear, MaskedWeight]:
    torch.manual_seed(1)
    site = LinearSite("encoder", 0, "feed_forward", "expand", INPUTS, OUTPUTS, "column", None)
    module = MaskedWeight(site, DIRECTIONS, Topology.single())
    module.mask.copy_(torch.rand(module.mask.shape) < 0.4)
    return nn.Linear(INPUTS, OUTPUTS), module


@pytest.mark.parametrize("numbers", [NUMBERS, [4] * 3], ids=["mixed", "one"])
def test_a_linear_layer_with_masks_follows_the_equation(numbers):
    base, module = masked()
    ids, x = ids_of(numbers), torch.randn(len(numbers), LENGTH, INPUTS, requires_grad=True)

    def equation():
        rows = [F.linear(x[i], base.weight * module.mask[d], base.bias) for i, d in enumerate(numbers)]
        return torch.stack(rows)

    run = lambda: module(base, x, LanguageContext(ids))  # noqa: E731
    same_gradients(run, equation, [x, base.weight, base.bias])
    with torch.no_grad():
        for _ in range(2):  # the second time from what was kept, if there is one direction
            torch.testing.assert_close(run(), equation())
            base.weight.mul_(1.5)
            module.mask.logical_not_()


def test_a_packed_layer_keeps_the_weight_of_the_latest_direction_alone():
    base, module = masked()
    module.pack()
    x = torch.randn(2, LENGTH, INPUTS)
    with torch.no_grad():
        for number in (1, 4, 4, 1):
            wanted = F.linear(x, base.weight * module.mask[number], base.bias)
            torch.testing.assert_close(module(base, x, LanguageContext(ids_of([number] * 2))), wanted)


def test_a_loaded_model_is_packed_and_a_trained_one_is_not(trained):
    loaded = load(trained[0], "cpu")
    packed = [module for module in loaded.model.modules() if isinstance(module, MaskedWeight)]
    assert packed and all(module.is_packed for module in packed)
    made = Transformer(loaded.recipe, 140)
    assert not any(module.is_packed for module in made.modules() if isinstance(module, MaskedWeight))


def with_lass(root: Path, **section) -> Recipe:
    value = recipe_from(root).model_dump(mode="json", exclude_none=True)
    value["model"]["lass"] = {"tuned": root / "tuned", "ratio": 0.6, **section}
    return Recipe.model_validate(value)


@pytest.fixture(scope="module")
def trained(pool, root):
    """Fine-tune a model on each direction, and train with masks made from these models.

    Return the run, and what :func:`first_steps` returned.
    """
    recipe = recipe_from(root)
    for direction in recipe.data.directions:
        tuning = changed(recipe, training={"directions": [direction], "steps": 1})
        train_in(pool, tuning, root / "tuned" / direction, ONE[:4])
    lass = with_lass(root)
    start.check(lass, root / "lass")
    return root / "lass", pool.run(1, first_steps, lass, root / "lass")[0]


def test_masks_are_those_of_the_fine_tuned_models(root, trained):
    run, found = trained
    (_, said) = found["said"]
    assert said.startswith("lass: masks of 4 directions keep 39.9% of the weights") and "made in" in said
    stored = find_model(run)
    tensors = read_weights(stored).tensors
    masks = [name for name in tensors if name.endswith("_lass.mask")]
    assert len(masks) == 2 * 4 + 3 * 8 + 2 * (1 + 2), "attentions, and the feed-forwards without experts"
    for number, direction in enumerate(stored.recipe.languages.directions):
        tuned = read_weights(find_model(root / "tuned" / str(direction))).tensors
        for name in masks:
            weight = tuned[name.replace("_lass.mask", ".weight")]
            assert torch.equal(tensors[name][number], largest(weight, 0.6)), name
    assert not torch.equal(tensors[masks[0]][0], tensors[masks[0]][1])


@pytest.mark.parametrize("layout", [FOUR, FOUR_ZERO], ids=["stage 0", "stage 1"])
def test_every_layout_takes_the_same_steps(pool, root, trained, layout, tmp_path):
    tensor, expert, world, stage, _ = layout
    layers = {"parallel": {"tensor": tensor, "expert": expert}}
    recipe = changed(with_lass(root), **layers, deepspeed={"zero_optimization": {"stage": stage}})
    found = pool.run(world, first_steps, recipe, tmp_path / "run", tensor=tensor, expert=expert)
    assert found[0]["losses"] == pytest.approx(trained[1]["losses"], rel=1e-5)
    masks, wanted = (read_weights(find_model(each)).tensors for each in (tmp_path / "run", trained[0]))
    assert all(torch.equal(masks[name], wanted[name]) for name in wanted if name.endswith("_lass.mask"))


def test_the_sub_network_of_a_direction_has_masked_weights(trained, tmp_path):
    direction = Direction("fr", "en")
    record = convert(trained[0], "hybrid", direction, tmp_path / "hybrid", check=8)
    assert record["same_translations"] == 8 and record["largest_logit_difference"] <= 1e-4
    weight = read_weights(find_model(tmp_path / "hybrid")).tensors["encoder.0.attention.query.weight"]
    assert 0.55 < float((weight == 0).float().mean()) < 0.65


def test_a_folder_without_a_model_of_each_direction_is_refused(root, trained, tmp_path):
    with pytest.raises(UserError, match=r"'model\.lass\.tuned' is .*, which has no folder en-de"):
        start.check(with_lass(root, tuned=root / "model"), tmp_path / "run")
    value = with_lass(root).model_dump(mode="json", exclude_none=True)
    del value["training"]["start_from"]
    with pytest.raises(ValueError, match=r"there is no 'training\.start_from': give the model"):
        Recipe.model_validate(value)


def test_models_of_other_directions_or_sizes_are_refused(pool, root, trained, tmp_path):
    for direction in ("en-de", "de-en", "en-fr", "fr-en"):
        (tmp_path / "tuned" / direction).parent.mkdir(exist_ok=True)
        (tmp_path / "tuned" / direction).symlink_to(root / "tuned" / "en-de")
    with pytest.raises(UserError, match=r"tuned/de-en was trained on en-de, not on de-en alone"):
        start.check(with_lass(root, tuned=tmp_path / "tuned"), tmp_path / "run")
    (tmp_path / "tuned" / "en-de").unlink()
    (tmp_path / "tuned" / "en-de").symlink_to(root / "model")
    with pytest.raises(
        UserError, match=r"tuned/en-de has the weights of 'training\.start_from', .*/model: fine"
    ):
        start.check(with_lass(root, tuned=tmp_path / "tuned"), tmp_path / "run")
    # One model of all directions, which would give each the same masks.
    train_in(pool, changed(recipe_from(root), training={"steps": 1}), tmp_path / "all", ONE[:4])
    (tmp_path / "tuned" / "en-de").unlink()
    (tmp_path / "tuned" / "en-de").symlink_to(tmp_path / "all")
    with pytest.raises(UserError, match=r"tuned/en-de was trained on en-de, de-en, en-fr, fr-en, not on"):
        start.check(with_lass(root, tuned=tmp_path / "tuned"), tmp_path / "run")


def test_a_damaged_model_is_named(root, trained, tmp_path):
    """Also one whose damage only its checksum tells."""
    tuned = shutil.copytree(root / "tuned", tmp_path / "tuned")
    convert(root / "tuned" / "en-de", "consolidated", None, tmp_path / "whole", check=0)
    shutil.rmtree(tuned / "en-de")
    (tmp_path / "whole").rename(tuned / "en-de")
    file = tuned / "en-de" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 64
    file.write_bytes(content)
    methods = Transformer(with_lass(root, tuned=tuned), 140).methods
    (method,) = (each for each in methods if each.name == "lass")
    with pytest.raises(
        SharedError, match=r"'model\.lass\.tuned': .*tuned/en-de is damaged: .* sha256 differs"
    ):
        method.begin(None, lambda limit: [])


def test_models_that_were_not_fine_tuned_from_the_start_are_refused(pool, root, trained, tmp_path):
    """By the checksum that a run or folder has of the weights with which it began, if it has one."""
    said = "the training of .*tuned/en-de began with {} of 'training.start_from', .*: fine-tune that model"
    copied = shutil.copytree(root / "tuned", tmp_path / "tuned")
    start.check(with_lass(root, tuned=copied), tmp_path / "good")
    # Another base of the same shapes.
    other = changed(recipe_from(root), training={"directions": ["en-de"], "steps": 1})
    convert(root / "tuned" / "de-en", "consolidated", None, tmp_path / "start", check=0)
    other.training.start_from = tmp_path / "start"
    shutil.rmtree(copied / "en-de")
    start.check(other, copied / "en-de")  # notes the checksum
    train_in(pool, other, copied / "en-de", ONE[:4])
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(UserError, match=said.format("other weights than those")):
        start.check(with_lass(root, tuned=copied), tmp_path / "bad")
    convert(copied / "en-de", "consolidated", None, tmp_path / "whole", check=0)
    shutil.rmtree(copied / "en-de")
    (tmp_path / "whole").rename(copied / "en-de")
    with pytest.raises(UserError, match=said.format("other weights than those")):
        start.check(with_lass(root, tuned=copied), tmp_path / "bad")
    # No base at all.
    new = changed(recipe_from(root), training={"directions": ["en-de"], "steps": 1, "start_from": None})
    shutil.rmtree(copied / "en-de")
    train_in(pool, new, copied / "en-de", ONE[:4])
    with pytest.raises(UserError, match=said.format("new weights, not those")):
        start.check(with_lass(root, tuned=copied), tmp_path / "bad")


def test_a_training_may_start_from_sub_networks_of_the_same_ratio_alone(root, trained, tmp_path):
    convert(trained[0], "consolidated", None, tmp_path / "start", check=0)
    again = changed(with_lass(root), training={"start_from": str(tmp_path / "start")})
    value = again.model_dump(mode="json", exclude_none=True)
    value["model"]["lass"] = {"tuned": "gone", "ratio": 0.6}
    start.check(Recipe.model_validate(value), tmp_path / "run")
    value["model"]["lass"]["ratio"] = 0.9
    with pytest.raises(UserError, match=r"'model\.lass\.ratio' is 0\.9, but .* has learned with 0\.6"):
        start.check(Recipe.model_validate(value), tmp_path / "other")


def test_new_directions_of_a_grown_model_take_the_sub_network_of_their_target(trained, tmp_path):
    more = ["data.languages=[de, fr, en]", "data.directions=all"]
    convert(trained[0], "grown", None, tmp_path / "grown", check=0, overrides=more)
    old, new = find_model(trained[0]), find_model(tmp_path / "grown")
    before, after = read_weights(old).tensors, read_weights(new).tensors
    name = "encoder.0.attention.query_lass.mask"
    one, other = (
        stored.recipe.languages.direction_id(direction)
        for stored, direction in ((new, Direction("fr", "de")), (old, Direction("en", "de")))
    )
    assert torch.equal(after[name][one], before[name][other])


def test_a_new_language_takes_the_sub_networks_of_the_one_that_is_named(trained, tmp_path):
    more = ["data.languages=[de, fr, en, nl]"]
    convert(trained[0], "grown", None, tmp_path / "grown", 0, overrides=more, like=Likeness(language="fr"))
    old, new = find_model(trained[0]), find_model(tmp_path / "grown")
    before, after = read_weights(old).tensors, read_weights(new).tensors
    name = "encoder.0.attention.query_lass.mask"
    for direction, like in (("en-nl", "en-fr"), ("nl-en", "fr-en")):
        one = new.recipe.languages.direction_id(Direction.parse(direction))
        other = old.recipe.languages.direction_id(Direction.parse(like))
        assert torch.equal(after[name][one], before[name][other]), direction

"""A training begins with the weights of a converted folder, in every layout, and forgets the folder once it
has a checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import starts
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe, make_run
from support.starts import FOUR, FOUR_BF16, FOUR_ZERO, ONE, changed, first_steps, recipe_from, short_recipe

from lsmoe_ds.checkpoint.stored import find_model, read_weights, write_folder
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.training import start

one, root = starts.one, starts.root  # fixtures


LAYOUTS = [
    ONE,
    (1, 1, 1, 1, True),
    FOUR,
    (2, 2, 4, 0, True),
    FOUR_ZERO,
    FOUR_BF16,
    (1, 2, 2, 2, False),
    (2, 1, 2, 2, True),
]


def whole(root: Path) -> dict[str, torch.Tensor]:
    return dict(read_weights(find_model(root / "model")).tensors)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_every_rank_begins_with_its_part(pool, root, one, layout, tmp_path):
    tensor, expert, world, _, bf16 = layout
    found = pool.run(
        world, first_steps, recipe_from(root, layout), tmp_path / "run", tensor=tensor, expert=expert
    )
    wanted, seen, copied = whole(root), set(), {}
    for rank, kept in enumerate(found):
        parts = {}
        for name, (values, dimension) in kept["weights"].items():
            parts[name] = (
                wanted[name] if dimension is None else wanted[name].chunk(tensor, dimension)[rank % tensor]
            )
            same = parts[name].bfloat16().float() if bf16 else parts[name]
            assert np.array_equal(values, same.numpy()), name
            seen.add(name)
        for name, begin, values in kept["copies"]:  # what the optimizer steps is never rounded
            assert np.array_equal(values, parts[name].reshape(-1)[begin : begin + len(values)].numpy()), name
            copied[name] = True
        assert not kept["moved"]
    assert seen == copied.keys() == wanted.keys()
    assert found[0]["said"][0] == f"starting from {root / 'model'}"
    if not bf16:  # the second and third step are of the copies
        assert found[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)


def test_the_first_loss_is_the_models(pool, root, one, tmp_path):
    random_weights = changed(recipe_from(root), training={"start_from": None})
    before = pool.run(1, first_steps, random_weights, tmp_path / "run")[0]
    assert before["losses"][0] != one["losses"][0] and before["said"] == []
    again = pool.run(1, first_steps, recipe_from(root), tmp_path / "again")[0]
    assert again["losses"] == one["losses"]  # to the bit


def test_going_on_needs_the_folder_no_more(pool, root, tmp_path):
    shutil.copytree(root / "model", tmp_path / "model")
    recipe = changed(recipe_from(root), training={"start_from": tmp_path / "model", "steps": 2})
    start.check(recipe, tmp_path / "run")
    pool.run(1, first_steps, recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "model")
    longer = changed(recipe, training={"steps": 3})
    start.check(longer, tmp_path / "run")
    going_on = pool.run(1, first_steps, longer, tmp_path / "run")[0]
    assert len(going_on["losses"]) == 1 and going_on["said"][0].startswith("resuming from")
    with pytest.raises(
        UserError, match=r"was started with training.start_from .*model, the recipe now has none"
    ):
        start.check(changed(longer, training={"start_from": None}), tmp_path / "run")


def test_the_recipe_of_a_run_finds_its_own_vocabulary_if_the_first_is_gone(root, tmp_path):
    shutil.copytree(root / "model", tmp_path / "model")
    vocabulary = {"size": 140, "file": str(tmp_path / "model" / "vocabulary.model")}
    recipe = changed(recipe_from(root), data={"vocabulary": vocabulary}, training={"steps": 2})
    start.check(recipe, tmp_path / "run")
    stored = tmp_path / "run" / "recipe.yaml"
    assert load_recipe(stored).data.vocabulary.file == tmp_path / "model" / "vocabulary.model"
    shutil.rmtree(tmp_path / "model")
    shutil.copy(stored, tmp_path / "other.yaml")
    assert load_recipe(tmp_path / "other.yaml").data.vocabulary.file == recipe.data.vocabulary.file
    found = load_recipe(stored)
    assert found.data.vocabulary.file == tmp_path / "run" / "vocabulary.model"
    start.check(found, tmp_path / "run")


def other_vocabulary(root: Path, recipe: Recipe) -> Recipe:
    return changed(recipe, data={"directory": root / "other", "vocabulary": {"size": 140, "type": "bpe"}})


def narrower(root: Path, recipe: Recipe) -> Recipe:
    return changed(recipe, model={"encoder": {"layers": 2, "feed_forward": 16, "moe": TOKEN_TOP2}})


def without_experts(root: Path, recipe: Recipe) -> Recipe:
    return changed(recipe, model={"encoder": {"layers": 2, "feed_forward": 24}})


def fewer_languages(root: Path, recipe: Recipe) -> Recipe:
    stored = root / "model" / "vocabulary.model"
    directions = {
        "languages": ["de"],
        "directions": ["de-en", "en-de"],
        "vocabulary": {"file": stored, "size": 140},
    }
    return changed(recipe, data={"directory": root / "fewer", **directions})


def from_folder(name: str):
    return lambda root, recipe: changed(recipe, training={"start_from": root / name})


def damaged(root: Path, recipe: Recipe) -> Recipe:
    shutil.copytree(root / "model", root / "damaged")
    content = bytearray((root / "damaged" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (root / "damaged" / "model.safetensors").write_bytes(content)
    return from_folder("damaged")(root, recipe)


def exported(root: Path, recipe: Recipe) -> Recipe:
    made = make_recipe(root, None, None)
    record = {"kind": "ctranslate2", "step": 0}
    write_folder(root / "exported", {"x": torch.zeros(1)}, made, root / "model" / "vocabulary.model", record)
    return from_folder("exported")(root, recipe)


def foreign(root: Path, recipe: Recipe) -> Recipe:
    (root / "foreign").mkdir()
    (root / "foreign" / "config.json").write_text("{}")
    return from_folder("foreign")(root, recipe)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            other_vocabulary,
            (
                r"vocabulary is not the prepared one: set data.vocabulary.file to .*model/vocabulary.model"
                r" and prepare again"
            ),
        ),
        (narrower, r"encoder.0.feed_forward.contract.weight should be \(16, 16\), found \(16, 24\)"),
        (without_experts, r"encoder.1.feed_forward.* found None"),
        (
            fewer_languages,
            "layers of the model know its directions, and the recipe lacks en-fr, fr-en: give the",
        ),
        (
            from_folder("trained"),
            "trained is a run: `lsmoe convert .*trained --as consolidated --out DIR` makes a folder",
        ),
        (from_folder("none"), "there is no folder .*none"),
        (from_folder("data"), "data is neither a run folder"),
        (damaged, "damaged is damaged: .*sha256 differs"),
        (
            exported,
            (
                "exported is made by `lsmoe convert --as ctranslate2`: give a folder made with --as "
                "consolidated, hy"
            ),
        ),
        (
            foreign,
            (
                "foreign is neither .* it is one of Hugging Face, of which `lsmoe convert .*foreign --as "
                "consolidated"
            ),
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_started(root, tmp_path, change, says):
    recipe = change(root, recipe_from(root))
    prepare(recipe)
    with pytest.raises(UserError, match=f"^'training.start_from' is .*{says}") as error:
        start.check(recipe, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["dense", "huggingface"])
def test_a_folder_of_one_direction(pool, root, tmp_path, kind):
    run, _ = make_run(pool, tmp_path, None, TARGET_TOP2)
    convert(run, kind, Direction("en", "de"), tmp_path / kind, check=0)
    stored = find_model(tmp_path / kind)
    training = {"start_from": tmp_path / kind, "steps": 1}
    data = {"vocabulary": {"size": 140, "file": stored.vocabulary}}
    recipe = changed(
        stored.recipe, training=training, data=data, deepspeed={"zero_optimization": {"stage": 0}}
    )
    recipe = recipe.model_copy(update={"name": "dense"})
    prepare(recipe)
    start.check(recipe, tmp_path / "begun")
    found = pool.run(1, first_steps, recipe, tmp_path / "begun")[0]["weights"]
    wanted = read_weights(stored).tensors
    assert found.keys() == wanted.keys() and all(
        np.array_equal(found[name][0], wanted[name].numpy()) for name in found
    )


def test_model_and_vocabulary_default_to_the_folders(root, tmp_path):
    recipe = load_recipe(short_recipe(root, tmp_path / "short.yaml"))
    assert recipe.model == find_model(root / "model").recipe.model
    assert (recipe.data.vocabulary.file, recipe.data.vocabulary.size) == (
        root / "model" / "vocabulary.model",
        140,
    )
    assert recipe.data.vocabulary.type == "unigram"
    prepare(recipe)
    start.check(recipe, tmp_path / "run")
    again = load_recipe(tmp_path / "run" / "recipe.yaml")  # says all by itself
    assert again == recipe
    by_override = short_recipe(root, tmp_path / "override.yaml", training={"start_from": None})
    assert load_recipe(by_override, [f"training.start_from={root / 'model'}"]) == recipe


def test_tags_default_to_the_folders(root, tmp_path, capfd):
    shutil.copytree(root / "model", tmp_path / "base")
    stored = load_recipe(tmp_path / "base" / "recipe.yaml", ["data.tags=source-target"])
    (tmp_path / "base" / "recipe.yaml").write_text(stored.to_yaml())
    file = short_recipe(root, tmp_path / "short.yaml", training={"start_from": str(tmp_path / "base")})
    inherited, other = load_recipe(file), load_recipe(file, ["data.tags=target"])
    assert (inherited.data.tags, other.data.tags) == ("source-target", "target")
    start._notice(inherited)
    assert "data.tags" not in capfd.readouterr().err
    start._notice(other)
    assert "data.tags is target, but the model in" in capfd.readouterr().err


def test_what_the_recipe_says_is_not_replaced(root, tmp_path):
    given = yaml.safe_load(recipe_from(root).to_yaml())["model"]
    given["encoder"]["feed_forward"] = 16
    other = load_recipe(short_recipe(root, tmp_path / "other.yaml", model=given))
    prepare(other)
    with pytest.raises(
        UserError, match=r"encoder.0.feed_forward.contract.weight should be \(16, 16\), found \(16, 24\)"
    ):
        start.check(other, tmp_path / "run")
    larger = load_recipe(
        short_recipe(root, tmp_path / "larger.yaml"),
        ["data.vocabulary.size=150", f"data.directory={tmp_path}"],
    )
    with pytest.raises(
        UserError,
        match=r"'data.vocabulary.size' is 150, but .*model/vocabulary.model has 140 pieces: set it to 140",
    ):
        prepare(larger)
    file = short_recipe(root, tmp_path / "none.yaml", training={"start_from": str(tmp_path / "none")})
    with pytest.raises(
        UserError, match=r"'training.start_from' is .*none: there is no .*none/recipe.yaml: give a folder"
    ):
        load_recipe(file)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"it is one of Hugging Face, of which `lsmoe convert .*none --as consolidated"
    ):
        load_recipe(file)


def test_a_warmup_beyond_the_last_step_is_said_once_with_the_rate_it_ends_at(root, capfd):
    start._notice(changed(recipe_from(root), training={"steps": 4, "warmup": 5, "learning_rate": 0.01}))
    assert (
        capfd.readouterr().err
        == "lsmoe: training.warmup is 5, more than the 4 training.steps: the learning rate rises to 8.00e-03 "
        "and never reaches training.learning_rate, 1.00e-02\n"
    )
    start._notice(changed(recipe_from(root), training={"steps": 5, "warmup": 5}))
    assert capfd.readouterr().err == ""


def test_a_frozen_base_of_random_weights_is_said(root, capfd):
    recipe = recipe_from(root)
    start._notice(changed(recipe, training={"trainable": ["encoder.*"], "start_from": None}))
    assert "there is no training.start_from: they stay as random as they begin" in capfd.readouterr().err
    start._notice(changed(recipe, training={"trainable": ["encoder.*"], "start_from": root / "model"}))
    assert capfd.readouterr().err == ""

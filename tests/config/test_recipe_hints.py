"""A known reason why a recipe is wrong is said with the way out: keys with another name now, and patterns
without quotes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.recipe_text import GOOD, STEPS

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.errors import UserError


def test_all_renamed_keys_are_told_at_once_and_how_to_mend_what_lsmoe_ds_wrote(tmp_path):
    old = GOOD.replace(STEPS, "{steps: 4, patience: 9, typo: 2, clip: 1}")
    keys = [
        "'training.patience' is now called 'training.hang_timeout'",
        "line 8: 'training.clip' is now called 'training.max_grad_norm'",
    ]

    def refusal(path: Path, *overrides: str) -> list[str]:
        with pytest.raises(UserError) as told:
            load_recipe(path, overrides)
        return str(told.value).split("; ")

    (tmp_path / "recipe.yaml").write_text(old)
    stored = tmp_path / "recipe.yaml"
    assert refusal(stored) == [f"{stored}, line 8: {keys[0]}", keys[1]]
    (tmp_path / "vocabulary.model").touch()
    by_hand = f"{stored} is the recipe of a run: rename them there by hand, and the run resumes"
    assert refusal(stored) == [f"{stored}, line 8: {keys[0]}", keys[1], by_hand]
    (tmp_path / "provenance.json").write_text("{}")
    assert refusal(stored)[2] == f"{tmp_path} was converted by an earlier version: convert its model again"
    (tmp_path / "provenance.json").unlink()
    (tmp_path / "recipe.yaml").write_text(GOOD)
    assert refusal(stored, "training.clip=1") == [
        "'--set training.clip=1': 'training.clip' is now called 'training.max_grad_norm'"
    ]


def test_a_renamed_key_in_the_model_to_start_from_is_told_with_its_own_file(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    moe = "{layers: 2, feed_forward: 64, moe: {experts: 2, balance: 0.1}}"
    (folder / "recipe.yaml").write_text(GOOD.replace("{layers: 2, feed_forward: 64}", moe))
    (tmp_path / "r.yaml").write_text(
        f"name: x\ndata: {{corpora: [a], languages: [de]}}\ntraining: {{steps: 4, start_from: {folder}}}\n"
    )
    with pytest.raises(UserError) as told:
        load_recipe(tmp_path / "r.yaml")
    of = [
        f"'model.{side}.moe.balance' is now called 'model.{side}.moe.balance_loss_weight'"
        for side in ("encoder", "decoder")
    ]
    assert str(told.value) == f"{folder / 'recipe.yaml'}, line 6: {of[0]}; line 7: {of[1]}"


@pytest.mark.parametrize(
    ("trainable", "word"),
    [
        ("[*_low_rank.*]", "*_low_rank.*"),
        ('["x", *_norm.[bw]*, y]', "*_norm.[bw]*"),
        ("[*all]", "*all"),
        ("*_low_rank.*", "*_low_rank.*"),
        ("[decoder.[01].*]", "decoder.[01].*"),
    ],
)
def test_patterns_without_quotes(tmp_path, trainable, word):
    what = "begins with *, by which YAML means an alias"
    if word[0] != "*":
        what = "has brackets, by which YAML means a list"
    (tmp_path / "r.yaml").write_text(GOOD.replace(STEPS, f"\n  steps: 4\n  trainable: {trainable}\n"))
    with pytest.raises(UserError) as told:
        load_recipe(tmp_path / "r.yaml")
    said = f"{word} {what}: write '{word}' in quotes"
    assert str(told.value) == f"recipe {tmp_path / 'r.yaml'} is not valid YAML: line 10: {said}"
    (tmp_path / "r.yaml").write_text(GOOD)
    option = f"training.trainable={trainable}"
    with pytest.raises(UserError) as told:
        load_recipe(tmp_path / "r.yaml", [option])
    assert str(told.value) == f"'--set {option}': '{trainable}' is not a YAML value: {said}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "data.directions=al",
            "'directions' is 'al' (did you mean 'all'?): write all, or a list, as in [en-de]",
        ),
        ("model.neurons.like=en-de", "'model.neurons.like' should be a mapping from names to texts"),
        ("data.directions=en-de", "should be a list of texts, found 'en-de': write [en-de]"),
        ("model.low_rank={rank: 2, index: {sources: [all]}}", "found 'sources' (did you mean 'source'?)"),
        (
            "model.low_rank={rank: {high: 2, verylow: 8}, index: source}",
            "'verylow' is no group (did you mean 'very_low'?), and no language code",
        ),
        (
            "model.low_rank={rank: 2, at: [encoder.2]}",
            "no linear layer is at 'encoder.2' of the model, which has 2 and 2 layers, counted from 0",
        ),
    ],
)
def test_what_was_meant_is_proposed(tmp_path, override, said):
    (tmp_path / "r.yaml").write_text(GOOD)
    with pytest.raises(UserError) as told:
        load_recipe(tmp_path / "r.yaml", [override])
    assert said in str(told.value)


def test_a_run_folder_in_the_place_of_its_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=f"recipe {tmp_path} is a folder: give {tmp_path}/recipe.yaml"):
        load_recipe(tmp_path)


def test_the_option_that_is_cited_beside_a_place_is_another(tmp_path):
    (tmp_path / "r.yaml").write_text(GOOD)
    options = ["model.low_rank.rank=2", "model.low_rank.at=[encoder.9]"]
    with pytest.raises(UserError) as told:
        load_recipe(tmp_path / "r.yaml", options)
    assert str(told.value).startswith(f"'--set {options[0]}' with '--set {options[1]}': 'model.low_rank': ")

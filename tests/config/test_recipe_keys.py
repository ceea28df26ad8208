"""Each key of a recipe refuses a value of another kind in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
import yaml
from support.recipe_text import GOOD

from lsmoe_ds.config.explain import _annotation, _items, _members, allowed_keys
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.section import is_section
from lsmoe_ds.errors import UserError


def fields(annotation: Any = Recipe, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of every section, with its annotation; items of lists count from 0."""
    section = is_section(annotation)
    for key, field in section.model_fields.items() if section else ():
        yield f"{at}{key}", field.annotation
        yield from fields(field.annotation, f"{at}{key}.")
        for inner in _items(field.annotation):
            yield from fields(inner, f"{at}{key}.0.")


WRONG: dict[str, Any] = {
    "yes": True,
    "[[]]": [[]],
    "{a: [1]}": {"a": [1]},
    "1999-12-31": None,
    "0.5": 0.5,
    "x y": "x y",
    "-7": -7,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_key_refuses_or_takes_a_value_of_another_kind_in_plain_words(tmp_path, wrong):
    """Whatever the key, no word of the library that validates reaches the person."""
    value = yaml.safe_load(GOOD)
    value["model"] |= {"low_rank": {"rank": 2, "prune": {"ratio": 0.5, "epochs": 15}}, "clsr": {}}
    value["model"] |= {"neurons": {}, "adapters": {}, "lass": {"tuned": "none", "at": "attention"}}
    value["training"] |= {"validate_every": 5, "early_stopping": {"patience": 3}}
    value["training"] |= {"optimizer": "adafactor", "adafactor": {}, "teacher": {"model": "none"}}
    value["deepspeed"] = "ds_configs/zero0.json"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "recipe.yaml").write_text(GOOD)
    value["training"]["start_from"] = str(tmp_path / "base")
    value["model"]["encoder"]["moe"] = value["model"]["decoder"]["moe"] = {"experts": 4, "capacity": {}}
    value["model"]["encoder"]["layers"] = 3  # low-rank matrices need a layer without experts
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(value))
    refused = 0
    for key, annotation in fields():
        if ".0." in key:
            continue  # an item of a list cannot be set alone
        of_adam = ["training.optimizer=adam", "training.adafactor=null"]
        try:
            load_recipe(tmp_path / "r.yaml", [*of_adam * ("training.adam." in key), f"{key}={wrong}"])
        except UserError as error:
            refused += 1
            said = str(error)
            assert f"'--set {key}={wrong}'" in said and key.split(".")[-1] in said.partition(": ")[2], said
            assert "\n" not in said and len(said) <= 600, said
            assert not re.search(
                r"[Ii]nput should|constrained|valid (string|integer|number)|pydantic|input_type|function-",
                said,
            ), said
        else:
            kinds = [get_origin(member) or member for member in _members(annotation)]
            assert wrong != "yes" or bool in kinds, f"{key} takes yes"
    assert refused > 50


def test_the_keys_of_every_place_are_known():
    assert allowed_keys(("data", "corpora", "0"), Recipe) == [
        "path",
        "format",
        "source",
        "target",
        "train",
    ]
    assert (
        "top_k" in allowed_keys(("model", "encoder", "moe"), Recipe) and allowed_keys(("name",), Recipe) == []
    )
    assert get_args(_annotation(("data", "corpora", "0", "format"), Recipe))[0] == "opus100"

"""The defaults of a recipe are those that docs/recipe.md states."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from support import PROJECT

from lsmoe_ds.config.moe import Capacity, MoE
from lsmoe_ds.config.optimizer import Adafactor, Adam
from lsmoe_ds.config.recipe import EarlyStopping, Ema, Recipe, Teacher
from lsmoe_ds.config.section import is_section
from lsmoe_ds.methods.adapters.settings import Adapters
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.methods.lass.settings import Lass
from lsmoe_ds.methods.low_rank.pruning import Pruning
from lsmoe_ds.methods.low_rank.settings import LowRank
from lsmoe_ds.methods.neurons.settings import Neurons

SHORT = {
    "moe": MoE,
    "capacity": Capacity,
    "low_rank": LowRank,
    "prune": Pruning,
    "clsr": Clsr,
    "neurons": Neurons,
    "lass": Lass,
    "adapters": Adapters,
    "early_stopping": EarlyStopping,
    "teacher": Teacher,
    "ema": Ema,
    "adam": Adam,
    "adafactor": Adafactor,
}  # sections that the page names by their own name
IN_WORDS = {"required", "by preset", "all three", ""}


def documented() -> Iterator[tuple[str, str]]:
    """Yield each key of the page's table and its default, as they are written."""
    for line in (PROJECT / "docs" / "recipe.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 3 or not cells[0].startswith("`"):
            continue
        keys = re.findall(r"`([\w.]+)`", cells[0])
        section = keys[0].rpartition(".")[0]
        keys = [key if "." in key or not section else f"{section}.{key}" for key in keys]
        defaults = cells[1].split(", ") if len(keys) > 1 and ", " in cells[1] else [cells[1]] * len(keys)
        yield from zip(keys, defaults, strict=True)


def field_of(key: str) -> Any:
    section: type[BaseModel] = Recipe
    *path, last = key.split(".")
    for name in path:
        section = SHORT[name] if name in SHORT else is_section(section.model_fields[name].annotation)
    return section.model_fields[last]


PHRASE = re.compile(r"[^`] `|` [^`]")
STATED = [each for each in documented() if each[1] not in IN_WORDS and not PHRASE.search(each[1])]


def test_most_keys_state_a_default():
    assert len(STATED) > 50
    assert {"training.warmup", "moe.balance_loss_weight", "clsr.budget", "capacity.training"} <= dict(
        STATED
    ).keys()


@pytest.mark.parametrize(("key", "default"), STATED, ids=[key for key, _ in STATED])
def test_a_default_is_the_documented_one(key, default):
    text = default.strip("`")
    value = None if text == "none" else text if default.startswith("`") else yaml.safe_load(text)
    found = field_of(key).get_default(call_default_factory=True)
    if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value):
        value = float(value)  # YAML 1.1 takes 5e-4 for text
    assert (str(found) if isinstance(value, str) else found) == value

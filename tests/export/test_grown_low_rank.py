"""Low-rank matrices in a grown model: those of languages that were there stay bit by bit, masks included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversions import EN_DE, FR_EN, LINES, whole_model
from support.small_run import make_run

from lsmoe_ds.checkpoint.tensors import Tensors, open_tensors
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import load
from lsmoe_ds.methods.low_rank.bank import rows_of

RANKS = {"de": 1, "en": 4, "fr": 2}
MORE = ["data.languages=[cs,de,fr,nl]", "model.low_rank.rank.cs=3", "model.low_rank.rank.nl=0"]
KINDS: dict[str, dict[str, Any]] = {
    "source": {"index": "source"},
    "target": {"index": "target", "columns": 12},
    "learned": {"index": "learned", "zero": "vertical"},
    "by layer": {"index": {"learned": ["encoder"], "target": ["decoder"]}},
}
PRUNED = {"ratio": 0.5, "epochs": 10, "matrices": "both"}


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory) -> Path:
    return make_run(pool, tmp_path_factory.mktemp("grown_low_rank"), None, None)[0]


def rows(recipe: Recipe) -> dict[str, slice]:
    assert recipe.model.low_rank is not None
    found = rows_of(recipe.model.low_rank, recipe.languages)
    return dict(zip(recipe.languages.codes, found, strict=True))


def of_languages(folder: Path) -> tuple[Tensors, dict[str, slice], list[str]]:
    """Return a consolidated folder's tensors, each language's rows, and which tensors have such rows."""
    tensors = open_tensors(folder)
    names = [name for name in tensors if "_low_rank." in name and not name.endswith(".index")]
    return tensors, rows(load_recipe(folder / "recipe.yaml")), names


@pytest.mark.parametrize(
    "prune", [None, PRUNED, PRUNED | {"languages": ["en", "fr"]}], ids=["", "pruned", "some"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_languages_that_were_there_keep_their_matrices(run, tmp_path, kind, prune):
    low_rank = {"rank": RANKS, "at": "all", **KINDS[kind]} | ({"prune": prune} if prune else {})
    whole = whole_model(run, low_rank, tmp_path / "whole")
    convert(whole, "grown", None, tmp_path / "grown", check=0, overrides=MORE)
    old, before, names = of_languages(whole)
    new, after, grown_names = of_languages(tmp_path / "grown")
    assert set(names) == set(grown_names) and after.keys() - before.keys() == {"cs", "nl"}
    assert any(name.endswith("_mask") for name in names) == bool(prune)
    zero = low_rank.get("zero", "flat")
    for name in names:
        assert new[name].dtype == old[name].dtype
        for code in before:
            assert torch.equal(new[name][after[code]], old[name][before[code]]), (name, code)
        drawn = new[name][after["cs"]]
        assert len(drawn) == 3 and len(new[name][after["nl"]]) == 0
        if name.endswith("_mask"):
            assert drawn.all(), "nothing of a new language is pruned"
        else:
            assert bool(drawn.any()) == (not name.endswith(zero)), "it adds nothing at first"
    for name in old.keys() - set(names) - {"embedding.tokens.weight"}:
        assert torch.equal(old[name], new[name]), "the base, and the weights of learned indexes"
    ours, grown = load(whole, "cpu"), load(tmp_path / "grown", "cpu")
    for direction in (EN_DE, FR_EN):
        found = compare(ours, grown, direction, LINES)
        assert found.same == found.sentences and found.largest_logit_difference <= 1e-5


def test_a_new_language_needs_a_rank(run, tmp_path):
    whole = whole_model(run, {"rank": RANKS, "index": "target"}, tmp_path / "whole")
    with pytest.raises(UserError, match=r"'low_rank.rank' lacks cs: it must have each of cs, de, en, fr"):
        convert(whole, "grown", None, tmp_path / "out", check=0, overrides=["data.languages=[cs,de,fr]"])


def test_a_new_language_joins_a_group(run, tmp_path):
    low_rank = {"rank": {"high": 1, "low": 3}, "index": "learned", "at": "all"}
    groups = {"high": ["en"], "low": ["de", "fr"]}
    whole = whole_model(run, low_rank, tmp_path / "whole", groups=groups)
    more = ["data.languages=[cs,de,fr]"]
    with pytest.raises(UserError, match="'groups' lacks cs"):
        convert(whole, "grown", None, tmp_path / "grown", check=0, overrides=more)
    more.append("data.groups.low=[cs,de,fr]")
    convert(whole, "grown", None, tmp_path / "grown", check=0, overrides=more)
    (old, before, names), (new, after, _) = of_languages(whole), of_languages(tmp_path / "grown")
    assert after["cs"].stop - after["cs"].start == 3
    assert all(
        torch.equal(new[name][after[code]], old[name][before[code]]) for name in names for code in before
    )


def test_the_grown_model_has_adapters_of_its_own(run, tmp_path):
    """Adapters of languages that were there are the same files, so that a new language adds one folder."""
    whole = whole_model(run, {"rank": RANKS, "index": "target", "at": "all"}, tmp_path / "whole")
    convert(whole, "grown", None, tmp_path / "grown", check=0, overrides=MORE)
    for name in ("whole", "grown"):
        convert(tmp_path / name, "peft", None, tmp_path / f"{name}-peft", check=0)
    weights = "adapter_model.safetensors"
    for code in RANKS:
        files = [tmp_path / f"{name}-peft" / code / weights for name in ("whole", "grown")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "grown-peft" / "cs" / weights).exists()

"""Directions that were never trained, between languages that were: what translates them is cut out, too."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.commands import main
from support.small_run import PAIR_TOP1, TARGET_TOP2, TOKEN_TOP2, make_recipe, make_run

from lsmoe_ds.checkpoint.stored import Weights
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.inference.load import Loaded, build_model, load
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names, named_state
from lsmoe_ds.parallel.topology import Topology

DE_FR = Direction("de", "fr")
MODELS = {
    "target": {"encoder": {"moe": TARGET_TOP2}, "decoder": {"moe": TARGET_TOP2}},
    "source and target": {
        "encoder": {"moe": TARGET_TOP2 | {"task": "source"}},
        "decoder": {"moe": TARGET_TOP2},
    },
    "low rank by pair": {"low_rank": {"rank": 2, "index": "pair"}},
    "low rank, learned": {"low_rank": {"rank": {"de": 1, "en": 2, "fr": 3}, "index": "learned"}},
    "neurons": {"neurons": {"random": 0.5}, "low_rank": {"rank": 2, "index": "pair"}},
    "adapters by language": {"adapters": {"width": 4, "by": "language"}},
}


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("zero"), TARGET_TOP2, TARGET_TOP2, 2, expert=2)[0]


def global_weights(model: Transformer) -> dict[str, torch.Tensor]:
    names = global_names(model, Topology.single())
    return {names[name]: value.detach() for name, value in named_state(model)}


def drawn(run, model: dict) -> Loaded:
    """Return a model with normal random weights of standard deviation 0.4, and random masks."""
    value = make_recipe(run.parent, None, None).model_dump(mode="json")
    for name, section in model.items():
        value["model"][name] = (
            {**value["model"][name], **section} if name in ("encoder", "decoder") else section
        )
    recipe, base = Recipe.model_validate(value), load(run, "cpu")
    made = Transformer(recipe, base.vocabulary.size).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.4, generator=generator)
        for name, buffer in made.named_buffers():
            if name.endswith("mask"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) < 0.5)
    return replace(base, model=made, recipe=recipe, languages=recipe.languages)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_translates_it_is_cut_out(run, model):
    whole = drawn(run, model)
    assert DE_FR not in whole.languages.directions
    weights, recipe = extract(global_weights(whole.model), whole.recipe, DE_FR)
    assert recipe.languages.directions == (DE_FR,) and not recipe.model.methods
    dense = build_model(recipe, whole.vocabulary.size, Weights(weights, 0, {}), torch.device("cpu"))
    other = replace(whole, model=dense, recipe=recipe, languages=recipe.languages, kind="dense")
    found = compare(whole, other, DE_FR, ["ba de fi", "ko la mi nobu", "tabi gosi kale"])
    assert found.same == found.sentences == 3 and found.largest_logit_difference < 1e-4


def test_a_part_of_each_pair_is_refused(run):
    whole = drawn(run, {"encoder": {"moe": PAIR_TOP1}})
    with pytest.raises(UserError, match="it was never trained, and layers choose their"):
        extract(global_weights(whole.model), whole.recipe, DE_FR)
    adapted = drawn(run, {"adapters": {"width": 4, "by": "pair"}})
    with pytest.raises(UserError, match="de-fr was never trained"):
        extract(global_weights(adapted.model), adapted.recipe, DE_FR)


@pytest.mark.parametrize("kind", ["dense", "huggingface", "ctranslate2"])
def test_the_command(run, tmp_path, capfd, kind):
    out = tmp_path / kind
    options = ["--as", kind, "--direction", "de-fr", "--check", "4", "--json"]
    assert main(["convert", str(run), *options, "--out", str(out)]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["same_translations"] == record["sentences"] == 4 and record["direction"] == "de-fr"
    card = (out / "README.md").read_text()
    assert "not trained (zero-shot)" in card and "de-fr" in card


def test_it_is_refused_where_a_model_is_of_one_direction(run, tmp_path, capsys):
    dense = tmp_path / "en-de"
    assert main(["convert", str(run), "--as", "dense", "--direction", "en-de", "--out", str(dense)]) == 0
    capsys.readouterr()
    options = ["--as", "huggingface", "--direction", "de-fr", "--out", str(tmp_path / "out")]
    assert main(["convert", str(dense), *options]) == 2
    assert "language 'fr' is not in this system" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_experts_that_it_uses_are_not_measured_without_text(pool, tmp_path, capsys):
    run = make_run(pool, tmp_path, TOKEN_TOP2, TARGET_TOP2, 1)[0]
    options = ["--as", "hybrid", "--direction", "fr-de", "--out", str(tmp_path / "out")]
    assert main(["convert", str(run), *options, "--check", "2"]) == 0
    assert "the model was not trained on fr-de (zero-shot)" in capsys.readouterr().err
    assert main(["convert", str(run), *options, "--keep", "2"]) == 2
    assert "there is no prepared text for fr-de" in capsys.readouterr().err

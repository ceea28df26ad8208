"""Low-rank matrices folded into dense weights: what the routed model computes by either route, exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.conversions import EN_DE, FR_EN, LINES, dense_of, global_weights, make_banked_run, with_banks
from support.small_run import PAIR_TOP1, TARGET_TOP2, TOKEN_TOP2, make_recipe
from torch import nn
from typer.testing import CliRunner

from lsmoe_ds.cli import app
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import check_convertible, extract
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

PAIR, LANGUAGE = {"rank": 3}, {"rank": 3, "index": "language"}
RANKS = {"rank": {"de": 1, "en": 4, "fr": 2}, "index": "language", "at": "both"}
FUSED = {"rank": 3, "at": "both", "fuse_distillation": True}
FUSED_RANKS = RANKS | {"fuse_distillation": True}
PAIR_EVERY_2 = PAIR_TOP1 | {"every": 2}


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    """Trained on both routes by two tensor-parallel processes."""
    return make_banked_run(pool, tmp_path_factory.mktemp("low_rank"), FUSED, 2, tensor=2)[0]


def random_loaded(run, low_rank, encoder=None, decoder=None, route="specific") -> Loaded:
    """Return a model with the run's vocabulary whose low-rank matrices change its output much."""
    recipe = with_banks(make_recipe(run.parent, encoder, decoder), low_rank)
    base = load(run, "cpu")
    model = Transformer(recipe, base.vocabulary.size)
    initialize(model, 7, Topology.single())
    for name, parameter in model.named_parameters():
        if "_low_rank." in name or name.endswith("bias") or ".router." in name:
            nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(len(name)))
    return replace(base, model=model.eval(), recipe=recipe, route=route)


def assert_same(sparse: Loaded, dense: Loaded, direction: Direction) -> None:
    found = compare(sparse, dense, direction, LINES)
    assert found.sentences == found.same >= len(LINES)
    assert 0 < found.largest_logit_difference <= 1e-4


@pytest.mark.parametrize(
    ("low_rank", "encoder", "decoder"),
    [
        (PAIR, None, None),
        (LANGUAGE, None, None),
        (RANKS, None, None),
        (PAIR | {"at": "both"}, TARGET_TOP2, PAIR_EVERY_2),
        (FUSED_RANKS | {"at": "attention", "every": 2}, PAIR_TOP1, None),
    ],
    ids=["pair", "language", "ranks", "pair and experts", "attention and experts"],
)
@pytest.mark.parametrize("direction", [EN_DE, FR_EN])
def test_the_specific_route_of_a_direction(run, low_rank, encoder, decoder, direction):
    sparse = random_loaded(run, low_rank, encoder, decoder)
    dense = dense_of(sparse, direction)
    assert dense.recipe.data.directions == [str(direction)]
    assert_same(sparse, dense, direction)
    # The comparison can fail: another direction's matrices are other ones.
    other = replace(dense, model=dense_of(sparse, Direction("en", "fr")).model) if not encoder else None
    assert other is None or compare(sparse, other, direction, LINES).largest_logit_difference > 1e-2


@pytest.mark.parametrize("low_rank", [FUSED, FUSED_RANKS], ids=["pair", "ranks"])
def test_the_shared_route_serves_all_directions(run, low_rank):
    sparse = random_loaded(run, low_rank, route="shared")
    dense = dense_of(sparse, None)
    assert dense.languages == sparse.languages
    for direction in sparse.languages.directions:
        assert_same(sparse, dense, direction)
    assert compare(replace(sparse, route="specific"), dense, EN_DE, LINES).largest_logit_difference > 1e-2
    named, _ = extract(global_weights(sparse.model), sparse.recipe, EN_DE, "shared")
    assert all(torch.equal(value, dense.model.get_parameter(name)) for name, value in named.items())


def test_the_shared_route_beside_experts_is_of_one_direction(run):
    sparse = random_loaded(run, FUSED, TARGET_TOP2, PAIR_EVERY_2, route="shared")
    dense = dense_of(sparse, FR_EN)
    assert dense.recipe.data.directions == ["fr-en"]
    assert_same(sparse, dense, FR_EN)


def test_a_run_of_tensor_parallel_processes_to_folders_that_translate(run, tmp_path):
    shared, specific = tmp_path / "shared", tmp_path / "en-de"
    record = convert(run, "dense", None, shared, check=8, route="shared")
    assert record == json.loads((run / "conversion.json").read_text())
    assert (record["direction"], record["route"]) == ("all", "shared")
    assert record["same_translations"] == record["sentences"] == 8  # two of each direction
    assert 0 < record["largest_logit_difference"] <= 1e-4
    provenance = json.loads((shared / "provenance.json").read_text())
    assert (provenance["direction"], provenance["route"]) == ("all", "shared")
    assert load_recipe(shared / "recipe.yaml").languages == load_recipe(run / "recipe.yaml").languages
    record = convert(run, "dense", EN_DE, specific, check=8)
    assert (record["direction"], record["route"], record["same_translations"]) == ("en-de", "specific", 8)
    assert record["dense_parameters"] == load(shared, "cpu").parameters < record["sparse_parameters"]
    for direction in (EN_DE, FR_EN):
        wanted = list(translate(load(run, "cpu", "shared"), direction, LINES))
        assert list(translate(load(shared, "cpu"), direction, LINES)) == wanted
    assert list(translate(load(specific, "cpu"), EN_DE, LINES)) == list(
        translate(load(run, "cpu"), EN_DE, LINES)
    )


@pytest.mark.parametrize(
    ("low_rank", "decoder", "direction", "route", "message"),
    [
        (PAIR, None, EN_DE, "shared", "fuse_distillation"),
        (None, None, None, "shared", "fuse_distillation"),
        (FUSED, None, EN_DE, "shred", "'shred' is no route"),
        (FUSED, None, None, "specific", "the specific route needs a direction"),
        (FUSED, TARGET_TOP2, None, "shared", "experts of its own"),
        (FUSED, TOKEN_TOP2, None, "shared", "the decoder routes by token in layer 2"),
    ],
)
def test_routes_that_make_no_sense(run, low_rank, decoder, direction, route, message):
    recipe = with_banks(make_recipe(run.parent, None, decoder), low_rank)
    with pytest.raises(UserError, match=message):
        check_convertible(recipe, direction, route)


def test_gates_that_choose_by_token_have_no_dense_equal(run):
    recipe = make_recipe(run.parent, None, None)
    gated = recipe.model_copy(update={"model": recipe.model.model_copy(update={"clsr": Clsr()})})
    with pytest.raises(UserError, match="the gates of "):
        check_convertible(gated, EN_DE)


def test_the_command_wants_both_languages_or_none(run, tmp_path):
    arguments = [
        "convert",
        str(run),
        "--as",
        "dense",
        "--out",
        str(tmp_path / "out"),
        "--route",
        "shared",
        "--check",
        "0",
    ]
    found = CliRunner().invoke(app, [*arguments, "--from", "en"])
    assert isinstance(found.exception, UserError) and "both or neither" in str(found.exception)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert load(tmp_path / "out").recipe.model.low_rank is None

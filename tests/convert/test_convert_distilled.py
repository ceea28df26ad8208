"""Feed-forwards distilled from experts: each route of the trained model, and the dense models of either,
compute the same.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.conversions import EN_DE, FR_EN, LINES, dense_of, global_weights, random_loaded
from support.sameness import whole
from support.small_run import PAIR_TOP1, TARGET_TOP2, TOKEN_TOP2, make_recipe, make_run

from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import check_convertible, extract
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.planning.costs import Parts
from lsmoe_ds.planning.memory import local_parameters

FUSE = {"fuse_distillation": True}
# Of the paper: a feed-forward for each language in every layer, the source's in the encoder and the target's
# in the decoder.
LANGUAGES = {"routing": "static", "experts": 3, "every": 1, "top_k": 1} | FUSE
BY_SOURCE, BY_TARGET = LANGUAGES | {"task": "source"}, LANGUAGES | {"task": "target"}
SENTENCE_TOP2 = TOKEN_TOP2 | {"routing": "sentence"}


@pytest.fixture(scope="module")
def made(pool, tmp_path_factory):
    """Trained by two processes, tensor-parallel, the experts spread over them; and the weights of each."""
    encoder, decoder = PAIR_TOP1 | FUSE, TOKEN_TOP2 | FUSE
    return make_run(pool, tmp_path_factory.mktemp("distilled"), encoder, decoder, 2, tensor=2, expert=2)


@pytest.fixture(scope="module")
def run(made):
    return made[0]


def assert_same(sparse: Loaded, dense: Loaded, direction: Direction) -> None:
    found = compare(sparse, dense, direction, LINES)
    assert found.sentences == found.same >= len(LINES)
    assert found.largest_logit_difference <= 1e-4


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        (BY_SOURCE, BY_TARGET),
        (TOKEN_TOP2 | FUSE, TOKEN_TOP2 | FUSE),
        (None, SENTENCE_TOP2 | FUSE),
        (SENTENCE_TOP2 | FUSE, BY_TARGET),
    ],
    ids=["languages", "token", "one side", "sentence"],
)
def test_the_shared_route_serves_all_directions(run, encoder, decoder):
    sparse = replace(random_loaded(run, encoder, decoder), route="shared")
    dense = dense_of(sparse, None)
    assert dense.languages == sparse.languages
    assert dense.recipe.model.decoder.feed_forward == sparse.recipe.model.decoder.feed_forward
    for direction in sparse.languages.directions:
        assert_same(sparse, dense, direction)
    assert compare(replace(sparse, route="specific"), dense, EN_DE, LINES).largest_logit_difference > 1e-2
    named, _ = extract(global_weights(sparse.model), sparse.recipe, EN_DE, "shared")
    assert all(torch.equal(value, dense.model.get_parameter(name)) for name, value in named.items())


@pytest.mark.parametrize(("encoder", "decoder"), [(BY_SOURCE, BY_TARGET), (TARGET_TOP2, PAIR_TOP1 | FUSE)])
@pytest.mark.parametrize("direction", [EN_DE, FR_EN])
def test_the_specific_route_of_a_direction(run, encoder, decoder, direction):
    sparse = random_loaded(run, encoder, decoder)
    dense = dense_of(sparse, direction)
    assert dense.recipe.data.directions == [str(direction)]
    assert_same(sparse, dense, direction)
    assert compare(replace(sparse, route="shared"), dense, direction, LINES).largest_logit_difference > 1e-2


def test_the_shared_route_beside_experts_that_are_not_distilled_is_of_one_direction(run):
    sparse = replace(random_loaded(run, TOKEN_TOP2 | FUSE, TARGET_TOP2), route="shared")
    dense = dense_of(sparse, FR_EN)
    assert dense.recipe.data.directions == ["fr-en"]
    assert_same(sparse, dense, FR_EN)


def test_a_checkpoint_is_the_whole_model_and_as_large_as_planned(made):
    run, ranks = made
    wanted, found = (
        whole([(rank,) for rank in ranks], 2, 0),
        read_checkpoint(run / "checkpoints" / "step-2").weights,
    )
    assert found.keys() == wanted.keys() and sum(".feed_forward.shared." in name for name in found) == 4 * 3
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    count = Parts.of(load(run, "cpu").recipe).whole
    for rank in ranks:
        assert sum(value.size for value, _ in rank.values()) == sum(local_parameters(count, 2, 2))


def test_a_run_to_one_folder_that_translates_all_directions(run, tmp_path):
    record = convert(run, "dense", None, tmp_path / "all", check=8, route="shared")
    assert (record["direction"], record["route"]) == ("all", "shared")
    assert record["same_translations"] == record["sentences"] == 8  # two of each direction
    assert record["largest_logit_difference"] <= 1e-4
    for direction in (EN_DE, FR_EN):
        wanted = list(translate(load(run, "cpu", "shared"), direction, LINES))
        assert list(translate(load(tmp_path / "all", "cpu"), direction, LINES)) == wanted


@pytest.mark.parametrize(
    ("encoder", "decoder", "direction", "route", "message"),
    [
        (TOKEN_TOP2 | FUSE, BY_TARGET, EN_DE, "specific", "the encoder routes by token in layer 2"),
        (TOKEN_TOP2 | FUSE, TOKEN_TOP2, None, "shared", "the decoder routes by token in layer 2"),
        (TOKEN_TOP2 | FUSE, TARGET_TOP2, None, "shared", "experts of its own"),
        (BY_SOURCE, BY_TARGET, None, "specific", "no dense model serves all directions"),
        (TARGET_TOP2, TARGET_TOP2, EN_DE, "shared", "no parameters for the route 'shared'"),
    ],
)
def test_routes_that_make_no_sense(run, encoder, decoder, direction, route, message):
    with pytest.raises(UserError, match=message):
        check_convertible(make_recipe(run.parent, encoder, decoder), direction, route)

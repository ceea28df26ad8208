"""A plan's figures against models that are really built, extracted, partitioned and trained."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from support.plans import (
    PAPERS,
    SIDES,
    VOCABULARY,
    flops_by_torch,
    recipe_of,
    sizes,
    step_traffic,
    traffic,
)

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.moe.costs import Rows, bytes_per_row, rows_at_home, rows_at_random
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.arithmetic import flops
from lsmoe_ds.planning.plan import in_bytes, plan


@pytest.mark.parametrize("sides", [*SIDES, None])
def test_parameters_are_those_of_a_built_model(sides):
    recipe = recipe_of(*sides) if sides else load_recipe(PAPERS / "wmt-base-32.yaml")
    with torch.device("meta"):
        model = Transformer(recipe, recipe.data.vocabulary.size)
    assert plan(recipe).parameters.to_dict() == sizes(model.named_parameters())


@pytest.mark.parametrize("routing", ["target", "source", "pair", "static"])
def test_one_direction_served_is_what_is_extracted(routing):
    recipe = recipe_of(routing, "target")
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    names = global_names(model, Topology.single())
    weights = {names[name]: parameter.detach() for name, parameter in model.named_parameters()}
    dense, changed = extract(weights, recipe, Direction("en", "de"))
    assert plan(recipe).serving.to_dict() == sizes(dense.items()) == plan(changed).parameters.to_dict()


@pytest.mark.parametrize("routing", ["dense", "token", "sentence"])
def test_a_side_that_chooses_when_it_is_there_is_served_whole(routing):
    planned = plan(recipe_of(routing, "pair"))
    assert planned.serving.encoder == planned.parameters.encoder
    assert planned.serving.decoder.total < planned.parameters.decoder.total


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks", "groups"),
    [(8, 2, 4, 1), (8, 3, 2, 1), (8, 2, 8, 2), (12, 2, 3, 2), (4, 1, 1, 1)],
)
def test_rows_that_leave_counted_one_by_one(experts, top_k, ranks, groups):
    away = []
    for own, group in itertools.product(range(ranks), range(groups)):
        members = [expert for expert in range(experts) if expert * groups // experts == group]
        for chosen in itertools.combinations(members, top_k):
            away.append(len({expert * ranks // experts for expert in chosen} - {own}))
    assert rows_at_random(experts, top_k, ranks, groups) == pytest.approx(sum(away) / len(away))


def moe(**settings) -> MoE:
    return MoE.model_validate({"experts": 8, "routing": "task", **settings})


def test_rows_at_home():
    affine = moe(expert_groups=4)
    assert rows_at_home(affine, affine, 4, 1) == rows_at_home(affine, affine, 2, 1) == Rows(0)
    assert rows_at_home(moe(expert_groups=4, routing="static"), affine, 4, 1) == Rows(0)
    for other in (moe(expert_groups=2), moe(expert_groups=4, task="source"), moe(routing="token")):
        assert rows_at_home(other, affine, 4, 1) is None
    assert rows_at_home(affine, affine, 8, 1) is None  # a task's experts live on two ranks
    assert rows_at_home(affine, affine, 2, 2) == Rows(0.5)  # of two tensor-parallel peers one holds them
    assert rows_at_home(affine, affine, 4, 2) == Rows(0.5)
    assert rows_at_home(affine, None, 4, 1) is None


def test_bytes_per_row():
    assert bytes_per_row(512, 2, 4, training=False) == 2 * 512 * 4 + 2 * 2 * 4
    assert bytes_per_row(512, 2, 2, training=True) == 4 * 512 * 2 + 3 * 2 * 4


@pytest.mark.parametrize("again", [False, True], ids=["", "activation checkpointing"])
@pytest.mark.parametrize("routing", ["token", "sentence", "pair", "static"])
def test_bytes_are_those_that_travel(pool, routing, again):
    recipe = recipe_of(routing, routing, expert=2)
    recipe.training.activation_checkpointing = again
    planned = {each.side: each for each in plan(recipe).exchanges}
    sides = [side for side, _, _ in recipe.model.moe_layers()]
    # What a rank sends back is what it got, so bytes follow from rows over all ranks, not on each.
    for side, ranks in zip(sides, zip(*pool.run(2, traffic, recipe, expert=2), strict=True), strict=True):
        rows, sent = map(sum, zip(*ranks, strict=True))
        forward = 1 + again
        assert sent == rows / forward * planned[side].row_bytes + forward * 2 * planned[side].count_bytes
        assert rows


@pytest.mark.parametrize("routing", ["token", "target"])
def test_choices_of_several_micro_batches_are_counted_ahead(pool, routing):
    recipe = recipe_of(routing, routing, expert=2, stage=0)
    recipe.data.batch.count = 4  # as steps_of has them
    (rows, sent), _ = pool.run(2, step_traffic, recipe, expert=2)
    training, inference = bytes_per_row(16, 2, 4, True), bytes_per_row(16, 2, 4, False)
    counts = 4 * 3 * 16  # micro-batches x layers x bytes
    if routing == "token":
        assert sent == rows / 2 * (training + inference) + 2 * counts
    else:
        assert sent == rows * training + counts


def test_bytes_of_a_step():
    recipe = recipe_of("target", "target", expert=2, expert_groups=2)
    planned = plan(recipe)
    row = bytes_per_row(16, 2, 4, True)
    counts = 8 * 3 * 16  # micro-batches x layers x bytes
    assert [each.rows.all for each in planned.exchanges] == [0.5, 0.5]  # a task's experts are here or there
    assert (
        planned.step_bytes == 64 * 8 * 2 * 0.5 * row + counts
    )  # all tokens in the decoder, which has two of the layers
    assert planned.step_bytes_home == counts
    assert plan(recipe_of("token", "token", expert=2)).step_bytes_home is None
    choosing = recipe_of("token", "token", expert=2)
    rows = 2 * rows_at_random(4, 2, 2, 1)  # of a token, through two layers
    assert plan(choosing, 8).step_bytes == round(64 * 8 * rows * row) + counts
    inference = bytes_per_row(16, 2, 4, False)
    assert (
        plan(choosing, 4).step_bytes == round(64 * 8 * rows * (row + inference)) + 2 * counts
    )  # choices are counted ahead
    alone = plan(recipe_of("token", "token"))
    assert (alone.exchanges, alone.step_bytes) == ([], 0)


@pytest.mark.parametrize(("encoder", "decoder"), [*SIDES, ("sentence", "token")])
def test_flops_are_those_that_torch_counts(encoder, decoder):
    recipe, length = recipe_of(encoder, decoder), 5
    found = flops(recipe, length)
    # 2 E H of a sentence router are spread over the sentence's tokens, which rounds.
    assert 3 * length * (found.source + found.target) == pytest.approx(
        flops_by_torch(recipe, length), abs=3 * length * 2
    )


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (0, "a world of 0 ranks"),
        (3, "parallel.expert is 4, which does not divide the 3 processes"),
        (16, "data.batch.count is 8, which 16 data-parallel ranks cannot share evenly"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(world, message):
    with pytest.raises(UserError, match=message):
        plan(recipe_of("token", "token", expert=4), world)


def test_stage_and_precision_are_the_recipes():
    assert (
        plan(recipe_of("dense", "dense", stage=2)).stage,
        plan(recipe_of("dense", "dense", stage=2), 2).stage,
    ) == (0, 2)
    half = plan(recipe_of("dense", "dense", stage=2, bf16=True))
    assert (half.stage, half.precision) == (2, "bfloat16")
    zero = plan(recipe_of("dense", "dense", stage=0, bf16=True), 2)
    assert (zero.stage, zero.precision) == (1, "bfloat16"), "what the engine trains at"
    assert [(each.precision, each.stage) for each in zero.memory] == [
        *(("float32", stage) for stage in (0, 1, 2)),
        *(("bfloat16", stage) for stage in (1, 2)),
    ]


def test_plan_of_thirteen_billion_needs_no_torch(tmp_path):
    code = (
        "import sys; from lsmoe_ds.planning.plan import plan; from lsmoe_ds.config.file import load_recipe; "
        "made = plan(load_recipe(sys.argv[1])); made.table(); "
        "print(made.parameters.whole.total, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(PAPERS / "web-big-128.yaml")]
    total, torch_is_there = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.split()
    assert int(total) > 13e9
    assert torch_is_there == "False"


def test_tables_and_json_say_the_same(capsys):
    planned = plan(recipe_of("target", "target", expert=2, expert_groups=2, stage=2), 4)
    value = json.loads(json.dumps(planned.to_dict()))
    assert value["parameters"]["total"] == planned.parameters.whole.total
    assert value["layout"] == {"world": 4, "tensor": 1, "expert": 2, "node": 1, "data": 4}
    assert value["flops"]["source_training"] == planned.flops.source_training > 2 * planned.flops.source
    assert value["memory"][4]["total"] == planned.memory[4].total
    Console(width=160).print(planned.table())
    shown = capsys.readouterr().out
    assert "float32 ZeRO 2 <- recipe" in shown
    assert in_bytes(planned.memory[2].total) in shown
    assert "needs data.batch.languages: task-affine" in shown
    Console(width=160).print(plan(recipe_of("dense", "dense")).table())
    assert "expert parallelism" not in capsys.readouterr().out

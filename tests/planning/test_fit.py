"""Layouts that fit into given GPUs: which there are, their times by hand, the recipe, bad input."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner, Result

from lsmoe_ds.cli import app
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.planning.arithmetic import flops
from lsmoe_ds.planning.devices import DEVICES, Device
from lsmoe_ds.planning.fit import find_fits, table_of
from lsmoe_ds.planning.memory import memory
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.planning.times import VALUE, Cluster, estimate, hidden

SMALL = Device(memory=2e9, memory_rate=1e11, link_rate=1e10, half=1e12, single=1e11)
BIG = "recipes/papers/web-big-128.yaml"


def cluster(gpus: int, node: int = 2, **changes: float) -> Cluster:
    return Cluster(gpus, node, replace(SMALL, **changes), network_rate=1e9, efficiency=0.5)


def run_plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def base() -> list[str]:
    """Return the changes that make the paper's recipe a model of a few millions."""
    sizes = ["model.preset=null", "model.hidden=64", "model.heads=4", "data.vocabulary.size=1000"]
    sides = [
        f"model.{side}={{layers: 2, feed_forward: 128, moe: {{experts: 4, every: 2, routing: token}}}}"
        for side in ("encoder", "decoder")
    ]
    batch = ["data.batch={tokens: 1024, count: 4, max_length: 64}", "parallel.expert=1"]
    adam = ["training.optimizer=adam", "deepspeed=ds_configs/bf16_zero1.json"]
    return [*sizes, *sides, *batch, *adam]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(BIG, base())


def test_all_layouts_are_there_and_hold_the_step(recipe):
    found = find_fits(recipe, cluster(4))
    layouts = {(each.recipe.parallel.tensor, each.recipe.parallel.expert) for each in found}
    assert layouts == {(t, r) for t in (1, 2) for r in (1, 2, 4)}, "tensor stays within a node of 2"
    assert {each.memory.stage for each in found} == {1, 2}, "in bfloat16 Adam does not train at stage 0"
    assert all(each.recipe.data.batch.tokens * each.recipe.data.batch.count == 4096 for each in found)
    assert all(each.accumulation == 1 for each in found)
    assert [each.times.step for each in found] == sorted(each.times.step for each in found)


def test_less_memory_takes_smaller_micro_batches():
    """And no layer is computed again where they cost nothing."""
    recipe = load_recipe(BIG, [*base(), "training.auxiliary_over=micro-batch"])
    largest = {each.memory.gpu_peak for each in find_fits(recipe, cluster(2))}
    found = find_fits(recipe, cluster(2, memory=min(largest) * 0.995 / 0.95))
    assert found and all(each.accumulation > 1 for each in found)
    assert not any(each.recipe.training.activation_checkpointing for each in found)
    assert all(each.memory.gpu_peak <= min(largest) for each in found)
    for each in found:
        assert each.recipe.data.batch.count == 2 // each.recipe.parallel.tensor * each.accumulation


def test_times_are_those_of_a_count_by_hand(recipe):
    """Four ranks in two machines, experts over all: tokens to two of the three other ranks leave."""
    changed = load_recipe(
        BIG,
        [*base(), "parallel={tensor: 2, expert: 4}", "data.batch={tokens: 2048, count: 2, max_length: 64}"],
    )
    times = estimate(changed, cluster(4))
    made, work = plan(changed, 4), flops(changed)
    step, hidden = 4096, 64
    assert times.compute == pytest.approx(
        step / 2 * (work.source_training + work.target_training) / 4 / (1e12 * 0.5)
    )
    sent = step / 2 * sum(each.token_bytes() for each in made.exchanges) / 4
    assert times.dispatch == pytest.approx(sent * (2 / 3 / 1e9 + 1 / 3 / 1e10))
    # encoder: 2 attentions, 1 dense feed-forward; decoder: 4 and 1; forward and backward, of 2 ranks each
    summed = 2 * 8 * (2 * 1 / 2) * step / 2 / 2 * hidden * 2
    assert times.tensor == pytest.approx(summed / 1e10)
    whole = made.parameters.whole
    dense, experts = whole.split // 2 + whole.whole, whole.expert // 4
    assert times.gradients == pytest.approx(2 * 2 * dense * (1 / 2) / 1e9), "experts have no replica"
    stepped = dense / 2 + experts
    assert times.optimizer == pytest.approx(30 * stepped / 1e11)


def finish(chunks: int, there: float, compute: float) -> float:
    """Return when the last chunk is back, if one exchange follows another as fast as it can."""
    link = chunks * there  # all leave first
    computed = 0.0
    for chunk in range(chunks):
        computed = max(computed, (chunk + 1) * there) + compute
        link = max(link, computed) + there
    return link


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("compute", [0.0, 0.3, 1.0, 1.3, 4.0])
def test_the_hidden_part_is_what_a_schedule_of_chunks_saves(chunks, compute):
    serial = chunks * (2 * 1.0 + compute)
    saved = hidden(chunks * 2 * 1.0, chunks * compute, chunks)
    assert serial - saved == pytest.approx(finish(chunks, 1.0, compute))


# How fast a GPU computes, and whether that makes experts' computation longer than half of their exchange.
@pytest.mark.parametrize(("half", "hides"), [(1e11, True), (1e13, False)])
def test_chunks_hide_the_exchange_behind_the_experts(half, hides):
    layout = [*base(), "parallel.expert=4", "data.batch={tokens: 1024, count: 4, max_length: 64}"]
    chunks = [f"model.{side}.moe.chunks=2" for side in ("encoder", "decoder")]
    given = cluster(4, half=half)
    recipe = load_recipe(BIG, layout + chunks)
    whole, cut = estimate(load_recipe(BIG, layout), given), estimate(recipe, given)
    of_experts = 4096 / 2 * 2 * (2 * 2 * 2 * 64 * 128) * 3 / 4 / (half * 0.5)  # of both sides, in training
    saved = whole.dispatch / 2 if hides else of_experts
    assert whole.dispatch - cut.dispatch == pytest.approx(saved)
    values = 2 * (2 * 64 * 128 + 64 + 128)  # of a layer on each side, one of four experts on a rank
    assert cut.compute - whole.compute == pytest.approx(values * VALUE * 6 / 1e11)
    waiting = memory(recipe, 4, 1, "bfloat16").activations
    assert waiting - memory(load_recipe(BIG, layout), 4, 1, "bfloat16").activations == VALUE * values // 2


def test_chunks_are_proposed_where_they_save_a_twentieth_of_a_step(recipe):
    """On a slow network the exchange is most of a step; on a fast one it is nothing."""
    for rate, proposed in ((1e7, {2}), (1e12, {1})):
        found = find_fits(recipe, replace(cluster(4, half=1e10), network_rate=rate))
        spread = [each for each in found if each.recipe.parallel.expert == 4]
        assert spread and {n for each in spread for n in each.chunks.values()} == proposed
        assert all(n == 1 for each in found if each.recipe.parallel.expert == 1 for n in each.chunks.values())
        assert ("chunks" in {each.header for each in table_of(found, cluster(4)).columns}) == (2 in proposed)
    asked = load_recipe(BIG, [*base(), *(f"model.{side}.moe.chunks=3" for side in ("encoder", "decoder"))])
    assert all(set(each.chunks.values()) == {3} for each in find_fits(asked, cluster(4)))
    asked = load_recipe(BIG, [*base(), "model.decoder.moe.chunks=3"])
    whole = cluster(4, node=4)
    columns = {each.header: list(each.cells) for each in table_of(find_fits(asked, whole), whole).columns}
    rows = list(zip(columns["parallel.expert"], columns["chunks"], strict=True))
    assert {("1", "-"), ("4", "1 / 3")} <= set(rows)
    assert all((ranks == "1") == (n == "-") for ranks, n in rows)


def test_forwarding_within_machines_is_proposed_where_it_saves_a_twentieth_of_a_step():
    """It does on a slow network, if the experts of a task are on one machine."""
    routing = "{experts: 4, every: 2, routing: task, task: pair, expert_groups: 2, replicas: []}"
    sides = [f"model.{side}.moe={routing}" for side in ("encoder", "decoder")]
    recipe = load_recipe(BIG, [*base(), *sides])
    for rate, node in ((1e7, 2), (1e12, 1)):
        given = replace(cluster(4), network_rate=rate)
        found = find_fits(recipe, given)
        assert {each.recipe.parallel.node for each in found if each.recipe.parallel.expert == 4} == {node}
        assert {each.recipe.parallel.node for each in found if each.recipe.parallel.expert < 4} == {1}
        assert ("parallel.node" in {each.header for each in table_of(found, given).columns}) == (node == 2)
        assert all(each.to_dict()["node"] == each.recipe.parallel.node for each in found)
    one = replace(cluster(4, node=4), network_rate=1e7)
    assert {each.recipe.parallel.node for each in find_fits(recipe, one)} == {1}, "of one machine"


# Batches of the fewest tokens that sentences allow: on one rank each they cannot be cut.
UNCUT = "data.batch={tokens: 512, count: 4, max_length: 256}"


def test_a_layout_that_does_not_fit_is_tried_with_activation_checkpointing():
    small = load_recipe(BIG, [*base(), UNCUT])
    given = replace(cluster(4, node=1), network_rate=1e12)  # on which chunks, which need memory, save nothing
    largest = find_fits(small, given)
    assert largest and not any(each.recipe.training.activation_checkpointing for each in largest)
    needs = {(each.recipe.parallel.expert, each.memory.stage): each.memory for each in largest}
    limit = min(each.memory.gpu_peak for each in largest) - 1
    found = find_fits(small, replace(given, device=replace(SMALL, memory=limit / 0.95)))
    assert found and all(each.recipe.training.activation_checkpointing for each in found)
    for each in found:
        without = needs[each.recipe.parallel.expert, each.memory.stage]
        assert each.memory.activations < without.activations and each.memory.gpu_peak <= limit
        assert each.to_dict()["activation_checkpointing"]
    for fits, said in ((largest, {"no"}), (found, {"yes"})):
        (column,) = (each for each in table_of(fits, given).columns if each.header == "checkpointing")
        assert set(column.cells) == said


def test_layers_that_are_computed_again_take_time():
    sizes = "data.batch={tokens: 2048, count: 2, max_length: 64}"
    layout = [*base(), "parallel={tensor: 2, expert: 4}", sizes]
    without, again = (
        estimate(load_recipe(BIG, [*layout, f"training.activation_checkpointing={each}"]), cluster(4))
        for each in ("false", "true")
    )
    work = flops(load_recipe(BIG, layout))
    output = 2 * 64 * 1000  # is not computed again
    cross = 2 * 2 * 2 * 64 * 64  # nor are two layers' keys and values of the source
    more = 4096 / 2 * (work.source + work.target - output - cross) / 4 / (1e12 * 0.5)
    assert again.compute - without.compute == pytest.approx(more)
    assert again.tensor == pytest.approx(1.5 * without.tensor)
    assert 1.4 * without.dispatch < again.dispatch < 1.6 * without.dispatch
    assert (again.gradients, again.optimizer) == (without.gradients, without.optimizer)


def test_a_recipe_that_has_activation_checkpointing_keeps_it():
    asked = load_recipe(BIG, [*base(), "training.activation_checkpointing=true"])
    found = find_fits(asked, cluster(4))
    assert found and all(each.recipe.training.activation_checkpointing for each in found)


def test_fewer_micro_batches_may_spare_the_pass_ahead(recipe):
    """A rank with one micro-batch needs no pass ahead: that may outweigh layers that are computed again."""
    alone = cluster(1, node=1)
    whole = load_recipe(BIG, [*base(), "data.batch={tokens: 4096, count: 1, max_length: 64}"])
    (stage_1,) = (each for each in find_fits(whole, alone) if each.memory.stage == 1)
    assert stage_1.accumulation == 1
    (found,) = (
        each
        for each in find_fits(
            whole, replace(alone, device=replace(SMALL, memory=(stage_1.memory.gpu_peak - 1) / 0.95))
        )
        if each.memory.stage == 1
    )
    cut = load_recipe(
        BIG, [*base(), "data.batch={tokens: 2048, count: 2, max_length: 64}", "parallel.expert=1"]
    )
    assert found.accumulation == 1 and found.recipe.training.activation_checkpointing
    assert found.times.step < estimate(cut, alone).step


def test_a_pass_ahead_of_the_step_takes_its_operations(recipe):
    several = load_recipe(BIG, [*base(), "data.batch={tokens: 512, count: 8, max_length: 64}"])
    without = load_recipe(
        BIG,
        [
            *base(),
            "data.batch={tokens: 512, count: 8, max_length: 64}",
            "training.auxiliary_over=micro-batch",
        ],
    )
    ahead, saved = (estimate(each, cluster(4)).compute for each in (several, without))
    forward = flops(several).source + flops(several).target
    assert ahead - saved == pytest.approx(4096 / 2 * forward / 4 / (1e12 * 0.5))


@pytest.mark.parametrize(
    ("changes", "options", "again"),
    [([], ["--memory", "2GB"], False), ([UNCUT], ["--memory", "0.5357GB", "--node", "1"], True)],
    ids=["kept", "computed again"],
)
def test_the_command_writes_the_fastest_recipe(tmp_path, changes, options, again):
    out = tmp_path / "fits.yaml"
    sets = [f"--set={each}" for each in [*base(), *changes]]
    told = json.loads(
        run_plan(BIG, *sets, "--fit", "--gpus", "4", *options, "--out", str(out), "--json").stdout
    )
    fastest = told["layouts"][0]
    written = load_recipe(out)
    assert (written.parallel.tensor, written.parallel.expert) == (fastest["tensor"], fastest["expert"])
    assert written.data.batch.count == fastest["batch_count"]
    assert written.deepspeed["zero_optimization"]["stage"] == fastest["zero"]
    assert written.deepspeed["bf16"] == {"enabled": True}
    assert written.training.activation_checkpointing == fastest["activation_checkpointing"] == again
    table = run_plan(BIG, *sets, "--fit", "--gpus", "4").stdout
    assert "parallel.expert" in table and "tokens / s" in table
    assert "tokens a step, in bfloat16; milliseconds on 4 GPUs of 80 GB, 8 in a machine" in table


def test_what_does_not_fit_is_said(recipe):
    with pytest.raises(
        UserError, match=r"no layout of 4 GPUs of 0.5 GB holds .*; the smallest needs 0\.\d+ GB"
    ):
        find_fits(recipe, cluster(4, memory=5e8))


def test_a_step_that_is_too_small_is_said(recipe):
    """Check that 64 GPUs have a layout and 128 have none.

    With tensor parallelism 2, 64 GPUs share 32 batches, and each has the least number of tokens, 128.
    """
    assert find_fits(recipe, cluster(64))
    with pytest.raises(UserError, match=r"4,096 tokens is too small for 128 GPUs: each batch needs 128 "):
        find_fits(recipe, cluster(128))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fit"], "--fit and --gpus go together"),
        (["--gpus", "4"], "--fit and --gpus go together"),
        (["--fit", "--gpus", "4", "--world", "4"], "leave it out with --fit"),
        (
            ["--fit", "--gpus", "4", "--device", "k80"],
            "--device is 'k80', but known are " + ", ".join(DEVICES),
        ),
        (["--fit", "--gpus", "4", "--memory", "80"], "--memory is '80': write a number of bytes as in 80GB"),
        (["--fit", "--gpus", "4", "--network", "0GB"], "--network is '0GB'"),
        (["--out", "x.yaml"], "--out is for --fit: give both or none"),
        (["--memory", "fuzz"], "--memory is for --fit: give both or none"),
        (["--efficiency", "0.4"], "--efficiency is for --fit: give both or none"),
        (["--fit", "--gpus", "4", "--out", BIG], f"{BIG} exists"),
        (
            ["--fit", "--gpus", "4", "--out", "no/fits.yaml"],
            "no cannot be written (No such file or directory): name a file in another folder with --out",
        ),
    ],
)
def test_bad_input(options, said):
    found = run_plan(BIG, *options)
    assert isinstance(found.exception, UserError) and said in str(found.exception)

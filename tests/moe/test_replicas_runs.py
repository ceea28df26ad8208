"""Which tasks get replicas, what the plan says of it, and that runs and their files do not know of them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.layouts import losses, states
from support.loops import assert_same_end, loop
from support.short_runs import ShortRuns
from typer.testing import CliRunner

from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.checkpoint.run_folder import find_changes
from lsmoe_ds.cli import app
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.shares import busy_tasks, planned_shares, shares_of, with_named_replicas
from lsmoe_ds.directions import Direction, Languages, english_centric
from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.moe.load import busiest, loads
from lsmoe_ds.planning.devices import DEVICES
from lsmoe_ds.planning.fit import find_fits
from lsmoe_ds.planning.memory import memory
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.planning.times import Cluster, estimate
from lsmoe_ds.training import start

# (tensor, expert, world, ZeRO stage)
ONE, EXPERTS, BOTH, FOUR = (1, 1, 1, 0), (1, 2, 2, 1), (2, 2, 4, 2), (1, 4, 4, 0)


def with_replicas(recipe: Recipe, replicas: object, **more: object) -> Recipe:
    given = recipe.model_dump(mode="json", exclude_none=True)
    given["model"]["decoder"]["moe"] |= {"replicas": replicas, **more}
    return Recipe.model_validate(given)


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory):
    return ShortRuns(pool, tmp_path_factory.mktemp("replicas"), loop, validate_every=2)


@pytest.fixture(scope="module")
def lent(runs):
    """Train on two ranks with replicas of the experts of English, and return the run."""
    run = runs.folder / "lent"
    runs.train(with_replicas(runs.recipe(EXPERTS), ["en"]), run, EXPERTS)
    return run


def test_an_interrupted_run_ends_bit_equal(runs, lent, tmp_path):
    recipe = with_replicas(runs.recipe(EXPERTS), ["en"])
    runs.train(recipe, tmp_path / "cut", EXPERTS, 5, KeyboardInterrupt())
    runs.train(recipe, tmp_path / "cut", EXPERTS)
    assert_same_end(tmp_path / "cut", lent, 6)


def test_checkpoints_are_those_of_a_run_without(runs, lent):
    without = runs.begun(EXPERTS)
    first, second = (each / "checkpoints" / "step-6" for each in (lent, without))
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
    shapes = {name: value.shape for name, value in read_checkpoint(first).weights.items()}
    found, wanted = states(first, shapes), states(second, shapes)
    assert len(shapes) == len(read_checkpoint(second).weights)
    # Adam divides by itself what is rounding noise: where the true gradient is zero, as of a key's bias.
    for name in (each for each in wanted if ".key.bias" not in each):
        for key, value in wanted[name].items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-4, atol=1e-5)


CHANGES = [
    (EXPERTS, ["en"], EXPERTS, None),
    (EXPERTS, None, EXPERTS, ["en", "de"]),
    (EXPERTS, ["en"], FOUR, ["en"]),
    (FOUR, ["fr"], BOTH, ["en"]),
    (BOTH, ["en"], ONE, ["en"]),
]


@pytest.mark.parametrize(("before", "lent_before", "after", "lent_after"), CHANGES, ids=str)
def test_a_training_goes_on_with_other_replicas(runs, tmp_path, before, lent_before, after, lent_after):
    run = tmp_path / "run"
    runs.train(with_replicas(runs.recipe(before, steps=3), lent_before), run, before)
    runs.train(with_replicas(runs.recipe(after), lent_after), run, after)
    assert losses(run) == pytest.approx(losses(runs.begun(ONE)), rel=1e-5)


def test_replicas_are_no_change_of_a_run(runs):
    recipe = runs.recipe(EXPERTS)
    assert not list(find_changes(recipe, with_replicas(recipe, ["en"])))


def test_shares_are_those_of_the_steps_that_train(runs):
    recipe = runs.recipe(ONE)
    data = PreparedData.of(recipe)
    stream = BatchStream(
        data, recipe.languages, data.vocabulary, recipe.data.batch, recipe.data.temperature, 1
    )
    source, target = [0] * 4, [0] * 4
    for step in itertools.islice(stream, 400):
        for batch in step.batches:
            for sentence, direction in enumerate(batch.direction.tolist()):
                source[direction] += int(batch.source_read[sentence].sum())
                target[direction] += int(batch.read[sentence].sum())
    shares = shares_of(recipe, data)
    for number, direction in enumerate(recipe.languages.directions):
        assert shares.source[direction] == pytest.approx(source[number] / sum(source), rel=0.05)
        assert shares.target[direction] == pytest.approx(target[number] / sum(target), rel=0.05)


def test_shares_follow_the_temperature_and_what_trains(runs, tmp_path):
    recipe = runs.recipe(ONE)
    data, pairs = PreparedData.of(recipe), {"de-en": 1000, "en-fr": 10}
    for bitext, count in pairs.items():
        data.manifest["bitexts"][bitext]["train"] = {
            "pairs": count,
            "sides": {code: {"tokens": 8 * count} for code in bitext.split("-")},
        }
    given = recipe.model_copy(update={"data": recipe.data.model_copy(update={"temperature": 2.0})})
    found = shares_of(given, data).target
    assert found[Direction("en", "de")] == found[Direction("de", "en")]
    assert found[Direction("en", "de")] / found[Direction("en", "fr")] == pytest.approx(10)
    training = recipe.training.model_copy(update={"directions": ["en-de", "fr-en"]})
    assert list(shares_of(recipe.model_copy(update={"training": training}), data).target) == [
        Direction("en", "de"),
        Direction("fr", "en"),
    ]
    unknown = recipe.model_copy(update={"data": recipe.data.model_copy(update={"directory": tmp_path})})
    shares = planned_shares(unknown)
    assert not shares.known and set(shares.target.values()) == {0.25}
    assert planned_shares(recipe).known


def test_which_tasks_are_busy():
    moe = MoE(experts=64, routing="task")
    assert busy_tasks([0.49, 0.26, 0.25], moe, 2) == [0], "the others have less than a mean task"
    assert busy_tasks([0.49, 0.36, 0.15], moe, 2) == [0, 1]
    assert busy_tasks([0.49, 0.36, 0.15], moe, 1) == []
    many = [0.01] * 80 + [0.12, 0.08]
    assert busy_tasks(many, moe, 2) == []
    assert busy_tasks(many, moe, 8) == [80, 81], "above 1 / 16"
    assert busy_tasks(many, moe, 32) == [80], "a rank holds the experts of one task"
    assert busy_tasks(many, moe, 64) == [80], "one in any case"
    assert busy_tasks([0.0, 0.5, 0.5], moe, 4) == [], "of two that train none is above the mean"


LANGUAGES = Languages(tuple(english_centric(["de", "nl", "sv", "fr", "es", "it"])))


def shares_by_target() -> list[float]:
    """Half into English, the rest into six others alike."""
    return [0.5 if code == "en" else 0.5 / 6 for code in LANGUAGES.codes]


def test_the_busiest_rank_by_hand():
    english = LANGUAGES.id("en")
    free = MoE(experts=8, routing="task")
    assert busiest(MoE(experts=8), LANGUAGES, shares_by_target(), 4) == 1 / 4, "even, where tokens choose"
    assert busiest(free, LANGUAGES, shares_by_target(), 4) == pytest.approx(0.5 + 0.5 / 4)
    assert busiest(free, LANGUAGES, shares_by_target(), 4, [english]) == pytest.approx(
        1 / 12 + (1 - 1 / 12) / 4
    )
    groups = MoE(experts=8, routing="task", expert_groups=2)  # Germanic and English; Romance
    (germanic,) = {LANGUAGES.task_groups("target", 2)[LANGUAGES.id(code)] for code in ("en", "de")}
    others = LANGUAGES.task_groups("target", 2).count(germanic) - 1
    assert busiest(groups, LANGUAGES, shares_by_target(), 2) == pytest.approx(0.5 + others / 12)
    assert busiest(groups, LANGUAGES, shares_by_target(), 2, [english]) == pytest.approx(
        max(others, 6 - others) / 12 + 0.25
    )
    static = MoE(experts=14, routing="static")  # of each task its own two
    assert busiest(static, LANGUAGES, shares_by_target(), 7) == pytest.approx(0.5)
    assert busiest(static, LANGUAGES, shares_by_target(), 7, [english]) == pytest.approx(1 / 12 + 0.5 / 7)
    shared = MoE(experts=2, routing="static")  # of all tasks the same two
    assert busiest(shared, LANGUAGES, shares_by_target(), 2) == pytest.approx(0.5)
    assert busiest(shared, LANGUAGES, shares_by_target(), 2, [0]) == pytest.approx(0.5), "all are lent"


def test_auto_names_the_busy_tasks_of_the_data(runs):
    automatic = with_replicas(runs.recipe(EXPERTS), "auto")
    named = with_named_replicas(automatic)
    assert named.model.decoder.moe.replicas == ["en"], "half of the target tokens; the others a quarter"
    assert with_named_replicas(named) is named
    alone = with_replicas(runs.recipe(ONE), "auto")
    assert with_named_replicas(alone).model.decoder.moe.replicas == []
    with pytest.raises(UserError, match="there is no prepared data in"):
        with_named_replicas(
            automatic.model_copy(update={"data": automatic.data.model_copy(update={"name": "none"})})
        )


def test_a_training_names_them_before_it_starts(runs, tmp_path, monkeypatch, capfd):
    automatic, given = with_replicas(runs.recipe(EXPERTS), "auto"), []
    monkeypatch.setattr(start, "_start", lambda recipe, *_: given.append(recipe) or 0)
    start.train(automatic, tmp_path, 2)
    assert given[0].model.decoder.moe.replicas == ["en"]
    start._notice(given[0])
    assert "every rank computes the decoder's experts of en, 47 % of its tokens" in capfd.readouterr().err
    nowhere = automatic.model_copy(update={"data": automatic.data.model_copy(update={"name": "none"})})
    with pytest.raises(SharedError, match="there is no prepared data"):
        start.train(nowhere, tmp_path, 2)


def test_the_plan_says_what_the_busiest_rank_carries(runs, capsys):
    recipe = runs.recipe(EXPERTS)
    without, automatic = plan(recipe), plan(with_replicas(recipe, "auto"))
    (load,), (lent) = without.loads, automatic.loads[0]
    assert load.tasks == [] and load.proposed == lent.tasks == ["en"]
    assert load.busiest == lent.without == pytest.approx(load.share + lent.share * 0.5 + 0.5, rel=1e-6)
    assert lent.busiest == load.with_proposed < load.busiest
    told = json.loads(json.dumps(automatic.to_dict()))
    (side,) = told["loads"]
    half = 96 * 4 // 2
    assert side["tokens"] == pytest.approx(lent.busiest * half) and told["shares_known"]
    experts = 3 * 2 * 4 * 16 * 16  # of one of three layers: top-2, a width of 16, forward and backward
    assert side["flops_without"] == pytest.approx(lent.without * half * experts)
    kept = 2 * (2 * 16 * 16 + 16 + 16)  # two experts
    assert side["lent"] == kept
    for one, other in zip(automatic.memory, without.memory, strict=True):
        value = 4 if one.precision == "float32" else 2
        assert one.peak - other.peak == pytest.approx(1.4 * (value * kept + (value + 4) * kept), abs=1)
        assert one.total == other.total, "replicas are no parameters"
    assert automatic.exchanges[0].token_bytes() == pytest.approx(
        without.exchanges[0].token_bytes() * (1 - lent.share)
    )
    for each, said in ((without, "replicas: auto would replicate the experts of en"), (automatic, "about ")):
        Console(width=200).print(each.table())
        shown = capsys.readouterr().out
        assert said in shown and "busiest of 2 ranks" in shown and "the prepared data" in shown
    again = with_replicas(recipe, ["en"])
    again.training.activation_checkpointing = True
    assert (
        memory(again, 2, 0, "float32").activations
        < memory(with_replicas(recipe, ["en"]), 2, 0, "float32").activations
    )


CLUSTER = Cluster(8, 8, DEVICES["H100"], 50e9, 0.4)
WEB = "recipes/papers/web-big-128.yaml"


def web(replicas: str = "null") -> Recipe:
    """Return a recipe of the paper's largest system on eight ranks, its decoder routed by target language."""
    sets = ["parallel.expert=8", "parallel.tensor=1", "data.batch={tokens: 16384, count: 8}"]
    task = f"{{experts: 128, every: 2, routing: task, task: target, replicas: {replicas}}}"
    return load_recipe(WEB, [*sets, f"model.decoder.moe={task}"])


def test_the_time_of_a_step_is_that_of_the_busiest_rank():
    recipe, lending = web(), with_named_replicas(web("auto"), planned_shares(web()))
    (_, load), (_, lent) = (loads(each, planned_shares(each)) for each in (recipe, lending))
    assert lent.tasks == ["en"] and load.busiest > 3 * lent.busiest
    without, with_them = (estimate(each, CLUSTER) for each in (recipe, lending))
    assert with_them.compute < without.compute and with_them.dispatch < without.dispatch
    target = plan(recipe).flops.target_experts
    step = 16384 * 8
    assert without.compute - with_them.compute == pytest.approx(
        step / 2 * target * (load.busiest - lent.busiest) / (DEVICES["H100"].half * 0.4)
    )


def test_fit_takes_replicas_where_they_are_faster():
    recipe = load_recipe(
        WEB,
        [
            "model={preset: null, hidden: 256, heads: 4, encoder: {layers: 2, feed_forward: 1024}, decoder: "
            "{layers: 2, feed_forward: 1024, moe: {experts: 16, routing: static}}}",
            "data.batch={tokens: 16384, count: 8}",
            "parallel.expert=1",
            "training.optimizer=adam",
            "deepspeed=ds_configs/bf16_zero1.json",
        ],
    )
    found = find_fits(recipe, CLUSTER)
    assert {each.recipe.parallel.expert == 1: bool(each.replicas) for each in found} == {
        True: False,
        False: True,
    }
    for each in found:
        assert each.to_dict()["replicas"] == ({} if each.recipe.parallel.expert == 1 else each.replicas)
    told = CliRunner().invoke(app, ["plan", WEB, "--fit", "--gpus", "64"])
    assert told.exit_code == 0


BAD = [
    ("token", "auto", "with 'routing: token' no task has experts of its own, and what an expert gets is not"),
    ("sentence", ["en"], "with 'routing: sentence' no task has experts of its own"),
    ("task", ["xx"], "'model.decoder.moe.replicas': language 'xx' is not in this system"),
    ("task", ["German"], "'German' is not a language code"),
    ("task", "always", "'model.decoder.moe.replicas' should be auto or a list"),
    ("task", [["en"]], "item 1 of 'model.decoder.moe.replicas' should be text, found ['en']"),
]


@pytest.mark.parametrize(("routing", "replicas", "said"), BAD, ids=str)
def test_what_cannot_have_replicas_is_said(runs, tmp_path, routing, replicas, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(runs.recipe(EXPERTS).to_yaml())
    moe = {"experts": 8, "routing": routing, "replicas": replicas}
    with pytest.raises(UserError) as refused:
        load_recipe(path, [f"model.decoder.moe={json.dumps(moe)}"])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_codes_of_tasks_are_those_of_the_table(runs, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(runs.recipe(EXPERTS).to_yaml())
    loaded = load_recipe(path, ["model.decoder.moe={experts: 8, routing: task, replicas: [eng]}"])
    assert loaded.model.decoder.moe.replicas == ["en"]
    pairs = "model.decoder.moe={experts: 8, routing: task, task: pair, replicas: [eng-deu]}"
    loaded = load_recipe(path, [pairs])
    assert loaded.model.decoder.moe.replicas == ["en-de"]
    with pytest.raises(UserError, match="direction de-fr is not in this system"):
        load_recipe(path, [pairs.replace("eng-deu", "de-fr")])


def test_an_extracted_model_has_none(lent, tmp_path):
    out = tmp_path / "dense"
    told = CliRunner().invoke(
        app,
        [
            "convert",
            str(lent),
            "--as",
            "dense",
            "--from",
            "en",
            "--to",
            "de",
            "--out",
            str(out),
            "--check",
            "0",
        ],
    )
    assert told.exception is None, told.exception
    assert "replicas:" not in (out / "recipe.yaml").read_text()
    copied = tmp_path / "copy"
    shutil.copytree(lent, copied)
    assert load_recipe(Path(copied) / "recipe.yaml").model.decoder.moe.replicas == ["en"]

"""The runner: scores and expert shares of a real run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.commands import tree
from support.small_run import PAIR_TOP1, TARGET_TOP2, TOKEN_TOP2, make_run

from lsmoe_ds.analysis.command import analyze_routing
from lsmoe_ds.analysis.measuring import Counts, layer_routing, measure_routing
from lsmoe_ds.analysis.routing import read_routing
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate, open_data
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.parts import merge
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.export.subnetwork import convert_to_dense
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate

TOKEN_BY_PAIR = TOKEN_TOP2 | {"task": "pair", "every": 1}


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("evaluate"), TARGET_TOP2, PAIR_TOP1)[0]


@pytest.fixture(scope="module")
def token_run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("tokens"), TOKEN_BY_PAIR, TOKEN_TOP2)[0]


def test_scores_every_direction_and_writes_them(run, capsys):
    table = evaluate(run, beam=2, limit=6)
    assert [str(score.direction) for score in table.directions] == ["en-de", "de-en", "en-fr", "fr-en"]
    assert {score.sentences for score in table.directions} == {6}
    assert (table.step, table.split, table.beam) == (2, "test", 2)
    assert set(table.resources) == {"de-en", "en-fr"} and set(table.resources.values()) == {"low"}
    assert ScoreTable.read(run / "scores" / "step-2.test.beam-2.limit-6.json") == table
    assert capsys.readouterr().out == ""
    loaded = load(run, "cpu")
    data = open_data(loaded)
    first, last = table.directions[0].samples[0], table.directions[3].samples[0]
    assert (
        first.source == data.text(Direction("en", "de"), "test")[0][0]
        and first.reference == data.text(Direction("en", "de"), "test")[1][0]
    )
    assert last.hypothesis == next(
        translate(loaded, Direction("fr", "en"), [data.text(Direction("fr", "en"), "test")[0][0]], beam=2)
    )


def score_parts(run, count, *numbers, **options):
    for number in numbers or range(1, count + 1):
        evaluate(run, limit=3, progress=False, part=Part(number, count), **options)


@pytest.mark.parametrize(
    ("count", "directions"), [(3, None), (6, None), (2, ["fr-en", "en-de", "fr-en", "de-en"])]
)
def test_parts_put_together_are_one_evaluation(run, count, directions):
    options = {"directions": directions, "beam": 2, "length_penalty": 0.6, "split": "dev"}
    question = "step-2.dev.beam-2.penalty-0.6.limit-3" + (".de-en+en-de+fr-en" if directions else "")
    place, record = run / "scores" / question, run / "scores" / f"{question}.json"

    def text():
        return re.sub(r'"seconds": [0-9.e-]+', "", record.read_text())

    shutil.rmtree(run / "scores", ignore_errors=True)
    evaluate(run, limit=3, progress=False, **options)
    whole, before = text(), {path.name: path.read_bytes() for path in place.iterdir()}
    shutil.rmtree(run / "scores")
    for number in reversed(range(1, count + 1)):  # in any order; none touches what another writes
        known = tree(run)
        score_parts(run, count, number, **options)
        now = tree(run)
        written = set(now.items()) - set(known.items())
        assert (
            f"scores/{question}/part-{number}-of-{count}.json",
            now[f"scores/{question}/part-{number}-of-{count}.json"],
        ) in written
        assert known.items() <= now.items() and (number == 1) == (
            f"scores/{question}/routing.json" in dict(written)
        )
    # From a checkpoint of the run, and without torch, as it takes seconds to import.
    command = ["evaluate", str(run / "checkpoints" / "step-2"), "--merge", str(count), "--json"]
    command += ["--limit", "3", "--beam", "2", "--length-penalty", "0.6", "--split", "dev"]
    command += ["--directions", ",".join(directions)] if directions else []
    program = "import sys; sys.modules['torch'] = None; from lsmoe_ds.cli import main; main()"
    said = subprocess.run(
        [sys.executable, "-c", program, *command], stdout=subprocess.PIPE, check=True
    ).stdout
    assert said.decode() == record.read_text() and text() == whole
    after = {path.name: path.read_bytes() for path in place.iterdir()}
    assert before.items() <= after.items() and len(after) == len(before) + count


def test_parts_that_do_not_fit_are_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("scores*"))
    place = copy / "scores" / "step-2.test.beam-1.limit-3"
    with pytest.raises(
        UserError,
        match=r"has no part of 3 that answers this question; `lsmoe evaluate .* --part I/N` writes a part",
    ):
        merge(copy, 3, beam=1, limit=3)
    score_parts(copy, 3, 1, 3, beam=1)
    with pytest.raises(UserError, match=r"limit-3 lacks 2/3: `lsmoe evaluate"):
        merge(copy, 3, beam=1, limit=3)
    score_parts(copy, 3, 2, beam=1)
    wrongs = [
        {"beam": 2},
        {"limit": 4},
        {"limit": None},
        {"length_penalty": 0.5},
        {"split": "dev"},
        {"route": "shared"},
    ]
    for wrong in [*wrongs, {"tokenize": "char"}, {"directions": ["en-de", "en-fr"]}]:
        others = (
            r"no part of 3 .* there are parts of step-2\.test\.beam-1\.limit-3; .* with the same options as"
            r" --merge"
        )
        with pytest.raises(UserError, match=others):
            merge(copy, 3, **{"beam": 1, "limit": 3, **wrong})
    good = json.loads((place / "part-2-of-3.json").read_text())
    for field, value in (
        ("name", "other"),
        ("step", 4),
        ("beam", 2),
        ("skipped", ["en-fr"]),
        ("resources", {"de-en": "high"}),
    ):
        (place / "part-2-of-3.json").write_text(json.dumps({**good, field: value}))
        with pytest.raises(
            UserError, match=rf"part 2/3 in .* has ({field}|question) .* instead of .*: score it again"
        ):
            merge(copy, 3, beam=1, limit=3)
    (place / "part-2-of-3.json").write_text((place / "part-1-of-3.json").read_text())
    with pytest.raises(UserError, match=r"en-de is scored by part 1/3 and by part 2/3"):
        merge(copy, 3, beam=1, limit=3)
    (place / "part-2-of-3.json").write_text(json.dumps({**good, "directions": {}}))
    with pytest.raises(UserError, match=r"no part in .* scores de-en: score the parts again"):
        merge(copy, 3, beam=1, limit=3)
    (place / "part-2-of-3.json").write_text(json.dumps(good)[:-9])
    with pytest.raises(UserError, match=r"part-2-of-3\.json: these scores cannot be read"):
        merge(copy, 3, beam=1, limit=3)
    assert (
        not (copy / "scores.json").exists()
        and not (copy / "scores" / "step-2.test.beam-1.limit-3.json").exists()
    )
    (place / "part-2-of-3.json").write_text(json.dumps(good))
    # Parts of another question, of an earlier step, or of a later one that are not all there yet, do not
    # matter.
    score_parts(copy, 3, 1, beam=2)
    earlier = shutil.copytree(place, place.with_name("step-1.test.beam-1.limit-3"))
    for part in earlier.glob("part-*"):
        part.write_text(part.read_text().replace('"step": 2', '"step": 1'))
    shutil.copytree(
        place, place.with_name("step-4.test.beam-1.limit-3"), ignore=shutil.ignore_patterns("part-1*")
    )
    merged = merge(copy, 3, beam=1, limit=3)
    assert merged.step == 2 and [str(score.direction) for score in merged.directions] == [
        "en-de",
        "de-en",
        "en-fr",
        "fr-en",
    ]


def test_shares_of_work():
    assert Part.parse("3/8") == Part(3, 8) and str(Part(3, 8)) == "3/8"
    for count in range(1, 7):
        shares = [Part(number, count).of("abcde") for number in range(1, count + 1)]
        assert (
            sorted(item for share in shares for item in share) == list("abcde")
            and max(map(len, shares)) - min(map(len, shares)) <= 1
        )
    assert Part(2, 3).of("abcde") == ["b", "e"]
    for text in ("0/8", "9/8", "a/b", "3", "", "3/", "-1/2", "1/2/3", " 1/2", "1/2\n", "1/10000", "٣/٨"):
        with pytest.raises(UserError, match="is no part: write I/N"):
            Part.parse(text)


def test_task_routing_is_what_the_router_says(run):
    evaluate(run, ["fr-en"], beam=1, limit=2, progress=False)
    layers = {(layer.side, layer.layer): layer for layer in read_routing(run / "routing.json")}
    assert set(layers) == {("encoder", 1), ("decoder", 0), ("decoder", 1), ("decoder", 2)}
    loaded = load(run, "cpu")
    for (side, number), layer in layers.items():
        weight = loaded.model.get_submodule(f"{side}.{number}.feed_forward.router").weight
        for index, task in enumerate(layer.tasks):
            row = weight[loaded.languages.tasks(layer.task).index(task)].softmax(-1)
            assert layer.chosen(index) == frozenset(row.topk(layer.top_k).indices.tolist())
            assert layer.shares[index] == pytest.approx(row.tolist())
    # Every real token of the held-out pairs was counted: a tag and EOS with each source, EOS with each
    # target.
    data = open_data(loaded)
    encoder, decoder = layers["encoder", 1], layers["decoder", 0]
    for direction in loaded.languages.directions:
        pairs = data.tokens(direction, "test")
        assert decoder.tokens[decoder.tasks.index(str(direction))] == pairs.target.lengths[:].sum() + len(
            pairs
        )
    into_german = data.tokens(Direction("en", "de"), "test")
    assert encoder.tokens[encoder.tasks.index("de")] == into_german.source.lengths[:].sum() + 2 * len(
        into_german
    )
    for layer in layers.values():
        received = [
            sum(n * layer.used(t)[e] for t, n in enumerate(layer.tokens)) / sum(layer.tokens)
            for e in range(4)
        ]
        assert layer.load == pytest.approx(received) and layer.dropped == 0


def test_a_task_without_a_direction_has_no_row_under_task_routing(run):
    loaded = load(run, "cpu")
    fewer = Languages(
        tuple(direction for direction in loaded.languages.directions if direction.target != "de")
    )
    assert fewer.codes == loaded.languages.codes
    for side, layer, moe in loaded.recipe.model.moe_layers():
        counts = Counts.none(len(fewer.tasks(moe.task)), moe.experts)
        tasks = (
            layer_routing(replace(loaded, languages=fewer), side, layer, moe, counts).tasks
            if moe.task == "target"
            else ("en", "fr")
        )
        assert sorted(tasks) == ["en", "fr"]


def test_token_routing_is_measured(token_run):
    loaded = load(token_run, "cpu")
    data = open_data(loaded)
    layers = {(layer.side, layer.layer): layer for layer in measure_routing(loaded, data, "test").layers}
    assert set(layers) == {("encoder", 0), ("encoder", 1), ("decoder", 1)}
    assert layers["encoder", 0].tasks == ("en-de", "de-en", "en-fr", "fr-en")
    assert layers["decoder", 1].tasks == ("de", "en", "fr")
    for layer in layers.values():
        assert all(
            sum(row) == pytest.approx(1) and max(row) <= 0.5 for row in layer.shares
        )  # of two different choices
    assert any(len(set(layer.shares)) == len(layer.tasks) for layer in layers.values())
    # A router that always prefers two experts.
    for name, parameter in loaded.model.named_parameters():
        if name.startswith("encoder.0.feed_forward.router"):
            parameter.zero_()
            loaded.model.encoder[0].feed_forward_norm.bias.fill_(1.0)
            loaded.model.encoder[0].feed_forward_norm.weight.zero_()
            parameter[1:3] = torch.tensor([[1.0], [2.0]])
    found = next(
        layer
        for layer in measure_routing(loaded, data, "dev").layers
        if (layer.side, layer.layer) == ("encoder", 0)
    )
    assert set(found.shares) == {(0.0, 0.5, 0.5, 0.0)}


def test_a_dense_folder_is_scored_like_the_run_it_came_from(run, tmp_path):
    convert_to_dense(run, Direction("de", "en"), tmp_path / "dense")
    sparse, dense = (
        evaluate(run, ["de-en"], limit=8, progress=False),
        evaluate(tmp_path / "dense", limit=8, progress=False),
    )
    assert [s.metrics for s in dense.directions] == [s.metrics for s in sparse.directions]
    assert [s.samples for s in dense.directions] == [s.samples for s in sparse.directions]
    assert not (tmp_path / "dense" / "routing.json").exists()
    with pytest.raises(UserError, match="is a dense model: it has no experts"):
        analyze_routing(tmp_path / "dense", tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_what_cannot_be_scored_is_refused(run, tmp_path):
    for arguments, message in (
        ({"directions": ["en-ru"]}, "'ru' is not in this system"),
        ({"directions": ["en"]}, "'en' is not a direction"),
        ({"split": "train"}, "'train' is no held-out text: choose test or dev"),
        ({"beam": 0}, "the beam is 0"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(run, progress=False, **arguments)
    copy = shutil.copytree(run, tmp_path / "run")
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(
        recipe.replace(f"directory: {run.parent}/data", f"directory: {tmp_path}/none")
    )
    with pytest.raises(UserError, match="there is no prepared data"):
        evaluate(copy, progress=False)


def test_data_prepared_anew_is_not_the_runs(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    data = shutil.copytree(run.parent / "data", tmp_path / "data")
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace(f"directory: {run.parent}/data", f"directory: {data}"))
    vocabulary = data / "prepared" / "small" / "vocabulary.model"
    changed = vocabulary.read_bytes().replace(b"identity", b"identitx", 1)
    assert changed != vocabulary.read_bytes()
    vocabulary.write_bytes(changed)
    with pytest.raises(UserError, match="is not that of"):
        evaluate(copy, progress=False)

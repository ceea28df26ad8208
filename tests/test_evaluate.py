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
from sacrebleu.metrics import BLEU
from small_run import PAIR_TOP1, TARGET_TOP2, TOKEN_TOP2, make_run
from test_bad_input import tree

from lsmoe_ds.analysis.command import analyze_routing
from lsmoe_ds.analysis.measuring import Counts, layer_routing, measure_routing
from lsmoe_ds.analysis.routing import read_routing
from lsmoe_ds.convert.command import convert
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate, open_data
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.parts import merge
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.export.subnetwork import convert_to_dense
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.languages import Direction, Languages
from lsmoe_ds.report.report import render_report, write_report

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
        assert decoder.tokens[decoder.tasks.index(str(direction))] == pairs.target.lengths.sum() + len(pairs)
    into_german = data.tokens(Direction("en", "de"), "test")
    assert encoder.tokens[encoder.tasks.index("de")] == into_german.source.lengths.sum() + 2 * len(
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


def copy_run(run, folder):
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns("scores*", "routing.json", ".*"))


def test_questions_lie_side_by_side_and_only_a_complete_one_is_scores_json(run, tmp_path):
    copy = copy_run(run, tmp_path / "run")
    evaluate(copy, beam=2, limit=3, progress=False)
    assert not (copy / "scores.json").exists()
    assert (
        "Step 2, test set, 12 sentences, beam 2. This is no complete evaluation: only the first 3"
        in render_report(copy)
    )
    whole = evaluate(copy, beam=2, progress=False)
    assert ScoreTable.read(copy / "scores.json") == whole and whole.sentences == 80
    kept = {name: (copy / name).read_bytes() for name in ("scores.json", "routing.json")}
    for options in (
        {"limit": 3},
        {"limit": 3, "split": "dev"},
        {"limit": 3, "directions": ["en-de"]},
        {"split": "dev"},
        {"directions": ["en-de", "de-en", "en-fr"]},
        {"tokenize": "char"},
        {"beam": 1},  # as complete, but not a later one
    ):
        evaluate(copy, **{"beam": 2, **options}, progress=False)
        if options == {"beam": 1}:  # the latest of two that are alike in all but an unusual search
            kept["scores.json"] = (copy / "scores.json").read_bytes()
        assert {name: (copy / name).read_bytes() for name in kept} == kept, options
    names = {path.name for path in (copy / "scores").glob("*.json")}
    assert names == {
        "step-2.test.beam-2.json",
        "step-2.test.beam-2.limit-3.json",
        "step-2.dev.beam-2.limit-3.json",
        "step-2.test.beam-2.limit-3.en-de.json",
        "step-2.dev.beam-2.json",
        "step-2.test.beam-2.de-en+en-de+en-fr.json",
        "step-2.test.beam-2.tok-char.json",
        "step-2.test.beam-1.json",
    }
    assert "Step 2, test set, 80 sentences, beam 1." in render_report(
        copy
    ) and "no complete" not in render_report(copy)
    usual = evaluate(copy, progress=False)  # beam 5
    evaluate(copy, beam=2, progress=False)
    assert ScoreTable.read(copy / "scores.json") == usual
    later = json.loads((copy / "scores.json").read_text()) | {"step": 10}
    (copy / "scores.json").write_text(json.dumps(later))
    (copy / "routing.json").write_text(
        json.dumps(json.loads((copy / "routing.json").read_text()) | {"step": 10})
    )
    evaluate(copy, progress=False)
    assert (
        ScoreTable.read(copy / "scores.json").step
        == 10
        == json.loads((copy / "routing.json").read_text())["step"]
    )
    assert json.loads((copy / "scores/step-2.dev.beam-2/routing.json").read_text())["split"] == "dev"


def test_every_translation_is_kept_beside_its_source_and_reference(run, tmp_path):
    copy = copy_run(run, tmp_path / "run")
    table = evaluate(copy, ["en-de", "fr-en"], beam=2, progress=False)
    loaded, data = load(copy, "cpu"), open_data(load(copy, "cpu"))
    for score in table.directions:
        stem = copy / "scores" / table.question / str(score.direction)
        source, hypothesis, reference = (
            stem.with_suffix(f".{side}").read_bytes() for side in ("source", "hypothesis", "reference")
        )
        assert (source.decode().split("\n")[:-1], reference.decode().split("\n")[:-1]) == data.text(
            score.direction, "test"
        )
        lines = hypothesis.decode().split("\n")[:-1]
        assert lines == list(translate(loaded, score.direction, source.decode().split("\n")[:-1], beam=2))
        assert BLEU().corpus_score(lines, [reference.decode().split("\n")[:-1]]).score == score.metrics.bleu


def test_scores_of_a_run_that_cannot_be_written(run, tmp_path, monkeypatch, capsys):
    copy = copy_run(run, tmp_path / "run")
    (copy / "scores").write_text("a file in the place of the folder")
    before = tree(copy)
    with monkeypatch.context() as patched:
        patched.setattr(
            "lsmoe_ds.evaluation.evaluate.load_engine", None
        )  # refused before any model is loaded
        with pytest.raises(
            UserError,
            match=(
                r"run/scores cannot be written \(Not a directory\): give a folder for the scores with"
                r" --out DIR"
            ),
        ):
            evaluate(copy, beam=1, limit=2, progress=False)
    evaluate(copy, beam=1, progress=False, out=tmp_path / "out" / "here", part=Part(1, 1))
    merge(copy, 1, beam=1, out=tmp_path / "out" / "here")
    found = {path.name for path in (tmp_path / "out" / "here").iterdir() if not path.name.startswith(".")}
    assert tree(copy) == before and found == {"scores", "scores.json", "routing.json"}
    other = copy_run(run, tmp_path / "other")
    for out, owner in (
        (tmp_path / "out" / "here", copy),
        (run, run),
    ):  # another model's scores are not replaced
        with pytest.raises(
            UserError, match=f"holds the scores of {owner}: give those of {other} another folder"
        ):
            evaluate(other, beam=1, limit=2, progress=False, out=out)
    evaluate(copy, beam=1, limit=2, progress=False, out=tmp_path / "out" / "here")
    (tmp_path / "file").touch()
    for write in (
        lambda out: write_report(copy, out / "page.html"),
        lambda out: analyze_routing(copy, out / "maps"),
    ):
        with pytest.raises(
            UserError, match=r"file cannot be written \(.*\): choose another (file|folder) with --out"
        ):
            write(tmp_path / "file")
    # A conversion whose record cannot be kept has worked all the same.
    (copy / "conversion.json").mkdir()
    record = convert(copy, "dense", Direction("en", "de"), tmp_path / "dense", check=0)
    assert (
        record["dense_folder"] == str(tmp_path / "dense")
        and (tmp_path / "dense" / "model.safetensors").is_file()
    )
    assert "lsmoe: the model is written, its record for the run's report is not: " in capsys.readouterr().err


def test_a_test_set_of_ones_own(run, tmp_path, capsys):
    copy = copy_run(run, tmp_path / "run")
    text = {"en": ["kita", "", "mo ne  su"], "deu_Latn": ["kitaen", "moen", ""], "fr": ["atike", "x", "y"]}
    for code, lines in text.items():
        (tmp_path / f"my.set.{code}").write_text("".join(f"{line}\n" for line in lines))
    table = evaluate(copy, ["en-de", "de-en"], beam=1, progress=False, test=[str(tmp_path / "my.set")])
    assert re.fullmatch(r"my-set-[0-9a-f]{8}", table.split) and not (copy / "scores.json").exists()
    assert [score.sentences for score in table.directions] == [3, 3]
    folder = copy / "scores" / table.question
    assert (folder / "en-de.source").read_text() == "kita\n\nmo ne  su\n" and (
        folder / "en-de.reference"
    ).read_text() == "kitaen\nmoen\n\n"
    assert (folder / "en-de.hypothesis").read_text().split("\n")[
        1
    ] == ""  # as `lsmoe translate`: an empty line stays empty
    assert (folder / "de-en.source").read_text() == (folder / "en-de.reference").read_text()
    assert not (folder / "routing.json").exists()
    # Prepared data is not needed, and a set of the same name with other text is another set.
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(
        recipe.replace(f"directory: {run.parent}/data", f"directory: {tmp_path}/none")
    )
    (tmp_path / "my.set.en").write_text("kita\n\nmo\n")
    other = evaluate(
        copy, ["en-de", "de-en"], beam=1, progress=False, test=[str(tmp_path / "my.set")], part=Part(1, 1)
    )
    assert other.split[:7] == "my-set-" and other.split != table.split
    assert merge(copy, 1, ["de-en", "en-de"], beam=1, test=[str(tmp_path / "my.set")]).split == other.split
    # Experts chosen by the pair of languages know nothing of a pair that was not trained.
    with pytest.raises(UserError, match="direction de-fr is not in this system: it knows"):
        evaluate(copy, ["de-fr"], beam=1, progress=False, test=[str(tmp_path / "my.set")])
    convert_to_dense(run, Direction("en", "de"), tmp_path / "dense")  # has no parameters of another direction
    with pytest.raises(UserError, match="direction de-en is not in this system: it knows en-de"):
        evaluate(tmp_path / "dense", ["de-en"], beam=1, progress=False, test=[str(tmp_path / "my.set")])
    with pytest.raises(UserError, match="language 'ru' is not in this system"):
        evaluate(copy, ["de-ru"], beam=1, progress=False, test=[str(tmp_path / "my.set")])
    (tmp_path / "my.set.fr").unlink()
    with pytest.raises(UserError, match=r"there is nothing to score: en-fr, fr-en have no text in my\.set"):
        evaluate(copy, ["en-fr", "fr-en"], beam=1, progress=False, test=[str(tmp_path / "my.set")])
    capsys.readouterr()
    evaluate(copy, beam=1, progress=False, test=[str(tmp_path / "my.set")])
    assert re.search(
        r"lsmoe: skipped: en-fr, fr-en have no text in my-set-[0-9a-f]{8}\n", capsys.readouterr().err
    )

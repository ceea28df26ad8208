"""`lsmoe distill`: a student of a teacher routed by token, from its translations and its weights."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.commands import main
from support.conversions import EN_DE, whole_model
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe, make_run

from lsmoe_ds.analysis.measuring import measure_use
from lsmoe_ds.checkpoint.run_folder import newest_whole, open_run
from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.data.prepared import PreparedData, open_data
from lsmoe_ds.directions import Direction
from lsmoe_ds.distill import command
from lsmoe_ds.distill.start import first_weights
from lsmoe_ds.inference.load import load

QUICK = ["--workers", "0", "--beam", "2", "--limit", "20", "--no-train"]


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("teacher"), TOKEN_TOP2, TARGET_TOP2, 2)[0]


def recipe_in(run, path, training: dict | None = None, **model):
    """Write the recipe of a student without experts to ``path`` and return ``path``."""
    value = make_recipe(run.parent, None, None).model_dump(mode="json", exclude_none=True)
    value["name"] = "student"
    value["model"] |= model
    value["training"] |= training or {}
    path.write_text(json.dumps(value))
    return path


def distilled(run, folder, *options, teacher=None, **changes):
    """Run ``lsmoe distill`` into ``folder / "student"`` and return the student's recipe.

    The teacher is the run unless another is given.
    """
    recipe = recipe_in(run, folder / "r.yaml", **changes)
    out, teacher = folder / "student", str(teacher or run)
    assert main(["distill", teacher, "--into", str(recipe), "--out", str(out), *QUICK, *options]) == 0
    return load_recipe(folder / "student-recipe.yaml")


def start_of(folder):
    return read_weights(find_model(folder / "student-start")).tensors


@pytest.mark.parametrize("experts", ["mean", "used"])
@pytest.mark.parametrize("directions", [["en-de"], ["en-de", "fr-en"]], ids=["one", "two"])
def test_the_student_begins_with_its_teachers_weights(run, tmp_path, capsys, experts, directions):
    """One direction has its own expert of layers routed by task; several share the mean, or the most used."""
    distilled(run, tmp_path, "--experts", experts, training={"directions": directions})
    found, theirs = start_of(tmp_path), read_weights(find_model(run)).tensors
    stored = find_model(run)
    loaded, data = load(run, "cpu"), open_data(stored)
    uses = [measure_use(loaded, data, Direction.parse(each)) for each in directions]
    for name, value in found.items():
        if ".feed_forward." not in name or name in theirs:
            assert torch.equal(value, theirs[name]), name
    for (side, layer), _ in uses[0].items():
        use = sum(each[side, layer] for each in uses) / len(uses)
        for part in ("expand.weight", "contract.bias"):
            of_all = [theirs[f"{side}.{layer}.feed_forward.experts.{e}.{part}"] for e in range(len(use))]
            wanted = of_all[int(use.argmax())]
            if experts == "mean":
                wanted = torch.einsum("e,e...->...", (use / use.sum()).float(), torch.stack(of_all))
            ours = found[f"{side}.{layer}.feed_forward.{part}"]
            if side == "encoder" or len(directions) == 2:  # the decoder is routed by task
                torch.testing.assert_close(ours, wanted.float(), rtol=1e-5, atol=1e-6)
    said = json.loads((tmp_path / "student-start" / "provenance.json").read_text())["approximates"]
    assert said.startswith("a start for distilling: ") and "stands for all of a layer" in said


@pytest.mark.parametrize("method", [{"clsr": {}}, {"adapters": {"width": 4}}], ids=["clsr", "adapters"])
@pytest.mark.parametrize("experts", [None, TOKEN_TOP2, TARGET_TOP2], ids=["dense", "token", "target"])
def test_one_direction_of_a_teacher_without_an_equal_sub_network(run, tmp_path, method, experts):
    """The student begins with the layers that all languages share, each at its own number."""
    teacher = whole_model(run, None, tmp_path / "teacher", (None, experts), method)
    distilled(run, tmp_path, teacher=teacher, training={"directions": ["en-de"]})
    found, theirs = start_of(tmp_path), read_weights(find_model(teacher)).tensors
    assert all(torch.equal(value, theirs[name]) for name, value in found.items() if name in theirs)
    assert {name for name in found if name not in theirs} == {
        name for name in found if experts and name.startswith("decoder.1.feed_forward.")
    }


def test_a_student_of_fewer_languages(run, tmp_path, capsys):
    fewer = ["--set", "data.languages=[de, en]", "--set", "data.directions=[en-de, de-en]"]
    recipe = distilled(run, tmp_path, *fewer)
    assert find_model(tmp_path / "student-start").recipe.languages.codes == ("de", "en")
    assert [str(each) for each in recipe.trained] == ["en-de", "de-en"]
    assert {path.name for path in (tmp_path / "student-corpus").glob("*.tsv")} == {"en-de.tsv", "de-en.tsv"}


def test_what_has_another_shape_begins_at_random(run, tmp_path, capsys):
    distilled(run, tmp_path, decoder={"layers": 1, "feed_forward": 20})
    found, theirs = start_of(tmp_path), read_weights(find_model(run)).tensors
    assert found["decoder.0.feed_forward.expand.weight"].shape == (20, 16)
    assert torch.equal(found["decoder.0.attention.query.weight"], theirs["decoder.0.attention.query.weight"])
    assert not any(name.startswith("decoder.1.") for name in found)
    said = capsys.readouterr().err
    assert "values are its teacher's" in said and "begin at random" not in said  # most of them are


def test_that_most_weights_begin_at_random_is_said(run, tmp_path, capsys):
    distilled(run, tmp_path, hidden=24)
    said = " ".join(capsys.readouterr().err.split())
    assert "values are its teacher's, the others begin at random, since the teacher has them in other" in said


@pytest.mark.parametrize("level", ["sequence", "word", "both"])
def test_what_the_student_learns_from(run, tmp_path, capsys, level):
    recipe = distilled(run, tmp_path, "--level", level, training={"directions": ["en-de"]})
    assert "may have been trained on dev and test sentences" not in capsys.readouterr().err
    assert recipe.training.start_from == tmp_path / "student-start"
    assert (recipe.training.teacher is not None) == (level != "sequence")
    assert (
        (recipe.data.train_on == "translated") == (level != "word") == (tmp_path / "student-corpus").exists()
    )
    data, before = PreparedData.of(recipe), open_data(find_model(run))
    pairs = len(data.tokens(EN_DE, "train"))
    assert 0 < pairs <= 20 if level != "word" else pairs == len(before.tokens(EN_DE, "train"))
    assert data.text(EN_DE, "test") == before.text(EN_DE, "test"), "the student is tested as the teacher is"
    if level != "sequence":
        assert (recipe.training.teacher.model, recipe.training.teacher.weight) == (run, 0.5)


def test_what_is_there_stays(run, tmp_path, capsys):
    distilled(run, tmp_path, training={"directions": ["en-de"]})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    distilled(run, tmp_path, training={"directions": ["en-de"]})
    told = capsys.readouterr()
    assert "the corpus" in told.err and "the first weights are in" in told.err
    assert told.out == f"lsmoe train {tmp_path}/student-recipe.yaml --out {tmp_path}/student\n"
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    rewritten = {path.name for path in before if before[path] != after[path]}
    assert rewritten <= {"r.yaml", "student-recipe.yaml"} and before.keys() == after.keys()
    weights = tmp_path / "student-start" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    distilled(run, tmp_path, training={"directions": ["en-de"]})
    assert f"{weights} is missing: the first weights are written again" in capsys.readouterr().err
    assert weights.read_bytes() == whole


def test_the_first_weights_are_written_once(run, tmp_path, monkeypatch):
    """By the process that leads or by one that helps it to translate, not by both at the same time."""
    calls, gate = [], threading.Barrier(2)

    def translate(*_):
        gate.wait(60)
        return {"pairs": {"en-de": 1}}

    def make(*arguments):
        calls.append(arguments)
        return first_weights(*arguments)

    monkeypatch.setattr(command, "translate_corpus", translate)
    monkeypatch.setattr(command, "first_weights", make)
    monkeypatch.setattr(command, "prepare", lambda *_, **__: None)
    into, student = recipe_in(run, tmp_path / "r.yaml"), tmp_path / "student"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: command.distill(run, into, out=student), range(2)))
    assert len(calls) == 1 and find_model(tmp_path / "student-start")


@pytest.mark.slow
def test_one_command_trains_the_student(run, tmp_path):
    recipe = recipe_in(run, tmp_path / "r.yaml", {"directions": ["en-de"]})
    options = [each for each in QUICK if each != "--no-train"]
    command = [sys.executable, "-m", "lsmoe_ds", "distill", str(run), "--into", str(recipe), *options]
    command += ["--level", "both"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    student = tmp_path / "runs" / "student"
    assert newest_whole(student)[0].name == "step-2"
    assert '"distillation"' in (student / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level", "words"], "--level is 'words': choose sequence, word or both"),
        (["--experts", "best"], "--experts is 'best': choose used or mean"),
        (["--set", "data.languages=[de, fr, nl]", "--set", "data.corpora=[nowhere]"], "nl"),
        (
            ["--level", "word", "--set", "training.teacher={model: runs/other}"],
            "r.yaml is runs/other, but the teacher given is ",
        ),
        (["--out", "RUN"], "is another model's: give it a folder with --out"),
        (
            ["--level", "word", "--set", "model.low_rank={rank: 2, fuse_distillation: true}"],
            "the student's complete recipe: 'training.teacher' gives the model a second teacher",
        ),
    ],
)
def test_what_is_not_possible_is_said(run, tmp_path, capsys, options, message):
    recipe = recipe_in(run, tmp_path / "r.yaml")
    options = [str(run) if each == "RUN" else each for each in options]
    if "--out" not in options:
        options += ["--out", str(tmp_path / "student")]
    assert main(["distill", str(run), "--into", str(recipe), *QUICK, *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_it_is_for_one_process(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["distill", str(run), "--into", str(tmp_path / "r.yaml")]) == 2
    assert "lsmoe distill is for one process" in capsys.readouterr().err


def test_the_teachers_data_stay(run, tmp_path, capsys):
    """A student whose run folder has the name of its teacher's data would prepare over them."""
    recipe = recipe_in(run, tmp_path / "r.yaml")
    name = find_model(run).recipe.prepared.name
    assert main(["distill", str(run), "--into", str(recipe), "--out", str(tmp_path / name), *QUICK]) == 2
    assert "which are its teacher's: give it another name with --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_student_that_has_begun_keeps_what_it_began_with(run, tmp_path, capsys):
    recipe = recipe_in(run, tmp_path / "r.yaml", {"directions": ["en-de"]})
    command = ["distill", str(run), "--into", str(recipe), "--out", str(tmp_path / "student"), *QUICK]
    assert main(command) == 0
    made = load_recipe(tmp_path / "student-recipe.yaml")
    open_run(made, tmp_path / "student", made.prepared / "vocabulary.model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    prepared = (made.prepared / "manifest.json").read_bytes()
    for options, message in (
        (["--limit", "10"], "was started on translations with limit 20"),
        (["--beam", "3"], "was started on translations with beam 2"),
        (["--experts", "used"], "was started with other first weights"),
        (["--level", "word"], "was started with --level sequence: set it back"),
        (["--level", "both"], "was started with --level sequence: set it back"),
        (["--set", "training.learning_rate=0.5"], "was started with training.learning_rate 0.05"),
    ):
        capsys.readouterr()
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert (made.prepared / "manifest.json").read_bytes() == prepared
    assert main(command) == 0


def test_a_folder_that_cannot_be_written_is_refused_before_translating(run, tmp_path, capsys):
    recipe, out = recipe_in(run, tmp_path / "r.yaml"), tmp_path / "r.yaml/students/one"
    assert main(["distill", str(run), "--into", str(recipe), "--out", str(out), *QUICK]) == 2
    said = capsys.readouterr().err
    assert "students cannot be written (Not a directory): choose another folder with --out" in said
    assert "translating" not in said


def test_a_recipe_of_ones_own_stays(run, tmp_path, capsys):
    recipe = recipe_in(run, tmp_path / "r.yaml")
    (tmp_path / "student-recipe.yaml").write_text("my: file\n")
    command = ["distill", str(run), "--into", str(recipe), "--out", str(tmp_path / "student"), *QUICK]
    assert main(command) == 2
    assert "was not written by `lsmoe distill`" in capsys.readouterr().err
    assert (tmp_path / "student-recipe.yaml").read_text() == "my: file\n"

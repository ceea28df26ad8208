"""Members of a study that learn from another member."""

from __future__ import annotations

import json

import pytest
import yaml
from support.commands import tree
from support.small_run import TOKEN_TOP2
from support.small_study import prepared_base, study_file

from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.errors import UserError
from lsmoe_ds.study.command import run_study
from lsmoe_ds.study.settings import load_study

TOKEN = {"encoder": {"moe": TOKEN_TOP2}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prepared_base(tmp_path_factory.mktemp("study"))


def write_study(folder, **members):
    value = study_file(name="taught", members={"naive": {}, **members})
    (folder / "taught.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    return folder / "taught.yaml"


@pytest.mark.slow
def test_a_student_of_a_member(base, tmp_path):
    """It comes first, and its teacher is trained before it."""
    distill = {"of": "token", "level": "both", "limit": 8, "beam": 1}
    file = write_study(
        base, student={"title": "Distilled", "distill": distill}, token={"set": {"model": TOKEN}}
    )
    out = tmp_path / "out"
    found = run_study(file, out, members=["student", "token"])
    rows = {row.member: row for row in found.rows}
    assert rows["student"].seeds == rows["token"].seeds == (3,)
    assert (
        rows["student"].costs.serving_all == rows["naive"].costs.serving_all < rows["token"].costs.serving_all
    )
    run, teacher = out / "student-seed3", out / "token-seed3"
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.training.teacher.model == teacher
    assert recipe.data.train_on == "translated" and recipe.data.name == "taught-student-seed3"
    start = read_weights(find_model(out / "student-seed3-start")).tensors
    theirs = read_weights(find_model(teacher)).tensors
    assert all((start[name] == value).all() for name, value in theirs.items() if ".attention." in name)
    scored = json.loads((run / "scores-specific.json").read_text())
    assert list(scored["directions"]) == list(rows["token"].directions)
    study = PreparedData.of(load_study(file).recipes["naive"])
    for each in recipe.trained:
        assert PreparedData.of(recipe).text(each, "test") == study.text(each, "test")
    assert (out / "study.svg").read_text().count("<circle") == 2, "the student, and its teacher"
    before = tree(out)
    run_study(file, out, members=["student", "token"])
    changed = {path for path, content in tree(out).items() if before.get(path) != content}
    assert not [path for path in changed if "seed3" in str(path)], "nothing is done again"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"student": {"distill": {"of": "tokens"}}, "token": {}}, "which is no member .did you mean 'token'"),
        ({"student": {"distill": {"of": "student"}}}, "which is itself distilled"),
        ({"student": {"distill": {"of": "naive"}, "trained": False}}, "'distill' is of a training"),
        (
            {"token": {"each_direction": 2}, "student": {"distill": {"of": "token"}}},
            "a model for each direction",
        ),
    ],
)
def test_who_can_teach(base, members, message):
    with pytest.raises(UserError, match=message):
        load_study(write_study(base, **members))

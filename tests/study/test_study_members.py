"""Members of a study that are not trained once on all directions."""

from __future__ import annotations

import json

import pytest
import yaml
from support.commands import tree
from support.layouts import ONE, train
from support.small_study import prepared_base, study_file

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.study.command import Runs, run_study
from lsmoe_ds.study.settings import load_study
from lsmoe_ds.study.table import Comparison


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prepared_base(tmp_path_factory.mktemp("study"))


def test_a_member_that_is_not_trained_is_the_model_that_the_others_start_from(
    pool, base, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(base / "base.yaml")
    run = tmp_path / "run"
    train(pool, recipe, run, ONE)
    convert(run, "consolidated", None, tmp_path / "start", check=0)
    members = {
        "base": {"trained": False, "title": "As it is"},
        "tuned": {"set": {"model": {"low_rank": {"rank": 2}}}},
    }
    training = {**recipe.model_dump(mode="json")["training"], "start_from": str(tmp_path / "start")}
    training["directions"] = directions = [str(direction) for direction in recipe.trained[:2]]
    (tmp_path / "from.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load((base / "base.yaml").read_text()), "training": training})
    )
    value = study_file(recipe="from.yaml", seeds=[1, 2], baseline="base", members=members)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(value))
    found = run_study(tmp_path / "s.yaml", tmp_path / "out", members=["base"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["base"]
    row = found.to_dict()["rows"][0]
    assert row["title"] == "As it is"
    wanted = evaluate(run, directions, beam=2, limit=4, progress=False)
    table = ScoreTable.read(tmp_path / "out" / "base" / "scores-specific.json")
    assert [str(each.direction) for each in table.directions] == directions, "not all that the base knows"
    assert [each.metrics for each in table.directions] == [each.metrics for each in wanted.directions]
    members["neurons"] = {"set": {"model": {"neurons": {}}}}
    (tmp_path / "masks.yaml").write_text(yaml.safe_dump({**value, "members": members}))
    runs = Runs(load_study(tmp_path / "masks.yaml"), tmp_path / "masks")
    at_most = [member for member in members if runs.costs(member, "specific").serving_at_most]
    assert at_most == ["neurons"], "training finds out how many units a direction uses"
    del training["start_from"]
    (tmp_path / "from.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load((base / "base.yaml").read_text()), "training": training})
    )
    with pytest.raises(UserError, match=r"'trained' is false, but there is no training\.start_from"):
        load_study(tmp_path / "s.yaml")


def test_a_member_with_a_model_for_each_direction(base, tmp_path):
    """Of a recipe that trains two of its four directions."""
    directions = ["en-de", "de-en"]
    recipe = load_recipe(base / "base.yaml", [f"training.directions=[{', '.join(directions)}]"])
    (base / "some.yaml").write_text(recipe.to_yaml())
    members = {"naive": {}, "alone": {"each_direction": 2, "title": "Bilingual"}}
    value = study_file(name="alone", recipe="some.yaml", members=members)
    (base / "alone.yaml").write_text(yaml.safe_dump(value))
    out = tmp_path / "out"
    comparison = run_study(base / "alone.yaml", out)
    both = {row.member: row for row in comparison.rows}
    assert both["alone"].directions.keys() == both["naive"].directions.keys() == set(directions)
    for direction in directions:
        run = out / "alone-seed3" / direction
        recipe = load_recipe(run / "recipe.yaml")
        assert recipe.training.directions == [direction] and recipe.training.steps == 2
        table = ScoreTable.read(run / "scores-specific.json")
        assert [str(score.direction) for score in table.directions] == [direction]
        assert both["alone"].directions[direction]["chrfpp"].mean == table.directions[0].metrics["chrfpp"]
    costs = both["alone"].costs
    assert costs.parameters == costs.serving_all == 2 * both["naive"].costs.parameters
    assert costs.serving_one == both["naive"].costs.serving_one and costs.minutes is not None
    before = tree(out)
    run_study(base / "alone.yaml", out)
    changed = {path for path, content in tree(out).items() if before.get(path) != content}
    assert not [path for path in changed if "alone-seed3" in str(path)], "nothing is done again"


def test_rows_of_routes_in_directions_that_were_not_trained(base, tmp_path):
    members = {
        "naive": {},
        "modular": {
            "set": {
                "model": {"low_rank": {"rank": 2, "index": "modular"}},
                "training": {"directions": ["en-de", "de-en"]},
            },
            "routes": ["specific", "matrices-1-3"],
        },
    }
    value = study_file(members=members, evaluate={"beam": 1, "limit": 2, "directions": "all"})
    (base / "routes.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    found = run_study(base / "routes.yaml", tmp_path / "out")
    assert [row.title for row in found.rows] == ["naive", "modular, specific", "modular, matrices-1-3"]
    for route in ("specific", "matrices-1-3"):
        table = ScoreTable.read(tmp_path / "out" / "modular-seed3" / f"scores-{route}.json")
        scored = [str(each.direction) for each in table.directions]
        assert table.route == route and scored == ["en-de", "de-en", "en-fr", "fr-en"]
    value["members"]["modular"]["routes"] = ["sideways"]
    (base / "routes.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises(UserError, match="member 'modular': 'sideways' is no route"):
        run_study(base / "routes.yaml", tmp_path / "other")


def test_a_member_may_take_some_of_the_seeds(base, tmp_path):
    members = {"naive": {}, "once": {"seeds": [4]}}
    value = study_file(name="some-seeds", seeds=[3, 4], members=members)
    (base / "seeds.yaml").write_text(yaml.safe_dump(value))
    out = tmp_path / "out"
    first = run_study(base / "seeds.yaml", out, seeds=[3])
    assert [(row.seeds, row.missing_seeds) for row in first.rows] == [((3,), (4,)), ((), (4,))]
    assert "2 of 3 scores are missing" in first.about()
    found = run_study(base / "seeds.yaml", out)
    assert [(row.seeds, row.missing_seeds) for row in found.rows] == [((3, 4), ()), ((4,), ())]
    assert found.runs_missing == 0 and found.rows[1].beyond_seeds is None
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert not (out / "once-seed3").exists()
    for seeds, says in (
        ([5], "'seeds' of member 'once' names 5, which is not among those of the study: 3, 4"),
        ([4, 4], "'seeds' names a seed twice"),
    ):
        members["once"]["seeds"] = seeds
        (base / "seeds.yaml").write_text(yaml.safe_dump(value))
        with pytest.raises(UserError, match=says):
            load_study(base / "seeds.yaml")

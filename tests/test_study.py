"""Studies: a real one of two members that is interrupted, and bad study files."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml
from small_host import write_host
from small_run import make_recipe, write_corpus
from test_bad_input import inside, main, tree
from test_report import Page
from test_resharding import ONE, train

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.folders import locked
from lsmoe_ds.inference.load import check_route
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.shipped import ROOT as PROJECT
from lsmoe_ds.study import command
from lsmoe_ds.study.command import run_study
from lsmoe_ds.study.settings import load_study


def test_the_studies_that_come_with_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_host(tmp_path / "data/models/smollm2", max_position_embeddings=2048)  # which one of them is for
    for path in sorted((PROJECT / "studies").glob("*.yaml")):
        study = load_study(path)
        assert study.settings.name == path.stem
        for member, route in study.rows():
            plan(study.recipes[member])
            check_route(route, study.recipes[member])


def study_file(**changes) -> dict:
    value = {
        "name": "pair",
        "recipe": "base.yaml",
        "seeds": [3],
        "baseline": "naive",
        "evaluate": {"beam": 2, "limit": 4},
        "members": {
            "naive": {"title": "Naive"},
            "fd": {
                "set": {"model": {"low_rank": {"rank": 2, "fuse_distillation": True}}},
                "routes": ["specific", "shared"],
            },
        },
    }
    return {**value, **changes}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Prepared data and base.yaml."""
    folder = tmp_path_factory.mktemp("study")
    write_corpus(folder)
    recipe = make_recipe(folder, None, None, stage=0)
    recipe.training.steps, recipe.training.log_every = 4, 2
    (folder / "base.yaml").write_text(recipe.to_yaml())
    prepare(recipe)
    return folder


def test_recipes_of_the_members(base):
    (base / "s.yaml").write_text(yaml.safe_dump(study_file(), sort_keys=False))
    study = load_study(base / "s.yaml")
    assert study.recipe("fd", 3).model.low_rank.rank == 2 and study.recipe("naive", 3).model.low_rank is None
    assert (
        study.recipe("fd", 3).training.seed == 3
        and study.recipe("fd", 3).model.encoder == study.recipe("naive", 3).model.encoder
    )
    assert [study.title(*row) for row in study.rows()] == ["Naive", "fd, specific", "fd, shared"]


MEMBER = study_file()["members"]["naive"]
ROUTES = {"routes": ["specific", "shared"]}
BAD = [
    ("no member", {"members": {}}, [], "'members' should have at least 1 entry"),
    (
        "baseline",
        {"baseline": "naiv"},
        [],
        "'baseline' is naiv, which is no member (did you mean 'naive'?): the members are naive, fd",
    ),
    (
        "data",
        {"members": {"naive": {"set": {"data": {"temperature": 1}}}}},
        [],
        "'set' changes data.temperature, but the members share",
    ),
    (
        "steps",
        {"members": {"naive": {"set": {"training": {"steps": 9}}}}},
        [],
        "'set' changes training.steps, but the members take",
    ),
    (
        "directions",
        {"members": {"naive": {"set": {"training": {"directions": ["en-de"]}}}}},
        [],
        "'set' changes training.directions, but the members train on the same directions",
    ),
    (
        "not trained",
        {"members": {"naive": {"trained": False, "each_direction": 3}}},
        [],
        "'each_direction' trains, but 'trained' is false: leave one out",
    ),
    (
        "seed",
        {"members": {"naive": {"set": {"training": {"seed": 9}}}}},
        [],
        "'set' changes training.seed, but the study's 'seeds'",
    ),
    ("name", {"members": {"naive": {"set": {"name": "x"}}}}, [], "'set' changes name, but the members share"),
    (
        "key",
        {"members": {"naive": {"titel": "x"}}},
        [],
        "unknown key 'members.naive.titel' (did you mean 'title'?)",
    ),
    ("key of the study", {"seed": 1}, [], "unknown key 'seed' (did you mean 'seeds'?)"),
    (
        "key of a recipe",
        {"members": {"naive": {"set": {"model": {"hiden": 3}}}}},
        [],
        "of bad.yaml: base.yaml, changed by 'set': unknown",
    ),
    (
        "route",
        {"members": {"naive": {**MEMBER, **ROUTES}}},
        [],
        "member 'naive': the model has no parameters for the route 'shared'",
    ),
    (
        "route twice",
        {"members": {"naive": {"routes": ["shared", "shared"]}}},
        [],
        "'routes' names a route twice",
    ),
    ("seed twice", {"seeds": [1, 1]}, [], "'seeds' names a seed twice"),
    (
        "name of a member",
        {"members": {"naive": {}, "a/b": {}}},
        [],
        "'members.a/b' should consist of letters, digits, '.', '_' and '-'",
    ),
    (
        "asked member",
        {},
        ["--member", "fdd"],
        "member fdd is not in the study (did you mean 'fd'?): it has naive, fd",
    ),
    ("asked seed", {}, ["--seed", "1"], "seed 1 is not in the study: it has 3"),
    ("no recipe", {"recipe": "none.yaml"}, [], "there is no recipe none.yaml"),
    ("processes", {}, ["--nproc", "3"], "ranks cannot share evenly"),
    ("part", {}, ["--part", "3/2"], "'3/2' is no part: write I/N"),
]


@pytest.mark.parametrize(
    ("changes", "options", "sentence"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_bad_studies_get_one_sentence(base, capsys, changes, options, sentence):
    (base / "bad.yaml").write_text(yaml.safe_dump(study_file(**changes), sort_keys=False))
    with inside(base):
        before = tree(Path("."))
        assert main(["study", "bad.yaml", *options]) == 2
        assert tree(Path(".")) == before, "something was written or removed"
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and said.startswith("lsmoe: ") and sentence in said, said


def test_data_that_was_not_prepared(base, capsys):
    value = yaml.safe_load((base / "base.yaml").read_text())
    (base / "other.yaml").write_text(yaml.safe_dump({**value, "name": "other"}, sort_keys=False))
    (base / "bad.yaml").write_text(yaml.safe_dump(study_file(recipe="other.yaml"), sort_keys=False))
    assert main(["study", str(base / "bad.yaml")]) == 2
    assert f"run 'lsmoe data prepare {base / 'other.yaml'}'" in capsys.readouterr().err
    assert main(["study", str(base / "none.yaml")]) == 2
    assert "there is no study" in capsys.readouterr().err


def test_parts_of_a_study_are_all_of_it(base):
    """In the order in which the study goes through its members and seeds."""
    (base / "s.yaml").write_text(yaml.safe_dump(study_file(seeds=[3, 4, 5]), sort_keys=False))
    done: list[tuple[str, int]] = []
    named = {"members": ["fd"], "seeds": [4, 5]}

    def of(part, **chosen):
        done.clear()
        run_study(base / "s.yaml", base / "parts", part=part, **chosen)
        return list(done)

    with (
        mock.patch.object(
            command.Runs, "train", lambda runs, member, seed, processes: done.append((member, seed))
        ),
        mock.patch.object(command.Runs, "evaluate"),
    ):
        everything = [("naive", 3), ("fd", 3), ("naive", 4), ("fd", 4), ("naive", 5), ("fd", 5)]
        assert of(None) == everything
        assert [of(Part(number, 4)) for number in (1, 2, 3, 4)] == [
            everything[number::4] for number in range(4)
        ]
        assert [of(Part(number, 3), **named) for number in (1, 2, 3)] == [[("fd", 4)], [("fd", 5)], []]


@pytest.mark.slow
def test_a_study_that_is_interrupted_and_goes_on(base):
    """Trains two members, each once, whatever happens in between."""
    file, out = base / "s.yaml", base / "out"
    file.write_text(yaml.safe_dump(study_file(), sort_keys=False))
    trained, true = [], command.launch.run

    def recorded(arguments, **options):
        trained.append(Path(arguments[arguments.index("--out") + 1]).name)
        return true(arguments, **options)

    with (
        mock.patch.object(command.launch, "run", recorded),
        mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),
    ):
        with (
            mock.patch.object(command, "evaluate", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            run_study(file, out, ["naive"])
        assert trained == ["naive-seed3"] and not (out / "study.json").exists()

        comparison = run_study(file, out, ["naive"])
        assert trained == ["naive-seed3"], "it was trained already"
        assert [row.seeds for row in comparison.rows] == [(3,), (), ()]
        assert (
            "missing" in (out / "study.md").read_text()
            and json.loads((out / "study.json").read_text())["rows"][1]["gain"] is None
        )

        comparison = run_study(file, out)
        assert trained == ["naive-seed3", "fd-seed3"]
        naive, specific, shared = comparison.rows
        assert [row.seeds for row in comparison.rows] == [(3,), (3,), (3,)] and comparison.runs_missing == 0
        assert (
            specific.costs.parameters
            == shared.costs.parameters
            > specific.costs.serving_all
            > shared.costs.serving_all
        )
        assert shared.costs.serving_one == naive.costs.parameters
        assert naive.costs.minutes.mean > 0 and naive.costs.tokens_per_second.mean > 0
        assert set(specific.directions) == {"en-de", "de-en", "en-fr", "fr-en"} and naive.win_ratio is None
        for route in ("specific", "shared"):
            assert ScoreTable.read(out / "fd-seed3" / f"scores-{route}.json").route == route
        assert (
            Page(out / "study.html").needs_nothing_else() and "missing" not in (out / "study.md").read_text()
        )

        # Nothing is left to do.
        with mock.patch.object(command, "evaluate", side_effect=AssertionError):
            assert run_study(file, out).to_dict() == comparison.to_dict()
        assert main(["study", str(file), "--out", str(out), "--json"]) == 0

        # Killed between two evaluations: only what is missing is done again.
        (out / "fd-seed3" / "scores-shared.json").unlink()
        with mock.patch.object(command, "evaluate", wraps=command.evaluate) as evaluated:
            again = run_study(file, out)
        assert [call.kwargs["route"] for call in evaluated.call_args_list] == ["shared"]
        assert [row.groups for row in again.rows] == [row.groups for row in comparison.rows]

        # Scores by other options are not taken for these.
        file.write_text(yaml.safe_dump(study_file(evaluate={"beam": 2, "limit": 5}), sort_keys=False))
        with mock.patch.object(command, "evaluate", wraps=command.evaluate) as evaluated:
            run_study(file, out, ["naive"])
        assert evaluated.call_count == 1
        assert [len(row["seeds"]) for row in json.loads((out / "study.json").read_text())["rows"]] == [
            1,
            0,
            0,
        ]
        assert trained == ["naive-seed3", "fd-seed3"]

        # A member that was changed is refused before anything is done.
        value = study_file(seeds=[3, 4])
        value["members"]["fd"]["set"]["model"]["low_rank"]["rank"] = 3
        file.write_text(yaml.safe_dump(value, sort_keys=False))
        with pytest.raises(UserError, match=r"was started with model\.low_rank\.rank 2"):
            run_study(file, out, ["naive"], [4])

        # A training that fails ends the study, and the tables are those of before.
        file.write_text(yaml.safe_dump(study_file(seeds=[3, 4]), sort_keys=False))
        before = (out / "study.json").read_text()
        failing = mock.patch.object(command.launch, "run", return_value=5)
        with failing, pytest.raises(UserError, match="training naive, seed 4 ended with status 5"):
            run_study(file, out, [], [4])
        assert (out / "study.json").read_text() == before
    assert trained == ["naive-seed3", "fd-seed3"]


def test_a_lock_that_is_waited_for(tmp_path):
    order = []

    def second():
        with locked(tmp_path / "file", wait=True):
            order.append("second")

    with locked(tmp_path / "file"):
        with pytest.raises(UserError), locked(tmp_path / "file"):
            pass
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.1)
        order.append("first")
    waiting.join(5)
    assert order == ["first", "second"]


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
    del training["start_from"]
    (tmp_path / "from.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load((base / "base.yaml").read_text()), "training": training})
    )
    with pytest.raises(UserError, match=r"'trained' is false, but there is no training\.start_from"):
        load_study(tmp_path / "s.yaml")


def test_a_member_with_a_model_for_each_direction(base, tmp_path):
    members = {"naive": {}, "alone": {"each_direction": 2, "title": "Bilingual"}}
    (base / "alone.yaml").write_text(yaml.safe_dump(study_file(name="alone", members=members)))
    study, out = load_study(base / "alone.yaml"), tmp_path / "out"
    directions = study.recipes["alone"].data.directions
    comparison = run_study(base / "alone.yaml", out)
    both = {row.member: row for row in comparison.rows}
    assert both["alone"].directions.keys() == both["naive"].directions.keys() == set(directions)
    for direction in directions:
        run = out / "alone-seed3" / direction
        recipe = load_recipe(run / "recipe.yaml")
        assert recipe.training.directions == [direction] and recipe.training.steps == 2
        table = ScoreTable.read(run / "scores-specific.json")
        assert [str(score.direction) for score in table.directions] == [direction]
        assert both["alone"].directions[direction]["chrfpp"].mean == table.directions[0].metrics.chrfpp
    costs = both["alone"].costs
    assert costs.parameters == costs.serving_all == 4 * both["naive"].costs.parameters
    assert costs.serving_one == both["naive"].costs.serving_one and costs.minutes is not None
    before = tree(out)
    run_study(base / "alone.yaml", out)
    changed = {path for path, content in tree(out).items() if before.get(path) != content}
    assert not [path for path in changed if "alone-seed3" in str(path)], "nothing is done again"


def test_scores_are_of_the_directions_that_the_recipe_trains(base, tmp_path):
    recipe = load_recipe(base / "base.yaml", ["training.directions=[en-de, de-en]"])
    (base / "some.yaml").write_text(recipe.to_yaml())
    file = study_file(name="some", recipe="some.yaml", members={"naive": {}, "alone": {"each_direction": 1}})
    (base / "of_some.yaml").write_text(yaml.safe_dump(file))
    found = run_study(base / "of_some.yaml", tmp_path / "out")
    assert [sorted(row.directions) for row in found.rows] == [["de-en", "en-de"]] * 2


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

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
from support import PROJECT
from support.commands import inside, main, tree
from support.pages import Page
from support.small_encoder import write_encoder
from support.small_host import write_host
from support.small_study import prepared_base, study_file

from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.folders import locked
from lsmoe_ds.inference.load import check_route
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.study import command
from lsmoe_ds.study.command import run_study
from lsmoe_ds.study.settings import load_study


def test_the_studies_that_come_with_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Which some of them are for.
    write_host(tmp_path / "data/models/smollm2", max_position_embeddings=2048)
    write_encoder(tmp_path / "data/models/small-xlm-r", max_position_embeddings=258)
    for path in sorted((PROJECT / "studies").glob("*.yaml")):
        study = load_study(path)
        assert study.settings.name == path.stem
        for member, route in study.rows():
            plan(study.recipes[member])
            check_route(route, study.recipes[member])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prepared_base(tmp_path_factory.mktemp("study"))


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

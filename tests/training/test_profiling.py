"""Some steps of a training are traced, on every rank, and it says where."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.loops import recipe_in, records, weights
from support.small_run import write_corpus

from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training import loop as module
from lsmoe_ds.training import profiling
from lsmoe_ds.training.profiling import Profiler, Traced


@pytest.mark.parametrize(
    ("text", "first", "last"), [("10-12", 10, 12), ("7", 7, 7), ("3-3", 3, 3), ("100-2000", 100, 2000)]
)
def test_steps_are_read_and_passed_on(text, first, last):
    found = Traced.parse(text)
    assert (found.first, found.last) == (first, last)
    assert Traced.parse(*found.arguments()[1:]) == found


@pytest.mark.parametrize("text", ["12-10", "0", "0-3", "a", "1-", "-2", "1-2-3", "", "1.5", "٣"])
def test_what_names_no_steps_is_refused(text):
    with pytest.raises(UserError, match="give a step, or the first and the last of several"):
        Traced.parse(text)


def test_without_options_nothing_is_traced():
    assert Traced.parse(None) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profiling")
    write_corpus(path)
    prepare(recipe_in(path))
    return path


def train(topology, recipe, run: Path, traced: Traced | None, stop_in: int = 0) -> list[str]:
    """Train, asked to stop in a step; return what was said."""
    said: list[str] = []
    number, true_step = 0, module.train_step

    def step(engine, batch, step_number, *arguments):
        nonlocal number
        number = step_number
        return true_step(engine, batch, step_number, *arguments)

    if topology.is_main:
        open_run(recipe, run, recipe.prepared / "vocabulary.model")
    with (
        mock.patch.object(module, "train_step", step),
        mock.patch.object(
            module.interrupt, "agreed", lambda _: 15 if stop_in and number == stop_in else None
        ),
        mock.patch.object(module.Monitor, "say", lambda self, text: said.append(text)),
    ):
        module.train(recipe, run, topology, traced)
    return said


def marks(trace: Path) -> list[str]:
    """Return the steps that a Chrome trace has, in their order."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [each for each in events if each.get("cat") == "user_annotation" and each["name"][:5] == "step "]
    assert any(each.get("name", "").startswith("aten::") for each in events)
    return [each["name"] for each in sorted(found, key=lambda each: each["ts"])]


def test_each_rank_traces_the_steps_and_the_training_is_the_same(pool, folder):
    recipe = recipe_in(folder, steps=4, expert=2)
    said = pool.run(2, train, recipe, folder / "traced", Traced(2, 3), expert=2)[0]
    profile = folder / "traced" / "profile"
    assert sorted(path.name for path in profile.iterdir()) == [
        "steps-2-3-operators.txt",
        "steps-2-3-rank-00000.json.gz",
        "steps-2-3-rank-00001.json.gz",
    ]
    for rank in (0, 1):
        assert marks(profile / f"steps-2-3-rank-0000{rank}.json.gz") == ["step 2", "step 3"]
    table = (profile / "steps-2-3-operators.txt").read_text()
    assert "aten::" in table and len(table.splitlines()) < profiling.ROWS + 12
    assert (
        f"profiled steps-2-3: operators in {profile}/steps-2-3-operators.txt, the trace in {profile}/"
        "steps-2-3-rank-00000.json.gz, and those of 1 other rank beside it: ui.perfetto.dev and "
        "chrome://tracing show it"
    ) in said
    pool.run(2, train, recipe, folder / "plain", None, expert=2)
    assert not (folder / "plain" / "profile").exists()
    assert records(folder / "plain") == records(folder / "traced")
    one, other = weights(folder / "plain", 4), weights(folder / "traced", 4)
    assert all(one[name].equal(other[name]) for name in one)


def test_steps_that_are_cut_short_are_written_and_others_are_told(pool, folder):
    recipe, run = recipe_in(folder, steps=5), folder / "cut"
    pool.run(1, train, recipe, run, Traced(2, 9), 2)
    assert marks(run / "profile" / "step-2-rank-00000.json.gz") == ["step 2"]
    (said,) = pool.run(1, train, recipe, run, Traced(1, 2))
    assert "nothing is profiled: this training takes none of the steps 1-2" in said
    assert len(list((run / "profile").iterdir())) == 2
    (said,) = pool.run(1, train, recipe_in(folder, steps=6), run, Traced(7, 7))
    assert "nothing is profiled: this training takes none of the steps 7" in said


@pytest.mark.parametrize("error", [None, MemoryError()])
def test_the_memory_of_the_steps_is_kept_even_where_it_is_short(tmp_path, error):
    """Of a GPU that is played."""
    calls: list[tuple] = []
    played = {
        "_record_memory_history": lambda *arguments, **options: calls.append((arguments, options)),
        "_dump_snapshot": lambda path: Path(path).write_bytes(b"snapshot"),
    }
    said: list[str] = []
    with mock.patch.multiple(torch.cuda.memory, **played):
        try:
            with Profiler(Traced(1, 2, memory=True), tmp_path, Topology.single(), said.append) as profiler:
                for number in (1, 2, 3):
                    profiler.before_step(number)
                    if error is not None and number == 2:
                        raise error
                    profiler.after_step(number)
        except MemoryError:
            assert error is not None
    path = tmp_path / "profile" / "steps-1-2-rank-00000-memory.pickle"
    assert path.read_bytes() == b"snapshot" and any(str(path) in text for text in said)
    assert calls == [((), {"max_entries": profiling.ALLOCATIONS}), ((), {"enabled": None})]
    assert (tmp_path / "profile" / "steps-1-2-operators.txt").exists() == (error is None)


def test_a_profile_that_cannot_be_written_ends_no_training(tmp_path):
    (tmp_path / "profile").write_text("a file")
    said: list[str] = []
    with Profiler(Traced(1, 1), tmp_path, Topology.single(), said.append) as profiler:
        profiler.before_step(1)
        profiler.after_step(1)
    assert said[0].startswith("the profile is not written: ")

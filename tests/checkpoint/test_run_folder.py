"""How a run folder is made, which checkpoints it keeps, who may write it, and that what is written is on the
disk before it is named.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_run import make_recipe
from support.starts import changed
from typer.testing import CliRunner

from lsmoe_ds import interrupt
from lsmoe_ds.checkpoint import run_folder
from lsmoe_ds.checkpoint.run_folder import choose_run, find_changes, list_checkpoints, open_run, to_remove
from lsmoe_ds.cli import app
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import locked, replaced, write_whole
from lsmoe_ds.training import start

DEV_LOSS = {10: 3.0, 20: 1.5, 30: None, 40: 2.0, 50: 2.5}


def test_the_recipe_of_a_run_goes_on_in_its_folder(tmp_path, monkeypatch):
    """Also where the folder is not runs/NAME, as one made by ``convert --as layout``."""
    recipe, run, out = make_recipe(tmp_path, None, None), tmp_path / "elsewhere", Path("other")
    (tmp_path / "vocabulary.model").write_bytes(b"pieces")
    open_run(recipe, run, tmp_path / "vocabulary.model")
    (tmp_path / "small.yaml").write_text(recipe.to_yaml())
    trained: list[Path] = []
    monkeypatch.setattr(interrupt, "leave_before_training", lambda: None)
    monkeypatch.setattr(start, "train", lambda recipe, run, *_: trained.append(run) or 0)
    for arguments in ([run / "recipe.yaml"], [run / "recipe.yaml", "--out", out], [tmp_path / "small.yaml"]):
        assert CliRunner().invoke(app, ["train", *map(str, arguments)]).exit_code == 0
    assert trained == [run, out, Path("runs/small")]
    planned = CliRunner().invoke(app, ["plan", str(run / "recipe.yaml"), "--json"]).stdout
    assert json.loads(planned)["run"] == str(run), "slurm/submit.sh reads it"
    (run / "provenance.json").write_text("{}")
    assert choose_run(run / "recipe.yaml", recipe, None) == Path("runs/small"), "for a training to come"


def test_a_run_that_has_not_trained_takes_another_recipe(tmp_path):
    """One that was refused for its data, or for a model that it reads, is mended and started again."""
    recipe, run = make_recipe(tmp_path, None, None), tmp_path / "run"
    vocabulary = tmp_path / "vocabulary.model"
    vocabulary.write_bytes(b"pieces")
    open_run(recipe, run, vocabulary)
    other = changed(recipe, training={"seed": recipe.training.seed + 1})
    vocabulary.write_bytes(b"other pieces")
    open_run(other, run, vocabulary)
    assert load_recipe(run / "recipe.yaml").training.seed == other.training.seed
    assert (run / "vocabulary.model").read_bytes() == b"other pieces"
    for trace in ("metrics.jsonl", "checkpoints/step-1/state.json"):
        (run / trace).parent.mkdir(parents=True, exist_ok=True)
        (run / trace).write_text("{}\n")
        with pytest.raises(UserError, match=f"was started with training.seed {other.training.seed}"):
            open_run(recipe, run, vocabulary)
        (run / trace).unlink()


def test_a_run_notes_the_weights_that_it_began_with(tmp_path):
    """A training that is killed before its first checkpoint begins again, perhaps with others."""
    recipe, run, start = make_recipe(tmp_path, None, None), tmp_path / "run", tmp_path / "start"
    start.mkdir()
    (start / "recipe.yaml").write_text(recipe.to_yaml())
    recipe = changed(recipe, training={"start_from": str(start)})
    (tmp_path / "vocabulary.model").write_bytes(b"pieces")
    (tmp_path / "manifest.json").write_text('{"files": {}}')

    def begin(weights: str) -> str:
        (start / "provenance.json").write_text(json.dumps({"files": {"m.safetensors": {"sha256": weights}}}))
        open_run(recipe, run, tmp_path / "vocabulary.model")
        noted = json.loads((run / "origin.json").read_text())["start"]
        return {run_folder.weights_digest(start): "now"}.get(noted, "before")

    assert begin("a") == "now"
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert begin("b") == "now"
    (run / "checkpoints" / "step-2").mkdir(parents=True)
    assert begin("c") == "before"


def test_a_section_that_only_one_recipe_has_is_one_change(tmp_path):
    recipe = make_recipe(tmp_path, None, None)
    method = changed(recipe, model={"low_rank": {"rank": 2}})
    assert list(find_changes(recipe, method)) == [("model.low_rank", None, "one")]
    assert list(find_changes(method, recipe)) == [("model.low_rank", "one", None)]
    other = changed(method, model={"low_rank": {"rank": 3}})
    assert list(find_changes(method, other)) == [("model.low_rank.rank", 2, 3)]


@pytest.mark.parametrize(
    ("keep", "best", "removed"),
    [(2, 0, [10, 20, 30]), (1, 1, [10, 30, 40]), (2, 2, [10, 30]), (1, 9, [30]), (9, 0, [])],
)
def test_the_newest_and_the_best_stay(tmp_path, keep, best, removed):
    for step, loss in DEV_LOSS.items():
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "dev_loss": loss}))
    assert [path.name for path in to_remove(list_checkpoints(tmp_path), keep, best)] == [
        f"step-{step}" for step in removed
    ]


def test_of_equal_checkpoints_the_first_is_the_best(tmp_path):
    for step in (4, 14, 20):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "dev_loss": 1.0, "dev_chrf": 2.0}))
    for by_chrf in (False, True):
        removed = to_remove(list_checkpoints(tmp_path), 1, 1, by_chrf)
        assert [path.name for path in removed] == ["step-14"]


def lock_in_another_process(path: Path) -> str:
    """Try to lock ``path`` in another process and return what that process prints."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom lsmoe_ds.folders import locked\ntry:\n    with "
        "locked(Path(sys.argv[1])):\n        print('held')\nexcept Exception as error:\n    print(error)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """``s/real``, and two more names for it: ``link`` to the folder itself, ``other/real`` through a link to
    its parent.
    """
    (tmp_path / "s" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("s/real")
    (tmp_path / "other").symlink_to("s")
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second"), [("link", "s/real"), ("s/real", "link"), ("other/real", "link")]
)
def test_a_folder_has_one_lock_whatever_its_name(linked, first, second):
    # flock holds between descriptors, so that a second attempt of this process is refused like that of
    # another one
    refused = pytest.raises(UserError, match=f"another process is writing {linked / second}")
    with locked(linked / first), refused, locked(linked / second):
        pass
    with locked(linked / second):
        assert not (linked / ".link.lock").exists() and (linked / "s" / ".real.lock").exists()


def test_a_lock_leaves_no_file(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(UserError), locked(tmp_path / "run"):
        pass
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "run"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_inherits_a_lock_keeps_it_and_its_file(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with locked(tmp_path / "run") as lock:
        heir = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(lock,))
    with heir, pytest.raises(UserError, match="another process is writing"), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    place, flock, taken = tmp_path / ".run.lock", fcntl.flock, []

    def late(file, how):
        if not taken:
            place.unlink()  # by who held it, after we had opened it
            place.touch()  # by the next one
        taken.append(how)
        flock(file, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with locked(tmp_path / "run") as lock:
            assert os.path.samestat(os.fstat(lock), place.stat()) and len(taken) == 2
    assert list(tmp_path.iterdir()) == []


def test_processes_that_wait_for_a_lock_have_it_one_by_one(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom lsmoe_ds.folders import locked\nfile = "
        "Path(sys.argv[1])\nfor _ in range(100):\n    with locked(file, wait=True):\n       "
        " file.write_text(str(int(file.read_text()) + 1))\n"
    )
    (tmp_path / "count").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "count")]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "300" and [path.name for path in tmp_path.iterdir()] == [
        "count"
    ]


def test_two_processes_cannot_hold_two_names_of_one_folder(linked):
    with locked(linked / "link"):
        assert "another process is writing" in lock_in_another_process(linked / "s/real")


def test_two_names_of_a_folder_that_is_not_there_yet(tmp_path):
    (tmp_path / "link").symlink_to("later/run")
    with locked(tmp_path / "link"), pytest.raises(UserError), locked(tmp_path / "later" / "run"):
        pass


@pytest.mark.parametrize("name", ["link", "other/real"])
def test_a_link_is_written_through(linked, name):
    (linked / "s/real/old").write_text("old")
    with locked(linked / name), replaced(linked / name) as new:
        (new / "fresh").write_text("fresh")
    write_whole(linked / name / "fresh", "again")
    (linked / "file").symlink_to("s/real/fresh")
    write_whole(linked / "file", "through")
    assert (
        (linked / "link").is_symlink() and (linked / "other").is_symlink() and (linked / "file").is_symlink()
    )
    assert [path.name for path in (linked / "s/real").iterdir()] == ["fresh"]
    assert (linked / "s/real/fresh").read_text() == "through"


def test_a_file_in_place_of_the_run_is_one_sentence(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run is a file: choose a folder with --out"):
        run_folder.check_run(
            make_recipe(tmp_path, None, None), tmp_path / "run", tmp_path / "vocabulary.model"
        )


def test_links_in_a_circle_are_one_sentence(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="lead in a circle"), locked(tmp_path / "a"):
        pass


class Recorder:
    """Stands for ``os.fsync`` and the renames of ``os`` and notes the order of the calls, by path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def record_sync(descriptor: int) -> None:
            self.calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def record(move):
            def call(source, target, **options):
                self.calls.append(("rename", str(target)))
                move(source, target, **options)

            return call

        monkeypatch.setattr(os, "fsync", record_sync)
        monkeypatch.setattr(os, "rename", record(rename))
        monkeypatch.setattr(os, "replace", record(replace))


def test_a_folder_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    place = tmp_path / "made"
    with replaced(place) as new:
        (new / "inner").mkdir()
        for name in ("a", "inner/b"):
            (new / name).write_text(name)
        recorder = Recorder(monkeypatch)
    renamed = recorder.calls.index(("rename", str(place)))
    before, after = recorder.calls[:renamed], recorder.calls[renamed + 1 :]
    assert {path for _, path in before} == {
        str(path) for path in (new, new / "a", new / "inner", new / "inner/b")
    }
    assert after == [("sync", str(tmp_path))]  # the new name itself


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    write_whole(tmp_path / "scores.json", "{}")
    (first, temporary), second = recorder.calls
    assert (
        first == "sync"
        and Path(temporary).parent == tmp_path
        and Path(temporary).name.startswith(".scores.json.")
    )
    assert second == ("rename", str(tmp_path / "scores.json"))


def test_a_run_that_was_killed_while_it_was_made_is_made_again(tmp_path, monkeypatch):
    recipe, vocabulary, run = (
        make_recipe(tmp_path, None, None),
        tmp_path / "vocabulary.model",
        tmp_path / "run",
    )
    vocabulary.write_bytes(b"pieces")

    def killed(path, text):
        path.with_name(f".{path.name}.here.1").write_text(text[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "write_whole", killed)
        open_run(recipe, run, vocabulary)
    open_run(recipe, run, vocabulary)
    assert (run / "recipe.yaml").read_text() == recipe.to_yaml() and (
        run / "vocabulary.model"
    ).read_bytes() == b"pieces"

    (run / "recipe.yaml").unlink()
    (run / "vocabulary.model").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_run(recipe, run, vocabulary)

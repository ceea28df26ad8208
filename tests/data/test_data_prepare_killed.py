"""Preparations that are killed, cut off, or out of disk: the data of before stay, and the next one ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_corpora import recipe, write_three_bitexts

from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_three_bitexts(tmp_path)
    return tmp_path


KILLED = """
import signal, sys, time, yaml
# a shell's background jobs ignore it, and their children
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data import prepare as module
step, recipe = sys.argv[1], Recipe.model_validate(yaml.safe_load(sys.argv[2]))
def wait(*_):
    print("here", flush=True)
    time.sleep(60)
at = {"tokens": (module.Preparation, "_write_tokens"), "manifest": (module, "write_json")}[step]
setattr(*at, wait)
module.prepare(recipe)
"""


@pytest.mark.parametrize("step", ["tokens", "manifest"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle(
    root: Path, step: str, how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(root)
    other = recipe(root, vocabulary={"size": 110, "character_coverage": 1.0})
    before = prepare(settings).manifest
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, step, other.to_yaml()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    with pytest.raises(UserError, match=r"another process is .* 'data.vocabulary.size' is 110 where .* 130"):
        prepare(recipe(root, vocabulary={"size": 130, "character_coverage": 1.0}))
    process.send_signal(how)
    process.wait()
    assert PreparedData.open(settings.prepared, verify=True).manifest == before
    assert how != signal.SIGINT or not (settings.prepared.parent / ".small.partial").exists()
    capsys.readouterr()
    assert prepare(other).vocabulary.size == 110
    assert "'data.vocabulary.size' was 120" in capsys.readouterr().err
    assert not (settings.prepared.parent / ".small.partial").exists()


def test_prepared_again_through_a_link(root: Path) -> None:
    """The folder that the link leads to is replaced; the link stays."""
    folder = prepare(recipe(root)).folder
    (root / "large disk").mkdir()
    folder.rename(root / "large disk" / "x")
    folder.symlink_to(root / "large disk" / "x")
    before = (folder / "manifest.json").stat().st_ino
    prepare(recipe(root), force=True)
    assert folder.is_symlink() and (root / "large disk/x/manifest.json").stat().st_ino != before
    assert not (root / "large disk" / ".x.partial").exists()


def test_cut_off_between_the_two_renames(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare(recipe(root)).folder
    folder.rename(folder.with_name(".small.old"))
    capsys.readouterr()
    prepare(recipe(root))
    assert "up to date" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bitext", "tokens", "vocabulary", "manifest"])
def test_full_disk(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = prepare(recipe(root)).manifest

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {
        "bitext": "lsmoe_ds.data.shards.save_sorted",
        "tokens": "lsmoe_ds.data.tokens.ArrayFile.close",
        "vocabulary": "lsmoe_ds.data.vocabulary.Vocabulary.save",
        "manifest": "lsmoe_ds.data.prepare.write_json",
    }
    with monkeypatch.context() as patch:
        patch.setattr(where[name], full)
        with pytest.raises(UserError, match="the disk is full"):
            prepare(recipe(root, temperature=2.0))
    assert PreparedData.open(recipe(root).prepared, verify=True).manifest == before
    kept = [] if name == "bitext" else [".small.work"]
    assert sorted(p.name for p in recipe(root).prepared.parent.iterdir()) == [*kept, "small"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_full_disk_in_earnest(root: Path) -> None:
    small = root / "tiny"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (small / "corpora").symlink_to(root / "corpora")
        with pytest.raises(UserError, match="the disk is full"):
            prepare(recipe(small))
        assert [p.name for p in (small / "prepared").iterdir() if p.name != ".small.work"] == []
    finally:
        subprocess.run(["umount", small], check=True)

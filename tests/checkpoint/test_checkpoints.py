"""A checkpoint is on the disk before it has its name; validations that could find nothing are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.sameness import VOCABULARY
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe, write_corpus

from lsmoe_ds.checkpoint.run_folder import list_checkpoints
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError
from lsmoe_ds.training.start import check


def save_twice(topology, recipe: Recipe, run: Path) -> list[tuple[str, str, list[str]]]:
    """Save twice and keep one; return what was synced, renamed and removed, each with its unsynced files."""
    import shutil
    from unittest import mock

    from lsmoe_ds.checkpoint import saving as checkpoints
    from lsmoe_ds.training.engine import build_engine

    engine, events, synced = build_engine(recipe, VOCABULARY, topology), [], {}
    true_sync, true_rename, true_remove = os.fsync, os.rename, shutil.rmtree

    def note(what: str, path: str | Path) -> None:
        below = [found for found in Path(path).rglob("*") if found.is_file()] if what != "sync" else []
        unsynced = [found.name for found in below if synced.get(str(found)) != found.stat().st_mtime_ns]
        events.append((what, Path(path).name, unsynced))

    def sync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced[path] = os.stat(path).st_mtime_ns
        note("sync", path)
        return true_sync(descriptor)

    def rename(old, new, **options):
        note("rename", old)
        true_rename(old, new, **options)
        synced.update({path.replace(str(old), str(new)): time for path, time in synced.items()})

    def remove(path, *arguments, **options):
        note("remove", path)
        return true_remove(path, *arguments, **options)

    with (
        mock.patch.object(os, "fsync", sync),
        mock.patch.object(os, "rename", rename),
        mock.patch.object(shutil, "rmtree", remove),
        checkpoints.Saver(run, topology, keep=1) as saver,
    ):
        saver.save(engine, 1, {})
        saver.save(engine, 2, {})
    engine.destroy()
    return events


def test_all_is_synced_before_it_has_its_name_and_the_name_before_the_older_one_goes(pool, tmp_path):
    recipe = make_recipe(tmp_path, TOKEN_TOP2, TARGET_TOP2)
    (events,) = pool.run(1, save_twice, recipe, tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-2"]
    happened = [(what, name) for what, name, _ in events]
    for step in (1, 2):
        partial = f".writing-step-{step}"
        named = happened.index(("rename", partial))
        assert not events[named][2], "every file was synced after its last change"
        assert happened[named - 1] == ("sync", partial), "the folder last: with the names of its files"
        assert happened[named + 1] == ("sync", "checkpoints"), "the name itself"
    assert happened.index(("rename", "step-1")) > named + 1
    assert happened[-1] == ("remove", ".writing-step-1-removed")


def test_validations_without_dev_pairs_are_refused(tmp_path):
    """Their loss would be 0, and the best of all."""
    write_corpus(tmp_path)
    recipe = make_recipe(tmp_path, None, None)
    recipe.data.held_out.dev = 0
    prepare(recipe)
    check(recipe, tmp_path / "run")
    recipe.training.validate_every = 2
    with pytest.raises(
        UserError,
        match=r"'training.validate_every' is 2, but .* has no dev pairs: set it to 0, or raise 'data.held",
    ):
        check(recipe, tmp_path / "other")
    assert not (tmp_path / "other").exists()

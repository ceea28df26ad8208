"""A save ends beside training, stores what was there when it began, and tells its error on each rank."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from threading import current_thread

import pytest
import torch
from support.loops import recipe_of
from support.small_run import write_corpus

from lsmoe_ds.checkpoint.run_folder import find_damage, list_checkpoints
from lsmoe_ds.checkpoint.saving import UNFINISHED
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saving")
    write_corpus(path)
    prepare(recipe_of(path, 2))
    return path


def save_beside_training(topology, recipe, run: Path) -> None:
    """Check that training continues while a checkpoint is written, and that a full disk is an error.

    The next save waits for the one before. Syncing to disk waits until it is released, and it finds the disk
    full the third time.
    """
    from threading import Event, Timer

    from lsmoe_ds.checkpoint import saving as checkpoints
    from lsmoe_ds.data.prepared import PreparedData
    from lsmoe_ds.training.engine import build_engine

    engine = build_engine(recipe, PreparedData.open(recipe.prepared).vocabulary.size, topology)
    go_on, true_sync = Event(), checkpoints.sync

    def sync(path: Path, contents: bool = True) -> None:
        if path.name.endswith("step-3"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert go_on.wait(60)
        true_sync(path, contents)

    checkpoints.sync = sync
    try:
        with (
            pytest.raises(UserError, match="step-3 cannot be written: the disk is full"),
            checkpoints.Saver(run, topology, keep=9) as saver,
        ):
            saver.save(engine, 1, {})
            assert list_checkpoints(run) == [], "training would go on here"
            if topology.is_main:
                Timer(0.5, go_on.set).start()
            saver.save(engine, 2, {})
            assert run / "checkpoints" / "step-1" in list_checkpoints(run), (
                "the next save waits for the one before"
            )
            saver.save(engine, 3, {})
    finally:
        checkpoints.sync = true_sync


def test_a_save_ends_beside_training_and_its_error_is_told(pool, folder):
    run = folder / "beside"
    pool.run(1, save_beside_training, recipe_of(folder, 2), run)
    assert [(path.name, find_damage(path)) for path in list_checkpoints(run)] == [
        ("step-1", None),
        ("step-2", None),
    ]
    assert not list((run / "checkpoints").glob(f"{UNFINISHED}*"))


def save_where(topology, recipe, run: Path, memory: int, failing: bool) -> str | None:
    """Save with ``memory`` bytes of free memory and return the rank's error message, or None.

    With ``failing`` the disk of the second rank is full.
    """
    from types import SimpleNamespace
    from unittest import mock

    from lsmoe_ds.checkpoint import saving as checkpoints
    from lsmoe_ds.data.prepared import PreparedData
    from lsmoe_ds.training.engine import build_engine

    engine = build_engine(recipe, PreparedData.open(recipe.prepared).vocabulary.size, topology)
    saver, write, threads = checkpoints.Saver(run, topology, keep=1), torch.save, set()

    def save(value, path) -> None:
        threads.add(current_thread())
        if failing and topology.rank == 1 and not str(path).endswith("random-rank-00001.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(value, path)

    def slowly(path: Path, text: str, encoding: str = "utf-8") -> None:
        path.touch()
        time.sleep(5 * checkpoints.POLL)  # the other rank looks meanwhile
        path.write_bytes(text.encode(encoding))

    room, write_text = (
        SimpleNamespace(available=memory),
        slowly if failing and topology.rank == 1 else Path.write_text,
    )
    with (
        mock.patch.object(checkpoints.psutil, "virtual_memory", lambda: room),
        mock.patch.object(torch, "save", save),
        mock.patch.object(Path, "write_text", write_text),
    ):
        saver.save(engine, 1, {})
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.zero_()  # as a step of training would change it
        try:
            saver.finish() if not failing else saver._unfinished.result()
        except UserError as error:
            return str(error)
        finally:
            saver._thread.shutdown()
    assert (len(threads) == 2) == (memory > 0), "in the background where there is room for a copy"
    return None


@pytest.mark.parametrize("memory", [2**40, 0], ids=["copied", "no room for copies"])
def test_what_is_saved_is_what_was_there(pool, folder, memory):
    from lsmoe_ds.checkpoint.reading import read_checkpoint

    run, recipe = folder / f"memory-{memory}", recipe_of(folder, 2, expert=2)
    assert pool.run(2, save_where, recipe, run, memory, False, expert=2) == [None, None]
    assert find_damage(run / "checkpoints" / "step-1") is None
    weights = read_checkpoint(run / "checkpoints" / "step-1").weights
    assert (
        weights["embedding.tokens.weight"].any()
        and weights["encoder.1.feed_forward.experts.3.expand.weight"].any()
    )


def test_the_main_rank_hears_of_a_disk_that_is_full_elsewhere(pool, folder):
    first, second = pool.run(
        2, save_where, recipe_of(folder, 2, expert=2), folder / "elsewhere", 2**40, True, expert=2
    )
    assert "on rank 1: " in first and "No space left" in first and "cannot be written" in second
    assert list_checkpoints(folder / "elsewhere") == []

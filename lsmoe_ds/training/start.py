"""From a recipe to running processes: what can be refused is refused before any is started."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from lsmoe_ds.config import Recipe
from lsmoe_ds.convert.folder import PROVENANCE, find_model, read_weights
from lsmoe_ds.convert.tensors import Tensors
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, locked, read_fields, sha256
from lsmoe_ds.inference.load import empty_model
from lsmoe_ds.parallel import interrupt, launch
from lsmoe_ds.parallel.topology import Topology, check_world
from lsmoe_ds.run_folder import check_run, newest_whole, open_run
from lsmoe_ds.training.engine import engine_config

STARTS = ("consolidated", "hybrid", "dense")  # kinds of converted folders that a training begins with


def check(recipe: Recipe, run: Path, world: int) -> None:
    """Opens the run folder; raises UserError for whatever ``world`` processes could only fail on later."""
    layout = recipe.parallel
    check_world(world, layout.tensor, layout.expert)
    engine_config(recipe, Topology(world=world, tensor=layout.tensor, data=world // layout.tensor, expert=layout.expert))
    prepared = PreparedData.open(recipe.prepared)
    if set(recipe.languages.directions) != set(prepared.languages.directions):
        raise UserError(f"{recipe.prepared} was prepared for other directions than the recipe's: run 'lsmoe data prepare' on the recipe")
    vocabulary = prepared.folder / "vocabulary.model"
    check_run(recipe, run, vocabulary)
    found, _ = newest_whole(run)
    if found is None and recipe.training.start_from is not None:
        _check_start_from(recipe, recipe.training.start_from, vocabulary)
    open_run(recipe, run, vocabulary)


def _check_start_from(recipe: Recipe, folder: Path, vocabulary: Path) -> None:
    """Raises UserError unless the folder holds weights for this recipe, and for this vocabulary."""
    try:
        stored = find_model(folder)
        if stored.kind not in STARTS:
            made = "a run" if stored.kind == "sparse" else f"made by `lsmoe convert --to {stored.kind}`"
            raise UserError(f"{folder} is {made}: give a folder that was made with --to {', '.join(STARTS)}")
        if sha256(stored.vocabulary) != sha256(vocabulary):
            raise UserError(f"its vocabulary is not the prepared one: set data.vocabulary.file to {stored.vocabulary} and prepare again")
        weights = read_weights(stored)
        empty_model(recipe, Vocabulary.load(vocabulary).size, Tensors.of(weights.tensors), Topology.single())
        if wrong := damage(stored.home, read_fields(stored.home / PROVENANCE, files=dict)["files"], verify=True):
            raise UserError(f"{stored.home} is damaged: {wrong}")
    except UserError as error:
        raise UserError(f"'training.start_from' is {folder}: {error}") from None


def train_on(recipe: Recipe, run: Path, processes: int | None) -> int:
    """Trains on ``processes`` processes of this machine (by default as few as the layout needs); returns the exit status: 0 after
    the last step, :data:`interrupt.STATUS` when asked to stop."""
    world = processes or launch.smallest_world(recipe)
    with locked(run) as lock:
        check(recipe, run, world)
        if world == 1:
            return _join_and_train(recipe, run)
        return launch.start(["train", str(run / "recipe.yaml"), "--out", str(run)], world, lock)


def train_here(recipe: Recipe, run: Path) -> int:
    """Trains as one of the processes that a launcher has started; returns the exit status."""
    import torch.distributed as dist

    launch.join()
    main = dist.get_rank() == 0
    with locked(run) if main and launch.LOCKED not in os.environ else nullcontext():
        if main:
            check(recipe, run, dist.get_world_size())
        dist.barrier()
        return _join_and_train(recipe, run)


def _join_and_train(recipe: Recipe, run: Path) -> int:
    import torch.distributed as dist

    from lsmoe_ds.training.loop import train

    if not dist.is_initialized():
        launch.join()
    finished = train(recipe, run, Topology.build(recipe.parallel.tensor, recipe.parallel.expert, launch.device()))
    dist.destroy_process_group()
    return 0 if finished else interrupt.STATUS

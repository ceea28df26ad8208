"""Convert a run to another layout without training: ``lsmoe convert --as layout``.

Each process of the new layout loads its part of weights and optimizer state, and saves it as if it had
trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsmoe_ds.checkpoint.optimizer import STATE, open_optimizer
from lsmoe_ds.checkpoint.run_folder import find_changes, open_run
from lsmoe_ds.checkpoint.stored import RECIPE, Stored, check_writable, find_model, read_weights
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.layout import check_layout
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.comparison import ORIGIN
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import explain_errors, locked, read_fields, replaced
from lsmoe_ds.launch import joining
from lsmoe_ds.launch import processes as launch
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import check_precision


def convert_layout(path: Path, overrides: Sequence[str], out: Path, processes: int | None) -> dict[str, Any]:
    """Start the processes that write the run folder ``out``, completely or not at all; return what was
    written.

    ``path`` is a run, a checkpoint, or a consolidated folder with the optimizer's state; ``overrides`` change
    its recipe where a resumed run may (``parallel.tensor=2``). Raises UserError for what is not possible.
    """
    stored = find_model(path)
    recipe = load_recipe(stored.home / RECIPE, overrides)
    if stored.kind not in ("sparse", "consolidated"):
        raise UserError(
            f"{path} was made by `lsmoe convert --as {stored.kind}`: only a run or a consolidated folder "
            "resumes in another layout"
        )
    for key, before, now in find_changes(stored.recipe, recipe):
        raise UserError(
            f"{path} was trained with {key} {before}, and --set makes it {now}: another layout is of the "
            "same training, so leave that --set out; it takes parallel, deepspeed.zero_optimization and the "
            "other keys that a resumed run may change (docs/recipe.md, Resuming a run)"
        )
    open_optimizer(stored.weights_in, verify=True)
    world = processes or launch.smallest_world(recipe)
    layout = recipe.parallel
    check_layout(recipe, world)
    check_precision(recipe)
    check_writable(out)
    with locked(out) as lock, replaced(out) as new, explain_errors(out):
        open_run(recipe, new, stored.vocabulary)
        for name in ("metrics.jsonl", ORIGIN):
            if (stored.home / name).exists():
                shutil.copyfile(stored.home / name, new / name)
        arguments = ["write-layout", str(stored.weights_in), str(new)]
        if status := launch.start(arguments, world, lock):
            raise UserError(
                f"the processes of the new layout failed with status {status}: {out} was not written"
            )
    return {
        "kind": "layout",
        "processes": world,
        "tensor": layout.tensor,
        "expert": layout.expert,
        "run": str(out),
    }


def write_layout(path: Path, run: Path) -> None:
    """Join the other processes and write this one's part of the model at ``path`` into a checkpoint of
    ``run``.
    """
    import torch.distributed as dist

    joining.join()
    recipe = load_recipe(run / RECIPE)
    layout = recipe.parallel
    topology = Topology.build(layout.tensor, layout.expert, joining.device(), layout.node)
    reshard(find_model(path), recipe, run, topology)
    dist.destroy_process_group()


def reshard(stored: Stored, recipe: Recipe, run: Path, topology: Topology) -> None:
    """Load a model into an engine of this recipe's layout, and save that. Called by every rank."""
    from lsmoe_ds.checkpoint.resharding import load_resharded
    from lsmoe_ds.checkpoint.saving import Saver
    from lsmoe_ds.data.vocabulary import Vocabulary
    from lsmoe_ds.training.engine import build_engine

    weights, state = read_weights(stored), read_fields(stored.weights_in / STATE, step=int, position=dict)
    engine = build_engine(recipe, Vocabulary.load(stored.vocabulary).size, topology)
    load_resharded(
        engine, Tensors.of(weights.tensors), open_optimizer(stored.weights_in, verify=True), topology
    )
    with Saver(run, topology, keep=1) as saver:
        saver.save(engine, state["step"], state["position"])
    engine.destroy()

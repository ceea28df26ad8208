"""A recipe small enough to be trained many times, and what sbatch needs to find it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests"))
from support.small_run import TARGET_TOP2, make_recipe, write_corpus

from lsmoe_ds.data.prepare import prepare

STEPS = 100
PATIENCE = 120.0  # seconds: a machine that is busy with other work lets four ranks start slowly
SLURM = REPOSITORY / "slurm"
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "LSMOE_SLURM": str(SLURM),
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def write_recipe(folder: Path) -> None:
    """``recipe.yaml`` in the folder, and prepared data."""
    write_corpus(folder)
    recipe = make_recipe(folder, TARGET_TOP2, TARGET_TOP2, expert=2)
    training = {
        "steps": STEPS,
        "checkpoint_every": 10,
        "log_every": 1,
        "max_grad_norm": 1.0,
        "hang_timeout": PATIENCE,
        "learning_rate": 0.005,
    }
    changes = {
        "training": recipe.training.model_copy(update=training),
        "data": recipe.data.model_copy(update={"batch": recipe.data.batch.model_copy(update={"tokens": 64})}),
    }
    recipe = recipe.model_copy(update=changes)
    prepare(recipe)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())

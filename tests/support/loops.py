"""Run the training loop in small, and compare how runs end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.errors import UserError
from support.small_run import TARGET_TOP2, make_recipe

PAIR_GROUPS = {"routing": "task", "task": "pair", "experts": 4, "every": 2, "top_k": 2, "expert_groups": 2}
EVERY, KEEP = 2, 2


def recipe_in(folder: Path, steps: int = 6, every: int = 3, moe: dict | None = TARGET_TOP2, **layout):
    recipe = make_recipe(folder, moe, moe, **layout)
    training = {
        "steps": steps,
        "checkpoint_every": every,
        "log_every": 2,
        "validate_every": 3,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "max_grad_norm": 1.0,
        "keep": 2,
    }
    languages = "task-affine" if moe is PAIR_GROUPS else "mixed"
    batch = recipe.data.batch.model_copy(update={"tokens": 96, "count": 4, "languages": languages})
    data = recipe.data.model_copy(update={"batch": batch})
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training), "data": data})


def loop(topology, recipe, run: Path, at_step: int | None = None, error: BaseException | None = None):
    """Run the training loop on a rank; raise ``error`` in place of step ``at_step``."""
    from lsmoe_ds.training import loop as module

    true_step = module.train_step

    def step(engine, batch, number, *arguments):
        if number == at_step and error is not None:
            raise error
        return true_step(engine, batch, number, *arguments)

    module.train_step = step
    try:
        if topology.is_main:
            open_run(recipe, run, recipe.prepared / "vocabulary.model")
        module.train(recipe, run, topology)
    except KeyboardInterrupt:
        pass
    except UserError as wrong:
        return str(wrong)
    finally:
        module.train_step = true_step
    return None


def records(run: Path, with_bytes: bool = False) -> list[dict]:
    """Read ``metrics.jsonl``: bytes only if asked for, as they begin anew with each process; never
    times.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "save_seconds" not in line]
    left_out = (
        "seconds",
        "tokens_per_second",
        "tflops_per_rank",
        "exchange_share",
        *(() if with_bytes else ("exchanged_bytes",)),
    )
    return [{k: v for k, v in line.items() if not k.startswith(left_out)} for line in lines]


def weights(run: Path, step: int) -> dict:
    from lsmoe_ds.checkpoint.reading import read_checkpoint

    return read_checkpoint(run / "checkpoints" / f"step-{step}").weights


def assert_same_end(run: Path, other: Path, step: int) -> None:
    """Compare records and weights of two runs, bit by bit."""
    first, second = records(run), records(other)
    for line in [*first, *second]:
        line.pop("tokens", None)  # a record that spans a restart counts the tokens since it
    assert first == second
    a, b = weights(run, step), weights(other, step)
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def assert_same_but_rounding(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """Compare weights after a few steps of Adam at a rate of 0.01, of sums in another order.

    Adam divides a gradient by its own size, so where gradients nearly cancel their rounding moves an entry
    by more than it moves others: the root mean square may be a thousandth of a step. A gradient that lacks
    the part of a rank moves most entries by whole steps.
    """
    difference = (found.float() - wanted.float()).square().mean().sqrt()
    assert difference <= 1e-5, f"{name}: {float(difference):.1e}"


def spoil(topology, recipe, run: Path, what: str):
    """Train with a weight or a gradient that turns infinite at step 5."""
    import torch

    from lsmoe_ds.training import loop as module

    true_step = module.train_step

    def step(engine, batch, number, *arguments):
        if number == 5:
            parameter = next(engine.module.parameters())
            if what == "loss":
                with torch.no_grad():
                    parameter[4:] = math.inf
            else:
                parameter.register_hook(lambda gradient: gradient * math.nan)
        return true_step(engine, batch, number, *arguments)

    module.train_step = step
    try:
        return loop(topology, recipe, run)
    finally:
        module.train_step = true_step


def recipe_of(folder: Path, steps: int, **layout: int):
    """Make a recipe that saves every other step, and keeps the best checkpoint too."""
    recipe = recipe_in(folder, steps=steps, every=EVERY, **layout)
    changes = {"log_every": 1, "validate_every": 4, "keep": KEEP, "keep_best": 1}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})

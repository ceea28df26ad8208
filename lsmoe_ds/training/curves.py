"""Where the curves of a training are drawn beside ``metrics.jsonl``: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import explain_errors, write_whole

PROJECT = "lsmoe_ds"  # of W&B, unless WANDB_PROJECT names another


class Curves(Protocol):
    """A place for curves. What goes wrong is an OSError: it ends the curves, and not the training."""

    name: str

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """``RUN/tensorboard``, without what an earlier process wrote of steps after ``step``."""

    name = "TensorBoard"

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, whose id ``RUN/wandb/id`` keeps, so that a resumed training goes on in it.

    Raises UserError if it does not start.
    """

    name = "W&B"

    def __init__(self, run: Path, step: int) -> None:
        identity = run / "wandb" / "id"
        with explain_errors(identity):
            identity.parent.mkdir(exist_ok=True)
            known = identity.read_text(encoding="utf-8").strip() if identity.exists() else ""
        if not known:
            known = secrets.token_hex(4)
            write_whole(identity, f"{known}\n")
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        try:
            import wandb

            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", run.resolve().name),
                id=known,
                resume="allow",
                dir=str(run),
                config=recipe,
                settings=wandb.Settings(console="off"),
            )
            # Its own count of records would begin anew where a training resumes.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # it has errors of many kinds, for network, keys and permissions
            raise UserError(
                f"'training.log_to' names wandb, which does not start ({_first_line(error)}): log in with "
                "'wandb login', set WANDB_MODE=offline, or leave it out"
            ) from None

    def write(self, step: int, values: dict[str, float]) -> None:
        try:
            self._run.log({"step": step, **values})
        except Exception as error:
            raise OSError(_first_line(error)) from None

    def close(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            raise OSError(_first_line(error)) from None


PLACES: dict[str, Callable[[Path, int], Curves]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_installed(places: Sequence[str]) -> None:
    """Raise UserError if a place needs a package that is not installed."""
    found = importlib.util.find_spec("wandb") if "wandb" in places else None
    # A folder of that name, which W&B itself makes, is taken for a package without a file of its own.
    if "wandb" in places and (found is None or found.origin is None):
        raise UserError(
            "'training.log_to' names wandb, which is not installed: pip install 'lsmoe_ds[wandb]' or wandb, "
            "or leave it out"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__

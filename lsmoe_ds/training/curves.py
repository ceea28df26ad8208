"""Write training curves to TensorBoard and Weights & Biases, in addition to ``metrics.jsonl``."""

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

PROJECT = "lsmoe_ds"  # the W&B project, unless WANDB_PROJECT names another


class Curves(Protocol):
    """A destination for curves. Its failures are OSErrors, which end the curves but not the training."""

    name: str

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Write ``RUN/tensorboard``; discard what an earlier process wrote about steps after ``step``."""

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
    """Write a Weights & Biases run. ``RUN/wandb/id`` keeps its id, so that a resumed training continues it.

    Raises UserError if the W&B run does not start.
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
            # W&B's own record count would start again at 0 when a training resumes.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # W&B raises many kinds of errors, for network, keys and permissions
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
    """Raise UserError if a destination in ``places`` needs a package that is not installed."""
    found = importlib.util.find_spec("wandb") if "wandb" in places else None
    # W&B creates a folder "wandb", which Python takes for a namespace package: that one has no origin.
    if "wandb" in places and (found is None or found.origin is None):
        raise UserError(
            "'training.log_to' names wandb, which is not installed: pip install 'lsmoe_ds[wandb]' or wandb, "
            "or leave it out"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__

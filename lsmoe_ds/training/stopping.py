"""Early stopping: end a training whose validations no longer improve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lsmoe_ds.checkpoint.run_folder import CHRF
from lsmoe_ds.config.recipe import EarlyStopping
from lsmoe_ds.notices import counted


@dataclass
class Stopping:
    """Count the validations since the last improvement; without ``settings`` the training never stops early.

    The state is part of a checkpoint, so that a resumed run stops at the same step.
    """

    settings: EarlyStopping | None
    best: float | None = None  # the best value so far; None before the first
    step: int = 0  # the step of the best value
    waited: int = 0  # validations since that step

    @property
    def _metric(self) -> str:
        return "loss" if self.settings is None else self.settings.metric

    def after_validation(self, step: int, found: Mapping[str, float]) -> None:
        """Update the count with the metrics of a step's validation.

        It is an improvement if the dev loss is lower, or chrF higher, by more than ``min_delta``.
        """
        value = found[CHRF] if self._metric == "chrf" else found["dev_loss"]
        least = self.settings.min_delta if self.settings is not None else 0.0
        if self.best is None:
            better = value == value  # a number
        else:
            better = (value - self.best if self._metric == "chrf" else self.best - value) > least
        if better:
            self.best, self.step, self.waited = value, step, 0
        else:
            self.waited += 1

    @property
    def ended(self) -> bool:
        return self.settings is not None and self.waited >= self.settings.patience

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self._metric, "best": self.best, "step": self.step, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; if it is for another metric, start a new count instead."""
        if state["metric"] != self._metric:
            return
        self.best, self.step, self.waited = state["best"], state["step"], state["waited"]

    def describe(self) -> str:
        """Say why the training ends."""
        assert self.settings is not None
        waited = counted(self.waited, "validation")
        if self.best is None:
            return f"the dev loss was no number in {waited} (training.early_stopping)"
        least = self.settings.min_delta
        what, best = ("chrF", f"{self.best:.2f}") if self._metric == "chrf" else ("loss", f"{self.best:.3f}")
        return (
            f"the dev {what} has not improved {f'by more than {least:g} ' if least else ''}on {best}, "
            f"that of step {self.step:,}, in {waited} (training.early_stopping)"
        )

"""Early stopping: end a training whose dev loss has stopped falling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lsmoe_ds.config.recipe import EarlyStopping
from lsmoe_ds.notices import counted


@dataclass
class Stopping:
    """Count the validations since the last improvement; without ``settings`` no count ends a training.

    The state is part of a checkpoint, so that a resumed run stops in the same step.
    """

    settings: EarlyStopping | None
    best: float = math.inf
    step: int = 0  # of the best
    waited: int = 0  # validations since then

    def after_validation(self, step: int, loss: float) -> None:
        """Take the dev loss of a step. It improves on the best if it is lower by more than ``min_delta``."""
        least = self.settings.min_delta if self.settings is not None else 0.0
        if loss < self.best - least:
            self.best, self.step, self.waited = loss, step, 0
        else:
            self.waited += 1

    @property
    def ended(self) -> bool:
        return self.settings is not None and self.waited >= self.settings.patience

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best if math.isfinite(self.best) else None,
            "step": self.step,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best = state["best"]
        self.best, self.step, self.waited = math.inf if best is None else best, state["step"], state["waited"]

    def describe(self) -> str:
        """Say why the training ends."""
        assert self.settings is not None
        least = self.settings.min_delta
        return (
            f"the dev loss has not improved {f'by more than {least:g} ' if least else ''}on {self.best:.3f}, "
            f"that of step {self.step:,}, in {counted(self.waited, 'validation')} "
            "(training.early_stopping)"
        )

"""Choose the weights of a run: those of a step, or an average. No torch here."""

from __future__ import annotations

from typing import Literal

from lsmoe_ds.errors import UserError

EMA: Literal["ema"] = "ema"
Averaging = int | Literal["ema"]
"""The mean of the last so many checkpoints up to a step (1: this one as it is), or the moving average of the
weights that ``training.ema`` keeps.
"""


def read_average(text: str) -> Averaging:
    """Read the value of --average. Raises UserError for anything else."""
    if text == EMA:
        return EMA
    if text.isascii() and text.isdecimal() and int(text) >= 1:
        return int(text)
    raise UserError(
        f"--average is {text!r}: give a number N for the mean of the last N checkpoints, or {EMA} for the "
        "average that training.ema keeps"
    )


def describe_average(average: Averaging) -> str:
    """Describe the weights of an average other than 1, for use in a sentence."""
    return "the moving average of the weights" if average == EMA else f"the mean of {average} checkpoints"

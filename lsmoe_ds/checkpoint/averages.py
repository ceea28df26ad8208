"""Which weights of a run are meant: those of a step as they are, or an average. No torch here."""

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
        f"--average is {text!r}: give a number of checkpoints, of which the mean is taken, or {EMA}, for the "
        "average that training.ema keeps"
    )


def describe_average(average: Averaging) -> str:
    """Name the weights of an average other than 1 in running text."""
    return "the moving average of the weights" if average == EMA else f"the mean of {average} checkpoints"

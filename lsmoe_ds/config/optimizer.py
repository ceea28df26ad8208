"""The optimizers that a recipe can name: their settings, and the state that each keeps of a parameter.

Planning, checkpoints and the engine use only these settings, and know no optimizer by name. The optimizers
themselves are built in :mod:`lsmoe_ds.training.optimizers`. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from lsmoe_ds.config.section import Fraction, Section


class OptimizerSettings(Section):
    """The settings of one optimizer in a recipe, and the sizes of its state."""

    # The ZeRO stages at which it works. Stages 1 and 2 step flat partitions, without the shapes of matrices.
    stages: ClassVar[tuple[int, ...]] = (0, 1, 2)
    # Whether it steps 16-bit weights itself, one parameter at a time; otherwise DeepSpeed makes float32
    # copies of all weights and gradients for it.
    steps_halves: ClassVar[bool] = False
    # State tensors that are means over one dimension of a matrix, with that dimension, counted from the end.
    # For a vector such an optimizer keeps one value for each of its values.
    averaged: ClassVar[Mapping[str, int]] = {}

    def stages_in(self, half: bool) -> tuple[int, ...]:
        """Return the ZeRO stages at which it trains in 16 bits or in float32.

        See :func:`lsmoe_ds.config.deepspeed.complete`.
        """
        return tuple(stage for stage in self.stages if stage or not half or self.steps_halves)

    def value_bytes(self, stage: int, half: bool) -> int:
        """Return the bytes of state for each trained value, without those of :attr:`averaged`."""
        raise NotImplementedError

    def step_bytes(self, half: bool) -> int:
        """Return the bytes that a step needs temporarily for each value of the current parameter."""
        return 0

    def host_bytes(self) -> int:
        """Return the bytes of state in host memory for each trained value."""
        return 0


class Adam(OptimizerSettings):
    """AdamW. At ZeRO stage 0 in float32 it keeps two moments, otherwise also a float32 copy of the weights.

    With ``offload`` the moments are in the host's memory, and the host takes the steps.
    """

    offload: bool = False

    def value_bytes(self, stage: int, half: bool) -> int:
        return (4 if half or stage > 0 else 0) + 8 * (not self.offload)

    def host_bytes(self) -> int:
        return 8 * self.offload


class Adafactor(OptimizerSettings):
    """Adafactor ("Adafactor: Adaptive Learning Rates with Sublinear Memory Cost").

    ``momentum`` is beta_1 (0: none), ``decay`` the exponent c of beta_2 = 1 - t^-c, ``clip_threshold`` the
    largest root mean square d of an update. With ``scale_parameters`` a step is relative to the root mean
    square of the parameter. Without ``master_weights`` 16-bit weights have no float32 copy, and are rounded
    at random, so that small steps are not lost.
    """

    stages: ClassVar[tuple[int, ...]] = (0,)
    steps_halves: ClassVar[bool] = True
    averaged: ClassVar[Mapping[str, int]] = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}

    momentum: Fraction = 0.0
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    clip_threshold: Annotated[float, Field(gt=0.0)] = 1.0
    scale_parameters: bool = False
    master_weights: bool = True

    def value_bytes(self, stage: int, half: bool) -> int:
        return 4 * ((self.momentum > 0) + (half and self.master_weights))

    def step_bytes(self, half: bool) -> int:
        """Count the squared gradient, which becomes the update; in 16 bits also the gradient in float32; and
        without float32 copies also the weights and their rounding noise.
        """
        return 4 + 4 * half + 8 * (half and not self.master_weights)


OPTIMIZERS: Mapping[str, type[OptimizerSettings]] = {"adam": Adam, "adafactor": Adafactor}
# Those of all optimizers; checkpoints recognize such state tensors by their names.
AVERAGED = {key: over for kind in OPTIMIZERS.values() for key, over in kind.averaged.items()}


def averaged_shape(shape: Sequence[int], averaged: int | None) -> tuple[int, ...]:
    """Return the shape of a state tensor of a parameter of ``shape``, without the dimension ``averaged``
    (counted from the end) if it is a mean over that.
    """
    kept = list(shape)
    if averaged is not None:
        del kept[averaged]
    return tuple(kept)


def averaged_partition(dimension: int | None, dimensions: int, averaged: int) -> int | None:
    """Return the dimension of a state tensor that is spread over tensor-parallel ranks, or None.

    Of the parameter's ``dimensions`` dimensions, number ``dimension`` is spread. The state tensor lacks the
    dimension ``averaged``, counted from the end.
    """
    gone = dimensions + averaged
    if dimension is None or dimension == gone:
        return None
    return dimension - (dimension > gone)

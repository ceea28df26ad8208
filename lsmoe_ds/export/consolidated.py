"""Write the consolidated form of a model: all parameters, independent of any layout, in safetensors.

The folder may also hold the optimizer's state: ``optimizer*.safetensors`` with tensors named
``PARAMETER.exp_avg`` and so on, and ``state.json`` with the step, the optimizer's step and the position in
the data. With the state, training can resume in any layout (see
:mod:`lsmoe_ds.convert.layout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from lsmoe_ds.checkpoint.optimizer import STATE, STEM, OptimizerState, open_optimizer, state_shape
from lsmoe_ds.checkpoint.reading import read_checkpoint
from lsmoe_ds.checkpoint.stored import Stored
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors, save_tensors
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import read_fields, write_json


def write_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    vocabulary: Path,
    optimizer_of: Stored | None = None,
) -> list[str]:
    """Write the kind ``consolidated``, with the optimizer's state of the run ``optimizer_of`` if it is given.

    Raises UserError if that run has no state.
    """
    weights = Tensors.of(tensors)
    names = save_tensors(weights, folder)
    if optimizer_of is None:
        return names
    if optimizer_of.kind != "sparse":
        raise UserError(f"--optimizer needs a run: {optimizer_of.home} is a converted folder")
    state = read_fields(optimizer_of.weights_in / STATE, step=int, position=dict)
    optimizer = open_optimizer(optimizer_of.weights_in, verify=True)
    frozen = read_checkpoint(optimizer_of.weights_in).frozen
    entries = weights.entries.items()
    stepped = {name: each for name, each in entries if name not in frozen and not each.is_buffer}
    names += save_tensors(_tensors(optimizer, Tensors(stepped)), folder, STEM)
    write_json(
        folder / STATE,
        {"step": state["step"], "optimizer_step": optimizer.step, "position": state["position"]},
    )
    return [*names, STATE]


def _tensors(optimizer: OptimizerState, weights: Tensors) -> Tensors:
    """Return the optimizer's tensors for these weights; tensors of one parameter are read together."""

    @lru_cache(maxsize=1)
    def of(name: str) -> dict[str, Tensor]:
        return optimizer.whole(name, weights.shape(name))

    def entry(name: str, key: str) -> LazyTensor:
        return LazyTensor(state_shape(key, weights.shape(name)), lambda: of(name)[key])

    return Tensors({f"{name}.{key}": entry(name, key) for name in weights for key in optimizer.keys(name)})

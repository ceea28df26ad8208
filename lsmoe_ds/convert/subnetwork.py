"""The dense sub-network of one direction: what a sparse model computes for it, exactly, as a plain Transformer.

For a fixed direction every task-routed layer uses the same K experts with the same weights g, and their sum is one
feed-forward of width K F ("Beyond Distillation", section 3.1, extracts such sub-networks for serving)::

    sum_k g_k (relu(x W1_k + b1_k) W2_k + b2_k) = relu(x [W1_1 .. W1_K] + [b1_1 .. b1_K]) [g_1 W2_1; ..; g_K W2_K] + sum_k g_k b2_k

H hidden, F width of an expert, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds import __version__
from lsmoe_ds.config import Model, MoE, Parallel, Recipe, Side
from lsmoe_ds.convert.folder import Weights, find_model, read_weights, write_folder
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import Direction, Languages
from lsmoe_ds.moe.routers import ROUTERS, RouterByTask


def check_convertible(recipe: Recipe, direction: Direction) -> None:
    """Raises UserError if the model has no dense equal for this direction, saying why."""
    recipe.languages.direction_id(direction)
    for name, side in (("encoder", recipe.model.encoder), ("decoder", recipe.model.decoder)):
        if side.moe is not None and not side.moe.by_task:
            layers = [str(layer + 1) for layer in range(side.layers) if side.is_moe(layer)]
            place = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(layers)}"
            raise UserError(
                f"the {name} routes by {side.moe.routing} in {place}: each {side.moe.routing} chooses its experts when it is there, so no "
                f"sub-network holds all "
                f"that {direction} uses; train with model.{name}.moe.routing: task to extract one, or serve the sparse model"
            )


def join_experts(weights: Mapping[str, Tensor], at: str, settings: MoE, languages: Languages, task: int) -> dict[str, Tensor]:
    """One feed-forward that equals a layer routed by task, for one task; ``at`` is the layer's name up to ``feed_forward.``.

    Returns ``expand`` [K F, H] with bias [K F] and ``contract`` [H, K F] with bias [H].
    """
    router = ROUTERS[settings.routing](0, settings, languages)
    if list(router.parameters()):
        router.load_state_dict({"weight": weights[f"{at}router.weight"]}, assign=True)
    assert isinstance(router, RouterByTask)
    routes = router.requires_grad_(False).of_tasks()
    experts, gates = routes.experts[task].tolist(), routes.weights[task]

    def of(name: str) -> list[Tensor]:
        return [weights[f"{at}experts.{expert}.{name}"] for expert in experts]

    return {
        f"{at}expand.weight": torch.cat(of("expand.weight")),
        f"{at}expand.bias": torch.cat(of("expand.bias")),
        f"{at}contract.weight": torch.cat([gate * weight for gate, weight in zip(gates, of("contract.weight"), strict=True)], 1),
        f"{at}contract.bias": torch.stack([gate * bias for gate, bias in zip(gates, of("contract.bias"), strict=True)]).sum(0),
    }


def extract(weights: Mapping[str, Tensor], recipe: Recipe, direction: Direction) -> tuple[dict[str, Tensor], Recipe]:
    """Weights (by global name) and recipe of the dense model that equals the given one for ``direction``.

    Each kind of language-specific layer has its function here; all else is taken over. The vocabulary stays as it is.
    """
    check_convertible(recipe, direction)
    dense = dict(weights)
    sides = {"encoder": recipe.model.encoder, "decoder": recipe.model.decoder}
    widths = {name: [side.width(layer) for layer in range(side.layers)] for name, side in sides.items()}
    for side, layer, settings in recipe.model.moe_layers():
        at = f"{side}.{layer}.feed_forward."
        try:
            joined = join_experts(weights, at, settings, recipe.languages, recipe.languages.task_id(settings.task, direction))
        except KeyError as error:
            raise UserError(f"the weights lack {error}: they do not belong to this recipe") from None
        dense = {name: value for name, value in dense.items() if not name.startswith(at)} | joined
        widths[side][layer] *= settings.top_k
    return dense, _dense_recipe(recipe, direction, widths)


def _dense_recipe(recipe: Recipe, direction: Direction, widths: dict[str, list[int]]) -> Recipe:
    """The same recipe, with a dense model and one direction."""
    sides = {side: Side(layers=len(each), feed_forward=each) for side, each in widths.items()}
    model = Model(preset=None, hidden=recipe.model.hidden, heads=recipe.model.heads, **sides)
    batch = recipe.data.batch.model_copy(update={"languages": "mixed"})  # without experts no batch has an affinity
    data = recipe.data.model_copy(
        update={"languages": [direction.source, direction.target], "directions": [str(direction)], "batch": batch}
    )
    changed = recipe.model_copy(update={"model": model, "data": data, "parallel": Parallel()})
    return Recipe.model_validate(changed.model_dump())


def convert_to_dense(run: str | Path, direction: Direction, out: str | Path) -> dict[str, Any]:
    """Writes the dense model of ``direction`` as a folder and returns its ``provenance.json``, less the files.

    ``run`` is a run folder or a checkpoint in it. Raises UserError if there is no dense equal, or ``out`` is not ours to write.
    """
    stored = find_model(run)
    check_convertible(stored.recipe, direction)
    whole = read_weights(stored)
    tensors, recipe = extract(whole.tensors, stored.recipe, direction)
    provenance = {
        "kind": "dense",
        "version": __version__,
        "run": stored.recipe.name,
        "step": whole.step,
        "direction": str(direction),
        "source_files": whole.files,
        "sparse_parameters": whole.parameters,
        "dense_parameters": Weights(tensors, whole.step, {}).parameters,
    }
    write_folder(Path(out), tensors, recipe, stored.vocabulary, provenance)
    return provenance

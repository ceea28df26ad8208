"""The dense sub-network of one direction: what a sparse model computes for it, exactly, as a plain Transformer.

For a fixed direction every task-routed layer uses the same K experts with the same weights g, and their sum is one
feed-forward of width K F ("Beyond Distillation", section 3.1, extracts such sub-networks for serving)::

    sum_k g_k (relu(x W1_k + b1_k) W2_k + b2_k) = relu(x [W1_1 .. W1_K] + [b1_1 .. b1_K]) [g_1 W2_1; ..; g_K W2_K] + sum_k g_k b2_k

Low-rank matrices beside a linear layer become part of its weight, W + V F, whatever their rank: by the ``specific`` route
those of the direction's languages, by the ``shared`` route (after Fuse Distillation) those that all languages share. Where a
feed-forward was distilled beside the experts, by the shared route it takes the layer's place, whatever the routing, and by
the specific route it falls away.

H hidden, F width of an expert, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds import __version__
from lsmoe_ds.config import Model, MoE, Parallel, Recipe, Side
from lsmoe_ds.convert.folder import PROVENANCE, Stored, Weights, find_model, read_weights, write_folder
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import read_json
from lsmoe_ds.inference.load import check_route
from lsmoe_ds.language_specific.low_rank import Banks
from lsmoe_ds.languages import Direction, Languages
from lsmoe_ds.model.guide import SHARED
from lsmoe_ds.moe.routers import ROUTERS, RouterByTask
from lsmoe_ds.parallel.topology import Topology

ALL = "all"  # in the place of a direction
FLAT, VERTICAL = "_low_rank.flat", "_low_rank.vertical"
FEED_FORWARD = ("expand.weight", "expand.bias", "contract.weight", "contract.bias")


def check_convertible(recipe: Recipe, direction: Direction | None, route: str = "specific") -> None:
    """Raises UserError if the model has no dense equal for this direction and route, saying why.

    Without a direction: for all directions of the recipe at once.
    """
    model = recipe.model
    check_route(route, recipe)
    if direction is not None:
        recipe.languages.direction_id(direction)
    kept = list(expert_layers(model, route))
    for name, side in (("encoder", model.encoder), ("decoder", model.decoder)):
        layers = [str(layer + 1) for of_side, layer, _ in kept if of_side == name]
        if layers and side.moe is not None and not side.moe.by_task:
            place = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(layers)}"
            raise UserError(
                f"the {name} routes by {side.moe.routing} in {place}: each {side.moe.routing} chooses its experts when it is there, so no "
                f"sub-network holds all that {direction or 'a direction'} uses; train with model.{name}.moe.routing: task to extract one, "
                f"or serve the sparse model"
            )
    if model.clsr is not None:
        raise UserError(
            "the gates of model.clsr choose for each token between two projections when it is there, so no dense model computes the "
            "same: serve the trained model itself"
        )
    if direction is None and kept:
        raise UserError("no dense model serves all directions, since each has experts of its own: name one with --from and --to-language")
    if direction is None and route == "specific":
        raise UserError("the specific route needs a direction: name one with --from and --to-language")


def expert_layers(model: Model, route: str) -> Iterator[tuple[str, int, MoE]]:
    """(side, layer, settings) of each layer whose experts the route uses."""
    return ((side, layer, moe) for side, layer, moe in model.moe_layers() if route == "specific" or not moe.fuse_distillation)


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


def fold_low_rank(weights: Mapping[str, Tensor], recipe: Recipe, direction: Direction | None, route: str) -> dict[str, Tensor]:
    """The same weights with every low-rank bank folded into the linear layer that it stands beside: W + V F.

    Only the specific route reads ``direction``.
    """
    settings, languages = recipe.model.low_rank, recipe.languages
    if settings is None:
        return dict(weights)
    numbers = {"source": SHARED, "target": SHARED}
    if route == "specific" and direction is not None:
        numbers = {"source": languages.id(direction.source), "target": languages.id(direction.target)}
    folded = {name: value for name, value in weights.items() if not name.endswith((FLAT, VERTICAL))}
    for at in [name.removesuffix(FLAT) for name in weights if name.endswith(FLAT)]:
        weight, vertical, flat = (weights[f"{at}{part}"] for part in (".weight", VERTICAL, FLAT))
        outputs, inputs = weight.shape
        with torch.device("meta"):  # it is made only to say which rows are whose
            bank = Banks(settings, languages, at.startswith("decoder."), Topology.single()).make(inputs, outputs, "column")
        of_vertical, of_flat = bank.rows[numbers[bank.vertical_of]], bank.rows[numbers[bank.flat_of]]
        folded[f"{at}.weight"] = torch.addmm(weight, vertical[of_vertical].t(), flat[of_flat])
    return folded


def extract(
    weights: Mapping[str, Tensor], recipe: Recipe, direction: Direction | None, route: str = "specific"
) -> tuple[dict[str, Tensor], Recipe]:
    """Weights (by global name) and recipe of the dense model that equals the given one for ``direction``.

    Each kind of language-specific layer has its function here; all else is taken over. The vocabulary stays as it is.
    By the shared route and where that uses no experts the model is the same for every direction: its recipe keeps them all.
    """
    check_convertible(recipe, direction, route)
    sides = {"encoder": recipe.model.encoder, "decoder": recipe.model.decoder}
    widths = {name: [side.width(layer) for layer in range(side.layers)] for name, side in sides.items()}
    try:
        dense = fold_low_rank(weights, recipe, direction, route)
        for side, layer, settings in recipe.model.moe_layers():
            at = f"{side}.{layer}.feed_forward."
            if settings.fuse_distillation and route == "shared":
                made = {f"{at}{name}": weights[f"{at}shared.{name}"] for name in FEED_FORWARD}
            else:
                assert direction is not None
                made = join_experts(weights, at, settings, recipe.languages, recipe.languages.task_id(settings.task, direction))
                widths[side][layer] *= settings.top_k
            dense = {name: value for name, value in dense.items() if not name.startswith(at)} | made
    except KeyError as error:
        raise UserError(f"the weights lack {error}: they do not belong to this recipe") from None
    return dense, _dense_recipe(recipe, None if serves_all(recipe, route) else direction, widths)


def serves_all(recipe: Recipe, route: str) -> bool:
    """Whether one dense model serves every direction of the recipe."""
    return route == "shared" and not any(expert_layers(recipe.model, route))


def _dense_recipe(recipe: Recipe, direction: Direction | None, widths: dict[str, list[int]]) -> Recipe:
    """The same recipe, with a dense model and one direction, or without ``direction`` all of them."""
    encoder, decoder = (Side(layers=len(widths[side]), feed_forward=list(widths[side])) for side in ("encoder", "decoder"))
    model = Model(preset=None, hidden=recipe.model.hidden, heads=recipe.model.heads, encoder=encoder, decoder=decoder)
    changes: dict[str, Any] = {"batch": recipe.data.batch.model_copy(update={"languages": "mixed"})}  # no experts: no affinity
    if direction is not None:
        changes |= {"languages": [direction.source, direction.target], "directions": [str(direction)]}
    data = recipe.data.model_copy(update=changes)
    changed = recipe.model_copy(update={"model": model, "data": data, "parallel": Parallel()})
    return Recipe.model_validate(changed.model_dump())


def extract_stored(
    stored: Stored, direction: Direction | None, route: str = "specific"
) -> tuple[dict[str, Tensor], Recipe, dict[str, Any]]:
    """:func:`extract` from a run, a checkpoint or a dense folder; and the ``provenance.json`` of the outcome, less kind and files.

    A dense folder is taken as it is; one for all directions can be narrowed to one of them.
    """
    dense = stored.kind == "dense"
    if stored.kind == "sparse":
        check_convertible(stored.recipe, direction, route)
    whole = read_weights(stored)
    if dense and direction is None:
        check_route(route, stored.recipe)
        tensors, recipe = whole.tensors, stored.recipe
    else:
        tensors, recipe = extract(whole.tensors, stored.recipe, direction, route)
    of_all = len(recipe.data.directions) > 1 if dense else serves_all(stored.recipe, route)
    provenance = {
        "version": __version__,
        "run": stored.recipe.name,
        "step": whole.step,
        "direction": ALL if of_all else recipe.data.directions[0],
        "route": route,
        "source_files": whole.files,
        "sparse_parameters": whole.parameters,
        "dense_parameters": Weights(tensors, whole.step, {}).parameters,
    }
    if dense:
        before = read_json(stored.home / PROVENANCE) or {}
        provenance |= {key: before[key] for key in ("run", "route", "sparse_parameters") if key in before}
    return tensors, recipe, provenance


def convert_to_dense(run: str | Path, direction: Direction | None, out: str | Path, route: str = "specific") -> dict[str, Any]:
    """Writes the dense model of ``direction`` as a folder (without a card) and returns its ``provenance.json``, less the files.

    ``run`` is a run folder or a checkpoint in it. Raises UserError if there is no dense equal, or ``out`` is not ours to write.
    """
    stored = find_model(run)
    tensors, recipe, made = extract_stored(stored, direction, route)
    provenance = {"kind": "dense", **made}
    write_folder(Path(out), tensors, recipe, stored.vocabulary, provenance)
    return provenance

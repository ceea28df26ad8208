"""Extract the dense sub-network of one direction: a plain Transformer with exactly the same results.

For a fixed direction every task-routed layer uses the same K experts with the same weights g, and their sum
is one feed-forward of width K F ("Beyond Distillation", section 3.1, extracts such sub-networks for
serving)::

    sum_k g_k (relu(x W1_k + b1_k) W2_k + b2_k)
        = relu(x [W1_1 .. W1_K] + [b1_1 .. b1_K]) [g_1 W2_1; ..; g_K W2_K] + sum_k g_k b2_k

Methods merge their parameters into the layers beside them (``Method.merge``): those of the direction's
languages for the ``specific`` route, those that all languages share for the ``shared`` route. A shared
feed-forward beside experts replaces them for the shared route, whatever their routing, and is removed for the
specific one.

H hidden, F width of an expert, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds import __version__
from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.run_folder import START
from lsmoe_ds.checkpoint.stored import (
    PLAIN,
    PROVENANCE,
    READABLE,
    Stored,
    Weights,
    find_model,
    read_weights,
    start_of,
    write_folder,
)
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.layout import Parallel
from lsmoe_ds.config.model import Model, Side
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import FEED_FORWARD
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import check_fields, read_fields
from lsmoe_ds.inference.load import check_route, empty_model, find_part, known_direction
from lsmoe_ds.methods.base import Method
from lsmoe_ds.model.methods import methods_of
from lsmoe_ds.moe.routers import ROUTERS, RouterByTask
from lsmoe_ds.parallel.topology import Topology

ALL = "all"  # instead of a direction


def check_convertible(
    recipe: Recipe, direction: Direction | None, route: str = "specific", hybrid: bool = False
) -> None:
    """Raise UserError, with the reason, if the model has no dense equivalent for this direction and route.

    If ``direction`` is None, one model must serve all directions of the recipe. With ``hybrid``, layers that
    route by token or sentence may stay; there must be at least one.
    """
    model = recipe.model
    check_route(route, recipe)
    if direction is not None:
        find_part(recipe, direction)
    layers = list(expert_layers(model, route))
    stays = [(side, str(layer + 1), moe.routing) for side, layer, moe in layers if not moe.by_task]
    if stays and not hybrid:
        name, _, routing = stays[0]
        numbers = [layer for side, layer, _ in stays if side == name]
        place = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {', '.join(numbers)}"
        raise UserError(
            f"the {name} routes by {routing} in {place}: {routing}s choose their experts at run time, so no "
            f"fixed sub-network exists; train with model.{name}.moe.routing: task to extract one, keep the "
            f"{name}'s experts with --as hybrid, or serve all of it"
        )
    if hybrid and not stays:
        if not any(recipe.model.moe_layers()):
            raise UserError("the model is dense: there are no experts to keep")
        raise UserError(
            "experts are kept in models that route by token or sentence: of this one --as dense makes an "
            "exact dense model, without --experts and --keep"
        )
    for method in methods_of(recipe, Topology.single()):
        method.check_merge(check_route(route, recipe))
        if hybrid and method.adds_layers:
            raise UserError(
                f"'model.{method.name}' becomes separate layers in a converted model, which cannot have "
                "experts beside them: serve the trained model itself"
            )
    if direction is None and any(moe.by_task for _, _, moe in layers):
        raise UserError(
            "no dense model serves all directions, since each has experts of its own: name one, as in "
            "--direction en-de"
        )
    if direction is None and not serves_all(recipe, route):
        first = recipe.languages.directions[0]
        what = "language" if first.alone else "direction"
        raise UserError(f"the specific route needs a {what}: name one, as in --direction {first.label}")


def expert_layers(model: Model, route: str) -> Iterator[tuple[str, int, MoE]]:
    """Yield (side, layer, settings) of each layer whose experts the route uses."""
    return (
        (side, layer, moe)
        for side, layer, moe in model.moe_layers()
        if route == "specific" or not moe.has_shared
    )


def chosen_experts(
    weights: Mapping[str, Tensor], at: str, settings: MoE, languages: Languages, task: int
) -> tuple[list[int], Tensor]:
    """Return the K experts that a task-routed layer uses for a task, and their weights [K]."""
    router = ROUTERS[settings.routing](0, settings, languages)
    if list(router.parameters()):
        router.load_state_dict({"weight": weights[f"{at}router.weight"]}, assign=True)
    assert isinstance(router, RouterByTask)
    routes = router.requires_grad_(False).of_tasks()
    return routes.experts[task].tolist(), routes.weights[task]


def join_experts(
    weights: Tensors, at: str, settings: MoE, languages: Languages, task: int
) -> dict[str, LazyTensor]:
    """Return one feed-forward that equals a task-routed layer for a task; ``at`` is the layer's name up to
    ``feed_forward.``.

    Returns ``expand`` [K F, H] with bias [K F] and ``contract`` [H, K F] with bias [H].
    """
    experts, gates = chosen_experts(weights, at, settings, languages, task)

    def of(name: str) -> list[Tensor]:
        return [weights[f"{at}experts.{expert}.{name}"] for expert in experts]

    def shape(name: str) -> tuple[int, ...]:
        return weights.shape(f"{at}experts.{experts[0]}.{name}")

    def weighted(name: str) -> list[Tensor]:
        return [gate * each for gate, each in zip(gates, of(name), strict=True)]

    count = len(experts)
    width, hidden = shape("expand.weight")
    return {
        f"{at}expand.weight": LazyTensor((count * width, hidden), lambda: torch.cat(of("expand.weight"))),
        f"{at}expand.bias": LazyTensor((count * width,), lambda: torch.cat(of("expand.bias"))),
        f"{at}contract.weight": LazyTensor(
            (hidden, count * width), lambda: torch.cat(weighted("contract.weight"), 1)
        ),
        f"{at}contract.bias": LazyTensor(
            shape("contract.bias"), lambda: torch.stack(weighted("contract.bias")).sum(0)
        ),
    }


def extract(
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    direction: Direction | None,
    route: str = "specific",
    hybrid: bool = False,
) -> tuple[Tensors, Recipe]:
    """Return weights (by global name) and recipe of the dense model that equals the given one for
    ``direction``.

    Layers with experts and methods are merged; all else, and the vocabulary, stays. An untrained direction
    gets the same parameters as in translation. Where nothing depends on the direction, such as by the shared
    route without task-routed experts, the recipe keeps all directions. With ``hybrid`` only task-routed
    layers and methods are merged; layers that route by token or sentence keep their experts, and the recipe
    has only ``direction``, or all if it is None.
    """
    check_convertible(recipe, direction, route, hybrid)
    whole = Tensors.of(weights)
    try:
        joined = dict(whole.entries)
        for side, layer, settings in recipe.model.moe_layers():
            at = f"{side}.{layer}.feed_forward."
            if settings.has_shared and route == "shared":
                made = {f"{at}{name}": whole.entries[f"{at}shared.{name}"] for name in FEED_FORWARD}
            elif settings.by_task:
                assert direction is not None
                made = join_experts(
                    whole, at, settings, recipe.languages, recipe.languages.task_id(settings.task, direction)
                )
            else:
                made = {
                    name: entry
                    for name, entry in joined.items()
                    if name.startswith((f"{at}router.", f"{at}experts."))
                }
            joined = {name: entry for name, entry in joined.items() if not name.startswith(at)} | made
        merged = Tensors(joined)
        # A method that adds layers comes last, because it changes the names of layers.
        for method in sorted(methods_of(recipe, Topology.single()), key=lambda each: each.adds_layers):
            part = _part(method, direction, recipe.languages)
            merged = method.merge(merged, part, check_route(route, recipe))
    except KeyError as error:
        raise UserError(f"the weights lack {error}: they do not belong to this recipe") from None
    if recipe.model.huggingface is not None:
        return merged, _without_methods(recipe, None if serves_all(recipe, route) else direction)
    kept = {side for side, _, moe in expert_layers(recipe.model, route) if not moe.by_task}
    # In a hybrid, a direction is given in order to keep the experts that it uses.
    serves = None if serves_all(recipe, route) and not hybrid else direction
    return merged, _dense_recipe(recipe, serves, _widths(merged, recipe), kept)


def _part(method: Method, direction: Direction | None, languages: Languages) -> Direction | None:
    """Return the direction whose parameters of a method are used for ``direction``: itself, if trained."""
    if direction is None or direction in languages.directions or method.section is None:
        return direction
    return method.section.stand_in(direction, languages) or direction


def _widths(weights: Tensors, recipe: Recipe) -> dict[str, list[int]]:
    """Return the width of each layer's feed-forward by side; for layers that keep experts, the recipe's.

    Methods may have added layers, or removed units.
    """
    found: dict[str, list[int]] = {}
    for name, side in (("encoder", recipe.model.encoder), ("decoder", recipe.model.decoder)):
        found[name] = []
        while f"{name}.{len(found[name])}.attention_norm.weight" in weights:
            layer = len(found[name])
            dense = weights.entries.get(f"{name}.{layer}.feed_forward.expand.weight")
            found[name].append(side.width(layer) if dense is None else dense.shape[0])
    return found


def serves_all(recipe: Recipe, route: str) -> bool:
    """Tell whether one merged model serves every direction of the recipe: no parameter that the route uses
    depends on the direction.
    """
    specific = route != "shared" and any(
        method.by_direction for method in methods_of(recipe, Topology.single())
    )
    return not specific and not any(moe.by_task for _, _, moe in expert_layers(recipe.model, route))


def _dense_recipe(
    recipe: Recipe, direction: Direction | None, widths: dict[str, list[int]], kept: set[str]
) -> Recipe:
    """Return the recipe of the dense model; sides in ``kept`` keep experts. It has all directions if
    ``direction`` is None.
    """

    def side(name: str, before: Side) -> Side:
        moe = before.moe.served() if before.moe is not None and name in kept else None
        return Side(layers=len(widths[name]), feed_forward=list(widths[name]), moe=moe)

    before = recipe.model
    encoder, decoder = side("encoder", before.encoder), side("decoder", before.decoder)
    model = Model(preset=None, hidden=before.hidden, heads=before.heads, encoder=encoder, decoder=decoder)
    data = recipe.data if direction is None else recipe.data.only(direction)
    mixed = data.batch.model_copy(update={"languages": "mixed"})  # no tasks, so no task-affine batches
    data = data.model_copy(update={"batch": mixed})
    # The parameters that trained may no longer exist.
    training = recipe.training.model_copy(update={"trainable": "all", "directions": None})
    sections = {"model": model, "data": data, "training": training, "parallel": Parallel()}
    changed = recipe.model_copy(update=sections)
    return Recipe.model_validate(changed.model_dump())


def _without_methods(recipe: Recipe, direction: Direction | None) -> Recipe:
    """Return the recipe of a model of transformers into which its methods are merged."""
    gone = {method.name: None for method in recipe.model.methods}
    data = recipe.data if direction is None else recipe.data.only(direction)
    training = recipe.training.model_copy(update={"trainable": "all", "directions": None, "start_from": None})
    sections = {"model": recipe.model.model_copy(update=gone), "data": data, "training": training}
    return Recipe.model_validate(recipe.model_copy(update=sections).model_dump())


def extract_stored(
    stored: Stored,
    direction: Direction | None,
    route: str = "specific",
    hybrid: bool = False,
    average: Averaging = 1,
) -> tuple[Tensors, Recipe, dict[str, Any]]:
    """Apply :func:`extract` to a run, a checkpoint or a folder; also return the ``provenance.json`` of the
    result, except kind and files.

    A dense folder is used unchanged; one for all directions can be restricted to one of them.
    """
    direction = known_direction(stored.recipe, stored.kind, direction) if direction else None
    dense = stored.is_dense
    if dense and hybrid:
        raise UserError(f"{stored.home} is dense: there are no experts to keep")
    if not dense and stored.kind in READABLE:
        check_convertible(stored.recipe, direction, route, hybrid)
    whole = read_weights(stored, average)
    empty_model(
        stored.recipe, stored.recipe.data.vocabulary.size, Tensors.of(whole.tensors), Topology.single()
    )
    if dense and direction is None:
        check_route(route, stored.recipe)
        tensors, recipe = Tensors.of(whole.tensors), stored.recipe
    else:
        tensors, recipe = extract(whole.tensors, stored.recipe, direction, route, hybrid)
    of_all = len(recipe.data.directions) > 1 if dense or hybrid else serves_all(stored.recipe, route)
    made = describe(stored, whole, ALL if of_all else recipe.data.directions[0], route, tensors.numbers)
    if methods := stored.recipe.model.methods:
        made["merged"] = "; ".join(method.describe() for method in methods)
    return tensors, recipe, made


def describe(stored: Stored, whole: Weights, direction: str, route: str, parameters: int) -> dict[str, Any]:
    """Return the ``provenance.json`` of a model made from ``stored``, except kind and files; it keeps the
    provenance of ``stored``.
    """
    provenance = {
        "version": __version__,
        "run": stored.recipe.name,
        "step": whole.step,
        "direction": direction,
        "route": route,
        "source_files": whole.files,
        "sparse_parameters": whole.parameters,
        "dense_parameters": parameters,
    }
    if stored.kind == "sparse":
        training = stored.recipe.training
        provenance["trained"] = [str(each) for each in stored.recipe.trained]
        if training.start_from is not None:
            provenance["started_from"] = training.start_from.name
            if (start := start_of(stored)) is not None:
                provenance[START] = start
    fields: dict[str, type] = {"run": str, "route": str, "sparse_parameters": int}
    optional: dict[str, type] = {"merged": str, "trained": list, "started_from": str, START: str}
    plain = dict.fromkeys(PLAIN, ("run", "route", "sparse_parameters"))
    carried = {**plain, "consolidated": ("run",), "hybrid": ("run", "sparse_parameters")}
    if stored.kind not in carried:
        return provenance
    path = stored.home / PROVENANCE
    before = read_fields(path)
    if "grown_from" not in before:  # a grown model is a new one, whatever it was made from
        optional |= {"kept_experts": dict, "approximates": str, "sparse_parameters": int}
    kept = (*carried[stored.kind], *(key for key in optional if key in before))
    check_fields(path, before, **{key: (fields | optional)[key] for key in kept})
    return provenance | {key: before[key] for key in kept}


def convert_to_dense(
    run: str | Path, direction: Direction | None, out: str | Path, route: str = "specific"
) -> dict[str, Any]:
    """Write the dense model of ``direction`` as a folder (without a card) and return its ``provenance.json``,
    except the files.

    ``run`` is a run folder or a checkpoint in it. Raises UserError if there is no dense equivalent, or
    if ``out`` must not be overwritten.
    """
    stored = find_model(run)
    tensors, recipe, made = extract_stored(stored, direction, route)
    provenance = {"kind": "dense", **made}
    write_folder(Path(out), tensors, recipe, stored.vocabulary, provenance)
    return provenance

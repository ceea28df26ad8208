"""Write the matrix products beside linear layers as LoRA adapters of the library ``peft``, with their base.

The folder ``base``, of the kind ``huggingface``, holds the model without the products. An adapter is
``adapter_config.json`` and ``adapter_model.safetensors``: A [r, inputs] and B [outputs, r] of a direction for
each linear layer W, which then computes with W + B A. alpha is r everywhere, so the scale of B A is 1.
Writing needs neither peft nor transformers.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.m2m_100 import rename, their_name
from lsmoe_ds.checkpoint.stored import PROVENANCE, Stored, read_weights, write_folder
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors, open_tensors, save_tensors
from lsmoe_ds.config.host import has_weights
from lsmoe_ds.config.host_origin import origin_of
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export import huggingface
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.export.subnetwork import ALL, check_convertible, describe, extract
from lsmoe_ds.folders import read_fields, read_json, resolved, write_json
from lsmoe_ds.inference.load import check_route, empty_model
from lsmoe_ds.methods.base import Product
from lsmoe_ds.methods.context import Route
from lsmoe_ds.model.methods import methods_of
from lsmoe_ds.parallel.topology import Topology

BASE, SIZES, CONFIG, STEM = "base", "sizes.json", "adapter_config.json", "adapter_model"


@dataclass(frozen=True)
class Adapter:
    """The products for some directions, by the names of their linear layers, without those of rank 0.

    ``name`` is the name of its folder: a direction, a language, or empty for a single adapter.
    """

    name: str
    directions: tuple[Direction, ...]
    products: Mapping[str, Product]


def split(
    weights: Mapping[str, Tensor], recipe: Recipe, direction: Direction | None, route: str = "specific"
) -> tuple[Tensors, Recipe, list[Adapter]]:
    """Return the dense base of a model, by our names, with its recipe, and its adapters.

    There is one adapter for ``direction``, or for all directions by the shared route. Otherwise there is one
    for each adapter that a method names itself; or else for each language, if only the source or only the
    target chooses products; or else for each direction. Raises UserError if the model adds no products, or
    has no dense base.
    """
    whole, chosen = Tensors.of(weights), check_route(route, recipe)
    methods = [method for method in methods_of(recipe, Topology.single()) if method.adds_products]
    if not methods:
        raise UserError(
            "the model has no matrices beside its linear layers, which are what --as peft writes: use --as "
            "huggingface"
        )
    for method in methods_of(recipe, Topology.single()):
        if method.reshapes:
            raise UserError(
                f"'model.{method.name}' gives each direction a base with other layers or sizes, so that "
                "adapters of several directions cannot share one: use --as dense or --as "
                "huggingface, which merge all"
            )
    groups: dict[str, list[Direction]] = {}
    routes: dict[str, Route] = {}
    own = {name: each for method in methods for name, each in method.adapters().items()}
    if direction is not None or chosen == "shared":
        groups[""] = [direction] if direction is not None else list(recipe.languages.directions)
    elif own:
        if chosen != "specific":
            raise UserError(f"the route {chosen} merges adapters: name a direction, as in --direction en-de")
        groups = {name: [each] for name, (each, _) in own.items()}
        routes = {name: route for name, (_, route) in own.items()}
    else:
        by = set().union(*(method.chosen_by for method in methods))
        for each in recipe.languages.directions:
            name = str(each) if len(by) > 1 else each.target if by == {"target"} else each.source
            groups.setdefault(name, []).append(each)
    if recipe.model.huggingface is None:
        check_convertible(recipe, next(iter(groups.values()))[0], route)
    plain = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={method.name: None for method in methods})}
    )
    added = {name for name in whole if any(method.owns(name) for method in methods)}
    rest = Tensors({name: entry for name, entry in whole.entries.items() if name not in added})
    base, changed = extract(rest, plain, direction)
    if direction is not None:
        training = changed.training.model_copy(update={"directions": None})
        changed = changed.model_copy(update={"data": changed.data.only(direction), "training": training})
        changed = Recipe.model_validate(changed.model_dump())
    adapters = []
    for name, directions in groups.items():
        found: dict[str, Product] = {}
        for method in methods:
            found |= method.products(whole, directions[0], routes.get(name, chosen))
        found = {at: product for at, product in found.items() if product.rank}
        adapters.append(Adapter(name, tuple(directions), found))
    if not any(adapter.products for adapter in adapters):
        raise UserError(
            f"the matrices of {direction or 'every direction'} all have rank 0, so the base is left: use "
            "--as huggingface"
        )
    return base, changed, adapters


def split_stored(
    stored: Stored, direction: Direction | None, route: str = "specific", average: Averaging = 1
) -> tuple[Tensors, Recipe, list[Adapter], dict[str, Any]]:
    """Apply :func:`split` to a run, a checkpoint or a folder; also return the ``provenance.json`` of the
    result, except kind and files.

    ``dense_parameters`` counts the base and the largest adapter.
    """
    whole = read_weights(stored, average)
    size = stored.recipe.data.vocabulary.size
    empty_model(stored.recipe, size, Tensors.of(whole.tensors), Topology.single())
    base, recipe, adapters = split(whole.tensors, stored.recipe, direction, route)
    largest = max(sum(each.values for each in adapter.products.values()) for adapter in adapters)
    of = str(direction) if direction else ALL
    return base, recipe, adapters, describe(stored, whole, of, route, base.numbers + largest)


def write_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    vocabulary: Path,
    adapters: Sequence[Adapter],
    sizes: Sequence[Mapping[str, Any]],
    of_base: Mapping[str, Any],
    base: Path | None,
    home: Path,
) -> list[str]:
    """Write the kind ``peft``: adapters, their ``sizes`` and the base, unless ``base`` is a folder with it.

    ``of_base`` is the base's provenance. Adapters :func:`refer` to the base from ``home``, the final path of
    ``folder``. Raises UserError if ``base`` has other weights, or lies in ``home``.
    """
    renamed = _renamed(tensors, recipe)
    if base is not None and resolved(base).is_relative_to(resolved(home)):
        raise UserError(f"--base {base} lies in {home}, which is replaced: choose another folder with --out")
    names: list[str] = [SIZES]
    if base is None:
        files = write_folder(
            folder / BASE,
            tensors,
            recipe,
            vocabulary,
            {"kind": "huggingface", **of_base},
            write=huggingface.write_files,
        )
        names += [f"{BASE}/{name}" for name in (*files, PROVENANCE)]
    else:
        check_base(base, renamed)
    for adapter in adapters:
        if adapter.products:
            at = folder / adapter.name
            at.mkdir(exist_ok=True)
            files_of = save_tensors(_tensors(adapter, renamed, recipe), at, STEM, sys.maxsize)
            refers = refer(base or home / BASE, home / adapter.name, home)
            write_json(at / CONFIG, config(adapter, refers, recipe))
            names += [str(Path(adapter.name, name)) for name in (*files_of, CONFIG)]
    write_json(folder / SIZES, {"adapters": list(sizes)})
    return names


def refer(base: Path, at: Path, out: Path) -> str:
    """Return how files in the folder ``at`` within ``out`` refer to a base.

    A base in or beside ``out`` is named by its relative path; any other by the model's name, because its path
    means nothing on other machines.
    """
    base, at, out = resolved(base), resolved(at), resolved(out)
    return os.path.relpath(base, at) if base.is_relative_to(out.parent) else origin_of(base).name


def base_of(tensors: Mapping[str, Tensor], recipe: Recipe) -> Path | None:
    """Return the folder that can serve unchanged as the adapters' base: that of a host whose weights did not
    train. None if the base must be written.
    """
    folder = recipe.model.huggingface
    if folder is None or not has_weights(folder):
        return None
    try:
        check_base(folder, _renamed(tensors, recipe))
    except UserError:
        return None
    return folder.absolute()


def check_base(base: Path, wanted: Tensors) -> None:
    """Raise UserError unless a folder for transformers has these weights, bit by bit; it may have more."""
    found = open_tensors(base)
    for name in wanted:
        if name not in found:
            raise UserError(f"--base {base} lacks {name}: name a base that was written of this model")
        if not torch.equal(found[name].to(wanted[name].dtype), wanted[name]):
            raise UserError(
                f"--base {base} has another {name} than this model: adapters need the base that they were "
                "trained beside"
            )


def _renamed(tensors: Mapping[str, Tensor], recipe: Recipe) -> Tensors:
    """Return the base's tensors by their names in transformers."""
    if recipe.model.huggingface is not None:
        from lsmoe_ds.export.host import theirs

        return theirs(tensors)
    return rename(tensors, recipe, recipe.data.vocabulary.size)


def _module(at: str, recipe: Recipe) -> str:
    """Return the name of one of our linear layers in transformers' model."""
    if recipe.model.huggingface is not None:
        from lsmoe_ds.config.host_outline import read_outline

        return read_outline(recipe.model.huggingface, recipe.model.task).modules[at]
    name = their_name(f"{at}.weight")
    assert name is not None
    return name.removesuffix(".weight")


def _tensors(adapter: Adapter, base: Tensors, recipe: Recipe) -> Tensors:
    """Return an adapter's tensors by peft's names, padded with zeros to the size of the base's layers."""

    def made(product: Product, is_up: bool, shape: tuple[int, int]) -> LazyTensor:
        def make() -> Tensor:
            value = product.make()[is_up]
            return F.pad(value, (0, shape[1] - value.shape[1], 0, shape[0] - value.shape[0]))

        return LazyTensor(shape, make)

    entries = {}
    for at, product in adapter.products.items():
        module = _module(at, recipe)
        outputs, inputs = base.shape(f"{module}.weight")
        for kind, is_up, shape in (
            ("A", False, (product.rank, inputs)),
            ("B", True, (outputs, product.rank)),
        ):
            entries[f"base_model.model.{module}.lora_{kind}.weight"] = made(product, is_up, shape)
    return Tensors(entries)


def config(adapter: Adapter, base: str, recipe: Recipe) -> dict[str, Any]:
    """Return ``adapter_config.json``: the most frequent rank, and the layers with other ranks."""
    ranks = {_module(at, recipe): product.rank for at, product in adapter.products.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if recipe.model.huggingface is None else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def measure(adapters: Sequence[Adapter], base: Tensors, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the sizes of adapters: ranks by kind of layer, values, those not pruned, and bytes of weights.

    A rank is one number, or the least and the greatest over layers. Zeros that pad matrices to the size of
    the base's layers count only as bytes.
    """
    renamed = _renamed(base, recipe)
    rows = []
    for adapter in adapters:
        ranks: dict[str, set[int]] = {}
        for at, product in adapter.products.items():
            _, side, _, _, kind = _module(at, recipe).split(".", 4)
            if recipe.model.huggingface is not None:  # model.layers.0.self_attn.q_proj
                side, _, kind = at.split(".", 2)
            ranks.setdefault(f"{side}.{kind}", set()).add(product.rank)
        products = adapter.products.values()
        rows.append(
            {
                "name": adapter.name,
                "directions": [str(each) for each in adapter.directions],
                "ranks": {kind: sorted({min(each), max(each)}) for kind, each in ranks.items()},
                "values": sum(each.values for each in products),
                "values_kept": sum(each.kept() for each in products),
                "bytes": sum(each.bytes for each in _tensors(adapter, renamed, recipe).entries.values()),
            }
        )
    return rows


HEADER = ("adapter", "rank", "values", "not pruned", "bytes")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row of the table of sizes, whose header is :data:`HEADER`."""
    by_rank: dict[str, list[str]] = {}
    for kind, ranks in row["ranks"].items():
        by_rank.setdefault(" to ".join(map(str, ranks)), []).append(kind)
    ranks = "; ".join(f"{rank}: {', '.join(kinds)}" for rank, kinds in by_rank.items())
    numbers = (f"{row[key]:,}" for key in ("values", "values_kept", "bytes"))
    return (row["name"] or ", ".join(row["directions"]), ranks or "0: the base alone", *numbers)


def size_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the table of sizes for the terminal."""
    from rich.table import Table

    shown = Table(*HEADER)
    for row in rows:
        shown.add_row(*cells(row))
    return shown


def open_adapted(stored: Stored, base: Path | None = None) -> Callable[[Direction], Exported]:
    """Load a folder of the kind ``peft`` on its base; needs peft and transformers.

    ``base`` is the base's folder, if ``stored`` knows only its name. The returned function gives a
    direction's engine, which is usable until the next call.
    """
    peft: Any = importlib.import_module("peft")
    base = base or stored.home / read_fields(stored.home / PROVENANCE, base=str)["base"]
    rows = (read_json(stored.home / SIZES) or {})["adapters"]
    exported = Exported.open(replace(stored, weights_in=base))
    wrapped: Any = None

    def of(direction: Direction) -> Exported:
        nonlocal wrapped
        row = next(row for row in rows if str(direction) in row["directions"])
        if not row["ranks"]:
            return Exported.open(replace(stored, weights_in=base))
        name, folder = row["name"] or "default", stored.home / row["name"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses names that transformers has replaced
            if wrapped is None:
                wrapped = peft.PeftModel.from_pretrained(exported.model, folder, adapter_name=name)
            elif name not in wrapped.peft_config:
                wrapped.load_adapter(folder, adapter_name=name)
        wrapped.set_adapter(name)
        return replace(exported, model=wrapped.eval())

    return of

"""Reduce a model that routes by token or sentence to the experts that one direction uses most, or to one a
layer.

The use of an expert is its mean routing weight over the tokens of the direction's dev text: how often it is
chosen, times how surely. If all experts are kept, results are bit-identical; with fewer, tokens choose among
the remaining ones. This is the pruning of NLLB-MoE by language pair ("Memory-efficient NLLB-200", 2023), by
its third measure.

E experts, H hidden, F width of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import FEED_FORWARD
from lsmoe_ds.errors import UserError

Uses = Mapping[tuple[str, int], Tensor]  # [E] float64, by side and layer
One = Literal["used", "mean"]  # the expert that replaces a layer's experts: the most used, or their mean
SAID: dict[One, str] = {"used": "the most used expert", "mean": "the mean of all experts, weighted by use,"}


@dataclass(frozen=True)
class Keep:
    """How many experts a layer keeps: a ``number``, or as many as cover a ``share`` of the use."""

    number: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Keep:
        """Read ``16`` as a number and ``0.95`` as a share. Raises UserError for anything else."""
        if re.fullmatch(r"[1-9]\d{0,8}", text):
            return cls(number=int(text))
        if re.fullmatch(r"\d?\.\d+", text) and 0 < float(text) <= 1:
            return cls(share=float(text))
        raise UserError(
            f"--keep is {text!r}: give the number of experts of a layer, as in 16, or the share of the use "
            "that they cover, above 0 and up to 1.0, as in 0.95"
        )

    def count(self, uses: Sequence[Tensor], least: int) -> int:
        """Return how many experts each layer of a side keeps: at least ``least``, the number a token chooses.

        A share is covered in every layer, and no layer keeps more than it has.
        """
        if self.number is not None:
            return min(self.number, len(uses[0]))
        assert self.share is not None
        found = [least]
        for use in uses:
            covered = use.sort(descending=True).values.cumsum(0)
            # The last sum may be rounded; all experts that are used at all cover a share of 1.
            enough = covered >= self.share * covered[-1] * (1 - 1e-12)
            found.append(int(enough.int().argmax()) + 1)
        return max(found)


def keep_used(
    weights: Tensors, recipe: Recipe, uses: Uses, keep: Keep
) -> tuple[Tensors, Recipe, dict[str, Any]]:
    """Return the model with the most used experts of each layer, and their description for the model card.

    ``weights`` and ``recipe`` are those of :func:`lsmoe_ds.export.subnetwork.extract`. Raises UserError for a
    number that is not possible.
    """
    all_of = [moe for _, _, moe in recipe.model.moe_layers()]
    least, most = max(moe.top_k for moe in all_of), max(moe.experts for moe in all_of)
    if keep.number is not None and not least <= keep.number <= most:
        raise UserError(f"--keep is {keep.number}: layers can keep {least} to {most} experts")
    entries, sides, said = dict(weights.entries), {}, {}
    for name in ("encoder", "decoder"):
        layers = [(layer, moe) for side, layer, moe in recipe.model.moe_layers() if side == name]
        if not layers:
            continue
        moe = layers[0][1]
        number = keep.count([uses[name, layer] for layer, _ in layers], moe.top_k)
        covered = []
        for layer, _ in layers:
            use = uses[name, layer]
            kept = _most_used(use, number)
            covered.append(float(use[kept].sum() / use.sum()))
            entries = _renumbered(entries, f"{name}.{layer}.feed_forward.", kept)
        before = getattr(recipe.model, name)
        sides[name] = before.model_copy(update={"moe": moe.model_copy(update={"experts": number})})
        said[name] = {"kept": number, "of": moe.experts, "least_use": round(min(covered), 4)}
    changed = recipe.model_copy(update={"model": recipe.model.model_copy(update=sides)})
    return Tensors(entries), Recipe.model_validate(changed.model_dump()), said


def add_pruning(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description by :func:`keep_used` of a model that has been pruned ``before``, too.

    Each side has the description of its latest pruning, with the one before as ``before``. A pruning that
    kept all experts is left out.
    """
    merged = dict(before)
    for side, each in now.items():
        if side not in before:
            merged[side] = each
        elif each["kept"] < each["of"]:
            merged[side] = {**each, "before": before[side]}
    return merged


def keep_one(weights: Tensors, recipe: Recipe, uses: Uses, one: One) -> tuple[Tensors, Recipe]:
    """Return a dense model in which one expert replaces all of a layer: a start for distillation.

    With top-1 routing, whose weights are below 1, its output is scaled by the mean weight of all choices.
    """
    entries = dict(weights.entries)
    for side, layer, moe in recipe.model.moe_layers():
        at = f"{side}.{layer}.feed_forward."
        use = uses[side, layer]
        shares = (use / use.sum()).float()
        experts = [int(use.argmax())] if one == "used" else list(range(len(use)))
        scale = float(use.sum()) if moe.top_k == 1 else 1.0
        made = {
            f"{at}{part}": _mean(
                weights, at, part, experts, shares, scale if part.startswith("contract") else 1.0
            )
            for part in FEED_FORWARD
        }
        entries = {name: entry for name, entry in entries.items() if not name.startswith(at)} | made
    sides = {
        name: side.model_copy(update={"moe": None})
        for name, side in (("encoder", recipe.model.encoder), ("decoder", recipe.model.decoder))
    }
    changed = recipe.model_copy(update={"model": recipe.model.model_copy(update=sides)})
    return Tensors(entries), Recipe.model_validate(changed.model_dump())


def _most_used(use: Tensor, number: int) -> list[int]:
    """Return the most used experts, ascending, so that keeping all of them changes nothing."""
    return sorted(use.argsort(descending=True, stable=True)[:number].tolist())


def _renumbered(entries: Mapping[str, LazyTensor], at: str, kept: list[int]) -> dict[str, LazyTensor]:
    """Return the entries with the ``kept`` experts of the layer ``at`` and their rows of its router."""
    numbers, found = {expert: number for number, expert in enumerate(kept)}, {}
    for name, entry in entries.items():
        if (own := re.fullmatch(rf"{re.escape(at)}experts\.(\d+)\.(.+)", name)) is not None:
            if (number := numbers.get(int(own[1]))) is not None:
                found[f"{at}experts.{number}.{own[2]}"] = entry
        elif name.startswith(f"{at}router."):
            found[name] = _rows(entry, kept)
        else:
            found[name] = entry
    return found


def _rows(entry: LazyTensor, rows: list[int]) -> LazyTensor:
    return entry._replace(shape=(len(rows), *entry.shape[1:]), make=lambda: entry.make()[rows])


def _mean(
    weights: Tensors, at: str, part: str, experts: list[int], shares: Tensor, scale: float
) -> LazyTensor:
    """Return a scaled tensor of one expert, or the mean of several experts', weighted by their shares."""
    names = [f"{at}experts.{expert}.{part}" for expert in experts]

    def make() -> Tensor:
        if len(names) == 1:
            return weights[names[0]] * scale
        total = torch.zeros(weights.shape(names[0]))
        for name, share in zip(names, shares.tolist(), strict=True):
            total.add_(weights[name], alpha=share * scale)
        return total

    return LazyTensor(weights.shape(names[0]), make)

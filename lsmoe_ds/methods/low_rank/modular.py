"""Modular LoRA: an input and an output pair of matrices for each language, trained separately and merged at
translation ("Towards Modular Fine-tuning of LLM-based Multilingual Neural Machine Translation").

For a direction from source s to target t, with V F the product of a pair of matrices (B A in the paper):

    outputs      y = W x + (w_in V_in F_in + w_out V_out F_out) x                            (equation 3)
    matrices     y = W x + (a V_in + b V_out) (a F_in + b F_out) x, a^2 = w_in, b^2 = w_out  (equation 4)
    learned      as ``outputs``, with w_in, w_out = softmax(w_0, w_1) of each layer and direction (equation 5)

``in`` are the input matrices of s, ``out`` the output matrices of t. Training is centered on a pivot
language: a direction into the pivot trains only its source's input matrices, a direction out of the pivot
only its target's output matrices. A direction without the pivot uses both, with equal weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lsmoe_ds.methods.context import SHARED, LanguageContext

ROUTE = re.compile(r"(outputs|matrices)-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)")
Kind = Literal["in", "out"]


class Merge(NamedTuple):
    """How the two products of a direction are merged."""

    by: Literal["outputs", "matrices"]
    weights: tuple[float, float]  # w_in and w_out, which sum to 1

    @property
    def roots(self) -> tuple[float, float]:
        return math.sqrt(self.weights[0]), math.sqrt(self.weights[1])


def parse_route(route: str) -> Merge | None:
    """Read a route such as ``outputs-1-9``, or ``in`` or ``out``; None for any other."""
    if route in ("in", "out"):
        return Merge("outputs", (float(route == "in"), float(route == "out")))
    found = ROUTE.fullmatch(route)
    if found is None or not (total := float(found[2]) + float(found[3])):
        return None
    weights = float(found[2]) / total, float(found[3]) / total
    return Merge("matrices" if found[1] == "matrices" else "outputs", weights)


def weights_of(source: int, target: int, pivot: int) -> tuple[float, float]:
    """Return the weights (w_in, w_out) of a direction in training."""
    if target == pivot:
        return 1.0, 0.0
    return (0.0, 1.0) if source == pivot else (0.5, 0.5)


@dataclass(frozen=True)
class Chosen:
    """Choose the sentences that use their source's input matrices, or their target's output matrices.

    An argument ``kind`` of :meth:`lsmoe_ds.methods.context.LanguageContext.segments`. If weights are
    ``learned``, all sentences use both. A route that merges decides for all sentences alike.
    """

    kind: Kind
    pivot: int
    learned: bool

    def languages(self, context: LanguageContext) -> list[int]:
        """Return the language of each sentence; SHARED, which has no matrices, if the sentence uses none."""
        place = 0 if self.kind == "in" else 1
        ids = list(zip(context.ids.source.tolist(), context.ids.target.tolist(), strict=True))
        merge = parse_route(context.route)
        if merge is not None:
            used = [bool(merge.weights[place])] * len(ids)
        else:
            used = [self.learned or weights_of(*each, self.pivot)[place] > 0 for each in ids]
        return [each[place] if uses else SHARED for each, uses in zip(ids, used, strict=True)]


def only_used(context: LanguageContext, pivot: int) -> int | None:
    """Return 0 if all sentences use only input matrices, 1 if all use only output matrices, else None."""
    merge = parse_route(context.route)
    if merge is not None:
        found = {merge.weights}
    else:
        ids = zip(context.ids.source.tolist(), context.ids.target.tolist(), strict=True)
        found = {weights_of(*each, pivot) for each in ids}
    only = found.pop() if len(found) == 1 else (0.5, 0.5)
    return only.index(1.0) if 1.0 in only else None


def weigh(
    products: Sequence[Tensor], context: LanguageContext, pivot: int, index: Tensor | None
) -> Sequence[Tensor]:
    """Weight the two products z [S, r] of tokens with their input and output flat matrices.

    ``index`` [D, 2] has the learned w_0 and w_1 of each direction in a layer.
    """
    if (merge := parse_route(context.route)) is not None:
        if 1.0 in merge.weights:
            return products  # the other product is 0
        if merge.by == "outputs":
            return [product * weight for product, weight in zip(products, merge.weights, strict=True)]
        joint = products[0] * merge.roots[0] + products[1] * merge.roots[1]
        has = context.once(("low_rank.has", pivot), lambda: _has(context, pivot)).to(joint.dtype)
        weights = has * torch.tensor(merge.roots, dtype=joint.dtype, device=joint.device)
        products = [joint, joint]
    elif index is not None:
        weights = index.softmax(1)[context.ids.direction]  # [B, 2]
    else:
        found = context.once(("low_rank.modular", pivot), lambda: _in_training(context, pivot))
        if found is None:
            return products
        weights = found.to(products[0].dtype)
    sentences = (len(weights), -1)
    return [
        (product.unflatten(0, sentences) * weights[:, place, None, None]).flatten(0, 1)
        for place, product in enumerate(products)
    ]


def _has(context: LanguageContext, pivot: int) -> Tensor:
    """Tell for each sentence whether it has input and output matrices [B, 2]: the pivot has none."""
    return torch.stack([context.ids.source != pivot, context.ids.target != pivot], 1)


def _in_training(context: LanguageContext, pivot: int) -> Tensor | None:
    """Return the weights [B, 2] of sentences in training; None if each sentence uses only one product."""
    ids = zip(context.ids.source.tolist(), context.ids.target.tolist(), strict=True)
    found = [weights_of(*each, pivot) for each in ids]
    if all(max(each) == 1.0 for each in found):
        return None
    alone = (1.0, 1.0)  # the product that is not used is 0
    weights = [each if min(each) else alone for each in found]
    return torch.tensor(weights, device=context.ids.source.device)

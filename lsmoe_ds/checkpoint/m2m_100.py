"""Rename the weights of a model: to M2M-100's names if it is dense, to NLLB-MoE's if it has experts; and
back.

In these every layer has the same sizes. So narrower feed-forwards are padded with zeros to the widest of
their side, and layers with fewer experts with experts that no token chooses; results stay exactly the same. E
experts, H hidden, F feed-forward width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.host import M2M_100, NLLB_MOE
from lsmoe_ds.config.model import Model, Side
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import count_feed_forward
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted

EMBEDDING = ("embedding.tokens.weight", "model.shared.weight")
PARTS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "cross_attention.query": "encoder_attn.q_proj",
    "cross_attention.key": "encoder_attn.k_proj",
    "cross_attention.value": "encoder_attn.v_proj",
    "cross_attention.output": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
    "feed_forward.expand": "fc1",
    "feed_forward.contract": "fc2",
    "feed_forward_norm": "final_layer_norm",
}
"""Parts of a layer, by our name."""
RENAMED = {
    ".encoder_attn": ".cross_attention",
    ".fc": ".ffn.fc",
    ".final_layer_norm": ".ff_layer_norm",
}
"""Parts of M2M-100's names that NLLB-MoE writes in another way."""
NEVER = -30000.0
"""The router's bias of an expert that no token chooses: beside any logit of a real model, its probability
is 0. In half precision it is finite too.
"""


def type_of(model: Model) -> str:
    """Return the type in transformers of a model with these layers."""
    return NLLB_MOE if any(model.moe_layers()) else M2M_100


def widest(side: Side) -> int:
    """Return the width of the widest feed-forward of a side."""
    return max(side.width(layer) for layer in range(side.layers))


def most_experts(model: Model) -> int:
    """Return how many experts each layer with experts gets in NLLB-MoE, where each token uses 2."""
    return max([2, *(moe.experts for _, _, moe in model.moe_layers())])


def has_router_bias(model: Model) -> bool:
    """Tell whether routers get a bias in NLLB-MoE: they do if they have one, or if a layer is padded."""
    most = most_experts(model)
    return any(moe.router_bias or moe.experts < most for _, _, moe in model.moe_layers())


def count_padding(recipe: Recipe) -> int:
    """Count the values that :func:`rename` adds to a model of this recipe: 2 H + 1 for each padded unit, and
    those of added experts and router rows.
    """
    model, found = recipe.model, 0
    hidden = model.hidden
    for side in (model.encoder, model.decoder):
        for layer in range(side.layers):
            units = (widest(side) - side.width(layer)) * (2 * hidden + 1)
            if side.moe is None or not side.is_moe(layer):
                found += units
                continue
            most, experts = most_experts(model), side.moe.experts
            found += experts * units
            found += (most - experts) * (count_feed_forward(hidden, widest(side)).total + hidden)
            if has_router_bias(model):
                found += most - experts if side.moe.router_bias else most
    return found


def their_name(name: str) -> str | None:
    """Return the name of one of our tensors in M2M-100; None for a tensor that M2M-100 lacks."""
    if name == EMBEDDING[0]:
        return EMBEDDING[1]
    if found := re.fullmatch(r"(encoder|decoder)_norm\.(weight|bias)", name):
        return f"model.{found[1]}.layer_norm.{found[2]}"
    found = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None or found[3] not in PARTS:
        return None
    return f"model.{found[1]}.layers.{found[2]}.{PARTS[found[3]]}.{found[4]}"


def their_names(recipe: Recipe, kind: str | None = None) -> dict[str, str]:
    """Map our names of a model's tensors to theirs. ``kind`` is the type of model, by default the one that
    its layers need.
    """
    kind = kind or type_of(recipe.model)
    found = {}
    sparse = {f"{side}.{layer}.feed_forward.": moe for side, layer, moe in recipe.model.moe_layers()}
    for ours in _dense_names(recipe):
        theirs = str(their_name(ours))
        for before, after in RENAMED.items() if kind == NLLB_MOE else ():
            theirs = theirs.replace(before, after)
        at, of_feed_forward, part = ours.partition("feed_forward.")
        if (moe := sparse.get(at + of_feed_forward)) is None:
            found[ours] = theirs
            continue
        for number in range(moe.experts):
            expert = theirs.replace(".ffn.", f".ffn.experts.expert_{number}.")
            found[f"{at}feed_forward.experts.{number}.{part}"] = expert
    for at, moe in sparse.items():
        side, layer, _ = at.split(".", 2)
        for part in ("weight", "bias")[: 1 + moe.router_bias]:
            found[f"{at}router.{part}"] = f"model.{side}.layers.{layer}.ffn.router.classifier.{part}"
    return found


def _dense_names(recipe: Recipe) -> Iterator[str]:
    """Yield the names of all tensors of a dense model."""
    yield EMBEDDING[0]
    for side, layers in (("encoder", recipe.model.encoder.layers), ("decoder", recipe.model.decoder.layers)):
        for kind in ("weight", "bias"):
            yield f"{side}_norm.{kind}"
            for part in PARTS:
                if side == "decoder" or not part.startswith("cross_"):
                    yield from (f"{side}.{layer}.{part}.{kind}" for layer in range(layers))


def rename(tensors: Mapping[str, Tensor], recipe: Recipe, vocabulary: int) -> Tensors:
    """Return our tensors under their names, padded with zeros and with experts that no token chooses.

    Feed-forwards [F, H] of a side get the same width, and layers with experts the same number. Raises
    UserError if the tensors are not those of a model of this recipe and vocabulary.
    """
    names, ours = their_names(recipe), Tensors.of(tensors)
    if odd := sorted(names.keys() ^ ours.keys()):
        raise UserError(
            f"the weights do not belong to the recipe: {odd[0]} is "
            f"{'missing' if odd[0] in names else 'not a part of it'}"
        )
    if ours.shape(EMBEDDING[0])[0] != vocabulary:
        tokens = counted(ours.shape(EMBEDDING[0])[0], "token")
        raise UserError(f"the weights are of {tokens}, but the vocabulary has {vocabulary:,}")
    renamed = {names[name]: _padded(ours.entries[name], _sizes(name, recipe.model)) for name in ours}
    return Tensors(renamed | _added(recipe.model))


def restore(theirs: Tensors, recipe: Recipe) -> Tensors:
    """Return the tensors of a model of this recipe from theirs: the reverse of :func:`rename`."""
    restored = {}
    for name, source in their_names(recipe).items():
        if source not in theirs:
            raise UserError(f"the weights lack {source}: they do not belong to this recipe")
        restored[name] = _cut(theirs.entries[source], _sizes(name, recipe.model))
    return Tensors(restored)


class _Sizes(NamedTuple):
    """A dimension of a tensor whose size may differ from theirs, and the value that pads ours."""

    dimension: int
    ours: int
    theirs: int
    filled_with: float = 0.0


def _sizes(name: str, model: Model) -> _Sizes | None:
    """Return the dimension of one of our tensors that is a feed-forward's width or the number of experts."""
    found = re.fullmatch(r"(encoder|decoder)\.(\d+)\.feed_forward\.(.+\.)?(\w+)\.(weight|bias)", name)
    if found is None or (found[4], found[5]) == ("contract", "bias"):
        return None
    side = model.encoder if found[1] == "encoder" else model.decoder
    if found[4] == "router" and side.moe is not None:
        return _Sizes(0, side.moe.experts, most_experts(model), NEVER if found[5] == "bias" else 0.0)
    return _Sizes(int(found[4] == "contract"), side.width(int(found[2])), widest(side))


def _padded(entry: LazyTensor, sizes: _Sizes | None) -> LazyTensor:
    if sizes is None or sizes.ours == sizes.theirs:
        return entry
    shape, missing = list(entry.shape), sizes.theirs - sizes.ours
    shape[sizes.dimension] = sizes.theirs
    at_end = (0, missing) if sizes.dimension == len(shape) - 1 else (0, 0, 0, missing)
    return LazyTensor(tuple(shape), lambda: F.pad(entry.make(), at_end, value=sizes.filled_with))


def _cut(entry: LazyTensor, sizes: _Sizes | None) -> LazyTensor:
    """Return the reverse of :func:`_padded`."""
    if sizes is None or entry.shape[sizes.dimension] <= sizes.ours:
        return entry
    shape = list(entry.shape)
    shape[sizes.dimension] = sizes.ours
    return LazyTensor(tuple(shape), lambda: entry.make().narrow(sizes.dimension, 0, sizes.ours))


def _added(model: Model) -> dict[str, LazyTensor]:
    """Return the tensors that NLLB-MoE has and we lack: added experts, all zeros, and biases of routers
    without one, zero for our experts.
    """
    found = {}
    for name, layer, moe in model.moe_layers():
        side, most = (model.encoder if name == "encoder" else model.decoder), most_experts(model)
        width, at = widest(side), f"model.{name}.layers.{layer}.ffn."
        shapes: dict[str, tuple[int, ...]] = {
            "fc1.weight": (width, model.hidden),
            "fc1.bias": (width,),
            "fc2.weight": (model.hidden, width),
            "fc2.bias": (model.hidden,),
        }
        for number in range(moe.experts, most):
            for part, shape in shapes.items():
                found[f"{at}experts.expert_{number}.{part}"] = _zeros(shape)
        if has_router_bias(model) and not moe.router_bias:
            bias = _Sizes(0, moe.experts, most, NEVER)
            found[f"{at}router.classifier.bias"] = _padded(_zeros((moe.experts,)), bias)
    return found


def _zeros(shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, lambda: torch.zeros(shape))

"""The weights of a dense model under M2M-100's names, and back.

What M2M-100 lacks is made up for exactly: feed-forwards narrower than the widest of their side are filled up
with zeros. H hidden, F feed-forward width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor

from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.model import Side
from lsmoe_ds.config.recipe import Recipe
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


def widest(side: Side) -> int:
    """Return the width of the widest feed-forward of a side."""
    return max(side.width(layer) for layer in range(side.layers))


def count_padding(recipe: Recipe) -> int:
    """Count the zeros that :func:`rename` adds to a dense model of this recipe: 2 H + 1 for each unit."""
    sides = (recipe.model.encoder, recipe.model.decoder)
    units = sum(widest(side) - side.width(layer) for side in sides for layer in range(side.layers))
    return units * (2 * recipe.model.hidden + 1)


def their_name(name: str) -> str | None:
    """Return the name of one of our tensors in M2M-100; None for one that it lacks."""
    if name == EMBEDDING[0]:
        return EMBEDDING[1]
    if found := re.fullmatch(r"(encoder|decoder)_norm\.(weight|bias)", name):
        return f"model.{found[1]}.layer_norm.{found[2]}"
    found = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None or found[3] not in PARTS:
        return None
    return f"model.{found[1]}.layers.{found[2]}.{PARTS[found[3]]}.{found[4]}"


def our_names(recipe: Recipe) -> Iterator[str]:
    """Yield the names of all tensors of a dense model."""
    yield EMBEDDING[0]
    for side, layers in (("encoder", recipe.model.encoder.layers), ("decoder", recipe.model.decoder.layers)):
        for kind in ("weight", "bias"):
            yield f"{side}_norm.{kind}"
            for part in PARTS:
                if side == "decoder" or not part.startswith("cross_"):
                    yield from (f"{side}.{layer}.{part}.{kind}" for layer in range(layers))


def rename(tensors: Mapping[str, Tensor], recipe: Recipe, vocabulary: int) -> Tensors:
    """Return the tensors under M2M-100's names, feed-forwards [F, H] filled up with zeros to the widest of
    their side.

    Raises UserError if they are not those of a dense model of this recipe and vocabulary.
    """
    wanted, ours = set(our_names(recipe)), Tensors.of(tensors)
    if odd := sorted(wanted ^ ours.keys()):
        raise UserError(
            f"the weights do not belong to the recipe: {odd[0]} is "
            f"{'missing' if odd[0] in wanted else 'not a part of it'}"
        )
    if ours.shape(EMBEDDING[0])[0] != vocabulary:
        tokens = counted(ours.shape(EMBEDDING[0])[0], "token")
        raise UserError(f"the weights are of {tokens}, but the vocabulary has {vocabulary:,}")
    widths = {"encoder": widest(recipe.model.encoder), "decoder": widest(recipe.model.decoder)}
    renamed = {}
    for name in ours:
        theirs = their_name(name)
        assert theirs is not None
        renamed[theirs] = _widened(ours, name, widths.get(name.split(".")[0], 0))
    return Tensors(renamed)


def restore(theirs: Tensors, recipe: Recipe) -> Tensors:
    """Return the tensors of a dense model of this recipe from M2M-100's: the reverse of :func:`rename`."""
    widths = {"encoder": recipe.model.encoder, "decoder": recipe.model.decoder}
    restored = {}
    for name in our_names(recipe):
        source = their_name(name)
        if source not in theirs:
            raise UserError(f"the weights lack {source}: they do not belong to this recipe")
        part, layer, *_ = name.split(".")
        width = widths[part].width(int(layer)) if part in widths and ".feed_forward." in name else 0
        restored[name] = _narrowed(theirs, str(source), name, width)
    return Tensors(restored)


def _narrowed(theirs: Tensors, source: str, name: str, width: int) -> LazyTensor:
    """Return a feed-forward's tensor without what is beyond ``width``; any other as it is."""
    shape, dimension = list(theirs.shape(source)), _padded(name)
    if dimension is None or shape[dimension] <= width:
        return theirs.entries[source]
    shape[dimension] = width
    return LazyTensor(tuple(shape), lambda: theirs[source].narrow(dimension, 0, width))


def _padded(name: str) -> int | None:
    """Return the dimension of one of our tensors that is a feed-forward's width, None if it has none."""
    return (
        0 if "feed_forward.expand" in name else 1 if name.endswith("feed_forward.contract.weight") else None
    )


def _widened(tensors: Tensors, name: str, width: int) -> LazyTensor:
    """Return a feed-forward's tensor with zeros up to ``width``; any other as it is."""
    shape, dimension = list(tensors.shape(name)), _padded(name)
    if dimension is None or shape[dimension] == width:
        return tensors.entries[name]
    missing = width - shape[dimension]
    shape[dimension] = width
    at_end = (0, missing) if dimension == len(shape) - 1 else (0, 0, 0, missing)
    return LazyTensor(tuple(shape), lambda: F.pad(tensors[name], at_end))

"""The weights and routing of NLLB-MoE (``NllbMoeForConditionalGeneration`` of transformers) as ours.

Its layers are those of M2M-100 under other names; every n-th has experts, of which each token takes the two
most probable, with their probabilities scaled to sum to 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsmoe_ds.checkpoint.m2m_100 import our_names, their_name
from lsmoe_ds.checkpoint.tensors import LazyTensor
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import notice

TYPE = "nllb-moe"
RENAMED = {
    ".encoder_attn": ".cross_attention",
    ".fc": ".ffn.fc",
    ".final_layer_norm": ".ff_layer_norm",
}
"""Parts of M2M-100's names that NLLB-MoE writes in another way."""
DEFAULTS: dict[str, Any] = {
    "num_experts": 128,
    "encoder_sparse_step": 4,
    "decoder_sparse_step": 4,
    "router_bias": False,
    "router_dtype": "float32",
    "router_aux_loss_coef": 0.001,
    "router_z_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "second_expert_policy": "all",
    "moe_token_dropout": 0.2,
    "moe_eval_capacity_token_fraction": 1.0,
}
"""The routing in ``config.json``, and what transformers takes where a key is missing."""
TRAINING = {
    "balance_loss_weight": "router_aux_loss_coef",
    "z_loss_weight": "router_z_loss_coef",
    "jitter": "router_jitter_noise",
}
"""Settings of training by our key."""
COUNTS = {"num_experts": 2, "encoder_sparse_step": 0, "decoder_sparse_step": 0}  # and their least values
NUMBERS = tuple(key for key, value in DEFAULTS.items() if isinstance(value, float))


def routing(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the routing of a ``config.json`` with its defaults.

    Raises UserError for values that are none, and for routing that this package does not have. Says it where
    transformers drops tokens at evaluation.
    """
    found = {key: config.get(key, value) for key, value in DEFAULTS.items()}

    def wrong(key: str, should: str) -> UserError:
        return UserError(f"{folder}: '{key}' in config.json should be {should}, found {found[key]!r}")

    for key, least in COUNTS.items():
        if type(found[key]) is not int or not least <= found[key] < 2**31:
            raise wrong(key, f"a number from {least} to {2**31 - 1}")
    for key in NUMBERS:
        if type(found[key]) not in (int, float):
            raise wrong(key, "a number")
    if not 0 <= found["moe_token_dropout"] < 1:
        raise wrong("moe_token_dropout", "from 0 to below 1")
    if type(found["router_bias"]) is not bool:
        raise wrong("router_bias", "true or false")
    if found["second_expert_policy"] != "all":
        raise wrong("second_expert_policy", "'all': others draw second experts at random, even at evaluation")
    if found["router_dtype"] != "float32":
        raise wrong("router_dtype", "'float32': the rounding of others changes which experts are chosen")
    if not (fraction := found["moe_eval_capacity_token_fraction"]) >= 1:  # not a number counts as less
        notice(
            f"{folder} drops tokens at evaluation ('moe_eval_capacity_token_fraction' is {fraction}), which "
            "depends on what else is in the batch; the imported model drops none, and gives the same logits "
            "only where transformers drops none either"
        )
    return found


def count_experts(config: Mapping[str, Any]) -> int:
    """Count the experts of all layers, after :func:`routing`."""
    return config["num_experts"] * sum(_sparse_layers(config, side) for side in ("encoder", "decoder"))


def _sparse_layers(config: Mapping[str, Any], side: str) -> int:
    """Count the layers of a side that have experts: with a step of 0 none."""
    every: int = config[f"{side}_sparse_step"]
    return config[f"{side}_layers"] // every if every else 0


def experts(config: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Return ``moe`` of a side's section of the recipe, after :func:`routing`; nothing for a dense side."""
    if not _sparse_layers(config, side):
        return {}
    given = {key: config[theirs] for key, theirs in TRAINING.items()}
    chosen = {"experts": config["num_experts"], "every": config[f"{side}_sparse_step"], "top_k": 2}
    return {"moe": {**chosen, "routing": "token", "router_bias": config["router_bias"], **given}}


def names(recipe: Recipe) -> dict[str, str]:
    """Return NLLB-MoE's name of each of our tensors."""
    found, model = {}, recipe.model
    sparse = {f"{side}.{layer}.feed_forward.": moe for side, layer, moe in model.moe_layers()}
    for ours in our_names(recipe):
        theirs = str(their_name(ours))
        for before, after in RENAMED.items():
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
        for kind in ("weight", "bias")[: 1 + moe.router_bias]:
            found[f"{at}router.{kind}"] = f"model.{side}.layers.{layer}.ffn.router.classifier.{kind}"
    return found


def without_masking(entries: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Multiply each expert's second matrix [H, F] and bias [H] by ``1 - moe_token_dropout``.

    NLLB-MoE masks outputs of experts in training, and at evaluation multiplies them by that share.
    """
    kept = 1 - config["moe_token_dropout"]

    def scaled(entry: LazyTensor) -> LazyTensor:
        return LazyTensor(entry.shape, lambda: entry.make() * kept)

    scaling = re.compile(r".+\.experts\.\d+\.contract\..+")
    return {name: scaled(each) if scaling.fullmatch(name) else each for name, each in entries.items()}

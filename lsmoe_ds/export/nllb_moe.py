"""Convert the routing of NLLB-MoE (``NllbMoeForConditionalGeneration`` of transformers) to ours, and back.

Its layers are those of M2M-100 under other names (:mod:`lsmoe_ds.checkpoint.m2m_100`); every n-th has
experts, and each token uses the two most probable, with their probabilities scaled to sum to 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lsmoe_ds.checkpoint.m2m_100 import has_router_bias, most_experts
from lsmoe_ds.checkpoint.tensors import LazyTensor
from lsmoe_ds.config.model import Model
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted, notice

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
EVERY_TOKEN = 2**31 - 1  # an expert's capacity in training: no token is dropped
COUNTS = {"num_experts": 2, "encoder_sparse_step": 0, "decoder_sparse_step": 0}  # with their least values
NUMBERS = tuple(key for key, value in DEFAULTS.items() if isinstance(value, float))


def routing(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the routing of a ``config.json`` with its defaults.

    Raises UserError for invalid values, and for routing that this package lacks. Prints a notice if
    transformers would drop tokens at evaluation.
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
    if not (fraction := found["moe_eval_capacity_token_fraction"]) >= 1:  # false for NaN, too
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
    """Count the layers of a side with experts; a step of 0 means none."""
    every: int = config[f"{side}_sparse_step"]
    return config[f"{side}_layers"] // every if every else 0


def experts(config: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Return ``moe`` of a side's section of the recipe, after :func:`routing`; nothing for a dense side."""
    if not _sparse_layers(config, side):
        return {}
    given = {key: config[theirs] for key, theirs in TRAINING.items()}
    chosen = {"experts": config["num_experts"], "every": config[f"{side}_sparse_step"], "top_k": 2}
    return {"moe": {**chosen, "routing": "token", "router_bias": config["router_bias"], **given}}


def without_masking(entries: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Multiply each expert's second matrix [H, F] and bias [H] by ``1 - moe_token_dropout``.

    NLLB-MoE masks outputs of experts in training, and at evaluation multiplies them by this factor.
    """
    kept = 1 - config["moe_token_dropout"]

    def scaled(entry: LazyTensor) -> LazyTensor:
        return LazyTensor(entry.shape, lambda: entry.make() * kept)

    scaling = re.compile(r".+\.experts\.\d+\.contract\..+")
    return {name: scaled(each) if scaling.fullmatch(name) else each for name, each in entries.items()}


def check_exportable(layers: Iterable[tuple[str, int, MoE]]) -> None:
    """Raise UserError, with what was found and what is possible, if NLLB-MoE has no equivalent of a layer.

    ``layers`` is from :meth:`lsmoe_ds.config.model.Model.moe_layers`. Layers routed by task are ignored.
    """
    for side, _, moe in layers:
        if moe.by_task:
            continue
        what, other = None, "--as hybrid keeps the layers as they are, to run in lsmoe_ds"
        if moe.routing != "token":
            what = f"routes by {moe.routing}: NLLB-MoE, which transformers has, routes by token only"
        elif moe.top_k != min(2, moe.experts):
            experts = counted(moe.experts, "expert")
            what = (
                f"gives each token {moe.top_k} of {experts} ('top_k'): NLLB-MoE, which transformers has, "
                "gives it 2, or the only one of a layer"
            )
        elif moe.capacity is not None and moe.capacity.evaluation is not None:
            what = (
                f"drops tokens in evaluation ('capacity.evaluation' is {moe.capacity.evaluation}): NLLB-MoE, "
                "which transformers has, counts padding too, so it can only drop none"
            )
        if what is not None:
            raise UserError(f"the {side} {what}; {other}")


def settings(model: Model) -> dict[str, Any]:
    """Return the routing of a model in ``config.json``: the reverse of :func:`experts`.

    NLLB-MoE has only one value of a training setting for both sides: that of the first side with experts.
    Raises UserError as :func:`check_exportable` does.
    """
    layers = list(model.moe_layers())
    check_exportable(layers)
    _, _, first = layers[0]
    sides = {"encoder": model.encoder.moe, "decoder": model.decoder.moe}
    return {
        "num_experts": most_experts(model),
        **{f"{side}_sparse_step": moe.every if moe is not None else 0 for side, moe in sides.items()},
        "router_bias": has_router_bias(model),
        "router_dtype": "float32",
        "second_expert_policy": "all",
        "moe_token_dropout": 0.0,
        "moe_eval_capacity_token_fraction": 1.0,
        "expert_capacity": EVERY_TOKEN,
        **{theirs: getattr(first, key) for key, theirs in TRAINING.items()},
    }

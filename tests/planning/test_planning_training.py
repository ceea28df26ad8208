"""The operations of a training step by plan, against what torch counts in forward and backward pass."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from support.alternating import alternating
from support.conversions import with_banks
from support.plans import PAPERS, SIDES, VOCABULARY, flops_of, recipe_of

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.model.freezing import freeze
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.arithmetic import flops

LENGTH = 5
ALL_LINEARS = {"rank": 4, "at": "both"}
EVERY_SECOND = {"rank": 4, "at": "feed_forward", "every": 2}
FUSED = ALL_LINEARS | {"fuse_distillation": True}
LEARNED = ALL_LINEARS | {"index": "learned"}
FROZEN: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "all": ("all", None),
    "all, matrices": ("all", ALL_LINEARS),
    "matrices at feed-forwards of every second layer": ("methods", EVERY_SECOND),
    "matrices at all linears": ("methods", ALL_LINEARS),
    "matrices at all linears, fused": ("methods", FUSED),
    "learned matrices": ("methods", LEARNED),
    "learned weights": (["*_low_rank.index"], LEARNED),
    "flat matrices": (["*_low_rank.flat"], ALL_LINEARS),
    "vertical matrices": (["*_low_rank.vertical"], ALL_LINEARS),
    "the decoder": (["decoder*"], None),
    "attentions of the decoder beside matrices": (["decoder.?.*attention.*.weight"], ALL_LINEARS),
    "the top layers of the decoder": (["decoder.2.*", "decoder.3.*", "decoder_norm.*"], None),
    "the embedding": (["embedding.*"], None),
    "the encoder": (["encoder*"], None),
    "the top layer of the encoder": (["encoder.2.*"], None),
    "the last norm of the encoder": (["encoder_norm.bias"], None),
    "the last norm": (["decoder_norm.weight"], None),
    "norms": (["decoder.1.cross_norm.weight", "encoder.1.feed_forward_norm.*"], None),
    "biases": (["encoder.0.attention.value.bias", "decoder.*.expand.bias"], None),
    "queries": (["decoder.2.*attention.query.*"], None),
    "keys": (["decoder.1.cross_attention.key.weight"], None),
    "values": (["decoder.0.attention.value.weight"], None),
}


def trained_by(recipe: Recipe, trainable: Any) -> Recipe:
    recipe.training.trainable = trainable
    return recipe


def flops_of_training(recipe: Recipe, length: int) -> int:
    """Count the operations of three sentences of ``length`` tokens on both sides, forward and backward."""

    def step(model, *batch) -> None:
        model.train()
        freeze(model, recipe, Topology.single())
        model(*batch).loss.backward()

    return flops_of(recipe, length, step)


@pytest.mark.parametrize("again", [False, True], ids=["", "activation checkpointing"])
@pytest.mark.parametrize(("trainable", "banks"), FROZEN.values(), ids=FROZEN)
def test_training_takes_what_torch_counts(trainable, banks, again):
    recipe = trained_by(with_banks(recipe_of("dense", "dense"), banks), trainable)
    recipe.training.activation_checkpointing = again
    found = flops(recipe, LENGTH)
    assert 3 * LENGTH * (found.source_training + found.target_training) == flops_of_training(recipe, LENGTH)


EXPERTS = {
    "all": "all",
    "methods": "methods",
    "the decoder": ["decoder*"],
    "routers": ["*.router.weight"],
    "experts": ["*.experts.*"],
    "the top of both sides": ["encoder.2.*", "decoder.3.*"],
}
ROUTED = [sides for sides in SIDES if sides != ("dense", "dense")] + [("sentence", "token")]


def trainable_of(recipe: Recipe, trainable: Any) -> Any:
    """Leave out the patterns that match nothing: a static router has no weight."""
    routers = any(moe.routing != "static" for _, _, moe in recipe.model.moe_layers())
    return ["*.experts.*"] if trainable == ["*.router.weight"] and not routers else trainable


@pytest.mark.parametrize(
    ("sides", "trainable", "fused", "again"),
    alternating(ROUTED, EXPERTS, [False, True], [False, True]),
    ids=str,
)
def test_training_of_experts_takes_what_torch_counts(sides, trainable, fused, again):
    recipe = recipe_of(*sides, fuse_distillation=fused)
    recipe.training.activation_checkpointing = again
    trained_by(recipe, trainable_of(recipe, EXPERTS[trainable]))
    found = flops(recipe, LENGTH)
    # 2 E H of a sentence router are spread over the sentence's tokens, which rounds.
    rounded = 3 * LENGTH * 2 * (3 + again) if "sentence" in sides else 0
    assert 3 * LENGTH * (found.source_training + found.target_training) == pytest.approx(
        flops_of_training(recipe, LENGTH), rel=0, abs=rounded
    )


GATES = {
    "all": "all",
    "methods": "methods",
    "gates": ["*_clsr.gate.0.*"],
    "last of the gates": ["decoder.*_clsr.gate.2.*"],
    "projections": ["*_clsr.shared", "*_clsr.specific"],
    "what a gate follows": ["encoder.0.attention.output.weight", "decoder.1.feed_forward.contract.bias"],
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("trainable", GATES.values(), ids=GATES)
def test_training_of_gates_takes_what_torch_counts(trainable, shared):
    recipe = recipe_of("dense", "dense")
    recipe.model.clsr = Clsr(gate=7, shared=shared, at=("attention", "feed_forward"))
    trained_by(recipe, trainable)
    found = flops(recipe, LENGTH)
    assert 3 * LENGTH * (found.source_training + found.target_training) == flops_of_training(recipe, LENGTH)


def test_each_side_pays_for_its_own():
    """Where the decoder alone trains, source tokens pay for the gradients of its keys and values."""
    decoder = flops(trained_by(recipe_of("dense", "dense"), ["decoder*"]), LENGTH)
    hidden, layers = 16, 4
    assert decoder.source_training == decoder.source + 2 * layers * 2 * hidden**2
    above = flops(trained_by(recipe_of("dense", "dense"), ["decoder_norm.*"]), LENGTH)
    assert above.source_training == above.source
    assert above.target_training == above.target + 2 * hidden * VOCABULARY


def test_a_model_that_trains_whole_is_counted_without_torch(tmp_path):
    code = (
        "import sys; from lsmoe_ds.planning.arithmetic import flops; from lsmoe_ds.config.file import "
        "load_recipe; found = flops(load_recipe(sys.argv[1])); "
        "print(found.target_training > found.target, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(PAPERS / "iwslt14-lms.yaml")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert said == ["True", "False"]

"""The places of a model at which methods add something, and what is added there."""

from __future__ import annotations

import pytest
import torch
from support.sameness import VOCABULARY, recipe_for, steps_of
from torch import nn

from lsmoe_ds.methods.clsr.settings import Clsr
from lsmoe_ds.methods.low_rank.settings import LowRank
from lsmoe_ds.methods.sites import LinearSite, SublayerSite
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.methods import methods_of
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology


def model_of(recipe) -> Transformer:
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    return model.eval()


def test_a_model_names_its_linear_layers_and_sublayers():
    model = model_of(recipe_for("token", 1, 1, 0))  # every second layer has experts
    sublayers = [
        (site.side, site.layer, site.sublayer) for site in model.sites() if isinstance(site, SublayerSite)
    ]
    encoder, decoder = len(model.encoder), len(model.decoder)
    assert len(sublayers) == 2 * encoder + 3 * decoder == len(set(sublayers))
    for site in model.sites():
        if isinstance(site, LinearSite):
            weight = model.get_parameter(f"{site.side}.{site.layer}.{site.sublayer}.{site.name}.weight")
            assert weight.shape == (site.outputs, site.inputs)
    named = [
        f"{site.side}.{site.layer}.{site.sublayer}.{site.name}"
        for site in model.sites()
        if isinstance(site, LinearSite)
    ]
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".deepspeed_moe." not in name
    ]
    assert sorted(named) == sorted(linear), "all but those of experts"


class Add(nn.Module):
    def forward(self, base, x, context):
        return base(x) + 1


class Double(nn.Module):
    def forward(self, y, x, real, context):
        return 2 * y


def test_what_is_added_is_used_and_has_its_name():
    plain, changed = (model_of(recipe_for("dense", 1, 1, 0)) for _ in range(2))
    batch = steps_of(recipe_for("dense", 1, 1, 0), 0, 1)[0].batches[1]
    expected = plain.logits(batch.source, batch.decoder_input, batch.ids)
    torch.testing.assert_close(changed.logits(batch.source, batch.decoder_input, batch.ids), expected)
    for site in changed.sites():
        if isinstance(site, LinearSite) and (site.side, site.layer, site.name) == ("encoder", 0, "contract"):
            site.add("plus", Add())
        if isinstance(site, SublayerSite) and (site.side, site.layer, site.sublayer) == (
            "decoder",
            1,
            "cross_attention",
        ):
            site.add("twice", Double())
    assert isinstance(changed.get_submodule("encoder.0.feed_forward.contract_plus"), Add)
    assert isinstance(changed.get_submodule("decoder.1.cross_attention_twice"), Double)
    with torch.no_grad():  # the same by the model's own weights
        plain.encoder[0].feed_forward.contract.bias += 1
        plain.decoder[1].cross_attention.output.weight *= 2
        plain.decoder[1].cross_attention.output.bias *= 2
    found = changed.logits(batch.source, batch.decoder_input, batch.ids)
    torch.testing.assert_close(found, plain.logits(batch.source, batch.decoder_input, batch.ids))
    assert not torch.allclose(found, expected)
    with pytest.raises(ValueError, match=r"two methods are placed at encoder\.0\.feed_forward\.contract"):
        next(site for site in changed.sites() if getattr(site, "name", "") == "contract").add("more", Add())


def test_a_recipe_has_the_methods_that_it_names():
    names = {}
    for routing, parts in (
        ("dense", {}),
        ("token", {}),
        ("lms", {"low_rank": LowRank(rank=2)}),
        ("dense", {"clsr": Clsr(gate=4)}),
    ):
        recipe = recipe_for(routing, 1, 1, 0)
        for key, value in parts.items():
            setattr(recipe.model, key, value)
        names[routing, *parts] = [method.name for method in methods_of(recipe, Topology.single())]
    assert list(names.values()) == [[], ["moe"], ["moe", "low_rank"], ["clsr"]]

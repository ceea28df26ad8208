"""What dropout and attention dropout reach, with rates of a half: values become zero or are doubled."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.sameness import VOCABULARY, ragged_batch, recipe_for
from torch import Tensor, nn

from lsmoe_ds.languages import PAD
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

SENTENCES, LENGTH, HIDDEN = 40, 8, 16


def model_of(dropout: float, attention_dropout: float, topology: Topology | None = None) -> Transformer:
    topology = topology or Topology.single()
    recipe = recipe_for("dense", topology.tensor, 1, 0)
    recipe.training.dropout, recipe.training.attention_dropout = dropout, attention_dropout
    model = Transformer(recipe, VOCABULARY, topology)
    initialize(model, 1, topology)
    torch.manual_seed(3)
    return model


def assert_half_is_dropped(found: Tensor, wanted: Tensor) -> None:
    """Assert that every value is zero or twice the wanted one, about half of them each."""
    dropped = found == 0
    torch.testing.assert_close(found[~dropped], 2 * wanted[~dropped])
    assert 0.45 < dropped.float().mean() < 0.55


def test_embeddings_of_both_sides_are_dropped_in_training():
    model = model_of(0.5, 0.0)
    ids = torch.randint(4, VOCABULARY, (SENTENCES, LENGTH))
    wanted = model.embedding(ids)
    seen = {}
    for name, side in (("encoder", model.encoder), ("decoder", model.decoder)):
        side[0].register_forward_pre_hook(lambda layer, inputs, name=name: seen.update({name: inputs[0]}))
    batch = ragged_batch(torch.Generator().manual_seed(1), recipe_for("dense", 1, 1, 0), SENTENCES)
    model(ids, ids, ids, batch.ids)
    for found in seen.values():
        assert_half_is_dropped(found, wanted)
    assert not torch.equal(seen["encoder"], seen["decoder"]), "each side draws its own mask"
    model.eval()(ids, ids, ids, batch.ids)
    assert torch.equal(seen["encoder"], wanted) and torch.equal(seen["decoder"], wanted)


def last_layers(model: Transformer) -> dict[str, tuple[nn.Module, nn.Linear]]:
    """Return for each kind of sublayer the layer it is in and the linear layer that its output comes from."""
    encoder, decoder = model.encoder[0], model.decoder[0]
    return {
        "encoder.attention": (encoder, encoder.attention.output),
        "encoder.feed_forward": (encoder, encoder.feed_forward.contract),
        "decoder.attention": (decoder, decoder.attention.output),
        "decoder.cross_attention": (decoder, decoder.cross_attention.output),
        "decoder.feed_forward": (decoder, decoder.feed_forward.contract),
    }


@pytest.mark.parametrize("name", last_layers(model_of(0.0, 0.0)))
@torch.no_grad()
def test_the_output_of_each_sublayer_is_dropped_before_it_is_added(name):
    """All sublayers but one give zeros, and that one gives ones."""
    model = model_of(0.5, 0.0)
    for _, last in last_layers(model).values():
        last.weight.zero_(), last.bias.zero_()
    layer, last = last_layers(model)[name]
    last.bias.fill_(1.0)
    x = torch.randn(SENTENCES, LENGTH, HIDDEN)
    real, context = (
        torch.ones(SENTENCES, LENGTH, dtype=torch.bool),
        LanguageContext(ragged_batch(torch.Generator(), recipe_for("dense", 1, 1, 0), 2).ids),
    )
    cross = layer.cross_attention.project_kv(x, context) if layer.cross_attention is not None else None
    added = layer(x, real, context, cross=cross)[0] - x
    assert_half_is_dropped(added.round(decimals=4), torch.ones_like(x))
    torch.testing.assert_close(layer.eval()(x, real, context, cross=cross)[0] - x, torch.ones_like(x))


@pytest.mark.parametrize("which", ["attention", "cross_attention"])
@torch.no_grad()
def test_attention_drops_probabilities(which):
    """Of 8 equal keys, whose values are ones, half of the probabilities are dropped, the others doubled."""
    model = model_of(0.0, 0.5)
    attention = getattr(model.decoder[0], which)
    attention.output.weight.copy_(torch.eye(HIDDEN)), attention.output.bias.zero_()
    shape = (SENTENCES, attention.heads, LENGTH, HIDDEN // attention.heads)
    query, keys, values = torch.zeros(shape), torch.zeros(shape), torch.ones(shape)
    found = attention(query, (keys, values), LanguageContext(None))
    eighths = found * LENGTH / 2
    torch.testing.assert_close(eighths, eighths.round(), rtol=0, atol=1e-5)
    kept = eighths.view(SENTENCES, LENGTH, attention.heads, -1)
    assert (kept == kept[..., :1]).all(), "a probability is dropped for all of a head's values"
    assert 3.8 < kept.mean() < 4.2 and kept.std() > 1
    torch.testing.assert_close(
        attention.eval()(query, (keys, values), LanguageContext(None)), torch.ones_like(found)
    )


@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.5, 0.0), (0.0, 0.5)])
def test_two_training_passes_differ_and_two_evaluations_agree(dropout, attention_dropout):
    model, batch = (
        model_of(dropout, attention_dropout),
        ragged_batch(torch.Generator().manual_seed(1), recipe_for("dense", 1, 1, 0), 5),
    )
    arguments = (batch.source, batch.decoder_input, batch.labels, batch.ids)
    assert float(model(*arguments).nll) != float(model(*arguments).nll)
    model.eval()
    plain = model_of(0.0, 0.0)
    assert float(model(*arguments).nll) == float(model(*arguments).nll) == float(plain.eval()(*arguments).nll)
    assert (batch.labels != PAD).any()


def dropped_by_peers(topology):
    """Return the mixed values of this rank's heads, all ones before dropout, and the layer's output."""
    from lsmoe_ds.parallel import compat

    model = model_of(0.5, 0.5, topology)
    compat.seed_tensor_parallel_random(7, topology.tensor_rank)
    mixed, true = [], F.scaled_dot_product_attention

    def recorded(*arguments, **options):
        mixed.append(true(*arguments, **options))
        return mixed[-1]

    layer, x = model.encoder[0], torch.randn(4, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(2))
    for part, value in (("query", 0.0), ("value", 1.0)):  # so that without dropout all heads mix ones evenly
        linear = getattr(layer.attention, part)
        linear.weight.data.zero_(), linear.bias.data.fill_(value)
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", recorded):
        out, _ = layer(x, torch.ones(4, LENGTH, dtype=torch.bool), LanguageContext(None))
    return mixed[0].numpy(), out.numpy()


def test_tensor_parallel_peers_drop_in_their_own_heads_and_alike_in_what_they_share(pool):
    (heads, out), (other_heads, other_out) = pool.run(2, dropped_by_peers, tensor=2)
    assert (heads != other_heads).mean() > 0.5
    assert (out == other_out).all()

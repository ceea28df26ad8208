"""The Transformer against torch's own layers, and its caches, padding, losses and initial weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.sameness import VOCABULARY, ragged_batch, recipe_for
from torch import nn

from lsmoe_ds.languages import PAD
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.model.build import build
from lsmoe_ds.model.embedding import Embedding, sinusoids
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology


def model_of(routing: str) -> Transformer:
    recipe = recipe_for(routing, 1, 1, 0)
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that matter
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.1)
    return model


def batch_of(routing: str = "dense", sentences: int = 5):
    return ragged_batch(torch.Generator().manual_seed(9), recipe_for(routing, 1, 1, 0), sentences)


def test_equals_torch_layers():
    """Pre-norm layers with a final norm, as torch.nn.Transformer(norm_first=True) has them."""
    model, batch = model_of("dense").eval(), batch_of()
    plain = nn.Transformer(16, 4, 2, 2, 24, 0.0, norm_first=True, batch_first=True).eval()

    def copy(theirs: nn.MultiheadAttention, ours: nn.Module) -> None:
        theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight])
        theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key.bias, ours.value.bias])
        theirs.out_proj.load_state_dict(ours.output.state_dict())

    for theirs, ours in [
        *zip(plain.encoder.layers, model.encoder, strict=True),
        *zip(plain.decoder.layers, model.decoder, strict=True),
    ]:
        copy(theirs.self_attn, ours.attention)
        theirs.norm1.load_state_dict(ours.attention_norm.state_dict())
        last = theirs.norm2
        if ours.cross_attention is not None:
            copy(theirs.multihead_attn, ours.cross_attention)
            theirs.norm2.load_state_dict(ours.cross_norm.state_dict())
            last = theirs.norm3
        last.load_state_dict(ours.feed_forward_norm.state_dict())
        theirs.linear1.load_state_dict(ours.feed_forward.expand.state_dict())
        theirs.linear2.load_state_dict(ours.feed_forward.contract.state_dict())
    plain.encoder.norm.load_state_dict(model.encoder_norm.state_dict())
    plain.decoder.norm.load_state_dict(model.decoder_norm.state_dict())
    embedding = model.embedding.tokens.weight

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, embedding) * 4.0 + sinusoids(PAD + 1, ids.shape[1], 16)

    length, padding = batch.decoder_input.shape[1], batch.source == PAD
    hidden = plain(
        embed(batch.source),
        embed(batch.decoder_input),
        tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(1),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    real = batch.labels != PAD
    torch.testing.assert_close(
        model.logits(batch.source, batch.decoder_input, batch.ids)[real], (hidden @ embedding.T)[real]
    )


def test_positions_are_those_of_m2m_100():
    """Row p: sin(p w_i) for the first half of the columns, cos(p w_i) for the second, w_i = 10000^(-i / (H/2
    - 1)).
    """
    table = sinusoids(2, 3, 8)
    for row, position in enumerate((2, 3, 4)):
        for i in range(4):
            angle = position * 10000 ** (-i / 3)
            assert table[row, i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[row, 4 + i] == pytest.approx(math.cos(angle), abs=1e-6)


@torch.no_grad()
def test_positions_beyond_the_table_and_the_scale_of_embeddings():
    """sqrt(H) E + position, the first position being 2; the table grows when it is too short."""
    embedding = Embedding(VOCABULARY, 16, Topology.single())
    ids = torch.arange(700)[None] % VOCABULARY
    wanted = 4.0 * embedding.tokens.weight[ids] + sinusoids(2, 700, 16)
    for length in (1, 511, 512, 513, 700):
        torch.testing.assert_close(embedding(ids[:, :length]), wanted[:, :length])
    for offset in (0, 511, 512, 699):
        fresh = Embedding(VOCABULARY, 16, Topology.single())
        fresh.tokens.weight.copy_(embedding.tokens.weight)
        torch.testing.assert_close(fresh(ids[:, offset : offset + 1], offset), wanted[:, offset : offset + 1])


def test_decoder_sentences_are_summed_up_by_the_mean_of_the_encoders_output():
    model, batch = model_of("sentence").eval(), batch_of("sentence")
    memory, _ = model.encode(batch.source, LanguageContext(batch.ids))
    summary = model.start(batch.source, batch.ids).context.summary
    for row, source in enumerate(batch.source):
        torch.testing.assert_close(summary[row], memory[row, : int((source != PAD).sum())].mean(0))
    assert model_of("target").start(batch.source, batch.ids).context.summary is None


@pytest.mark.parametrize("routing", ["dense", "token", "sentence", "target", "pair", "static"])
def test_steps_with_caches_equal_the_whole(routing):
    model, batch = model_of(routing).eval(), batch_of(routing)
    whole = model.logits(batch.source, batch.decoder_input, batch.ids)
    state = model.start(batch.source, batch.ids)
    steps = [
        model.step(batch.decoder_input[:, i : i + 1], state) for i in range(batch.decoder_input.shape[1])
    ]
    real = batch.labels != PAD
    torch.testing.assert_close(torch.stack(steps, 1)[real], whole[real])


@pytest.mark.parametrize("routing", ["dense", "lms"])
def test_packed_attention_computes_the_same_in_the_same_memory(routing):
    model, batch = model_of(routing).eval(), batch_of(routing)
    wanted, names = (
        model.logits(batch.source, batch.decoder_input, batch.ids),
        [name for name, _ in model.named_parameters()],
    )
    model.pack()
    for layer in [*model.encoder, *model.decoder]:
        attention = layer.attention
        storages = {
            part.weight.untyped_storage().data_ptr()
            for part in (attention.query, attention.key, attention.value)
        }
        if routing == "dense":
            assert storages == {attention.packed[0].untyped_storage().data_ptr()}
        else:
            assert len(storages) == 3 and not attention.packed, "each of the three has a bank beside it"
    torch.testing.assert_close(model.logits(batch.source, batch.decoder_input, batch.ids), wanted)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("routing", ["dense", "token", "sentence", "target", "capacity"])
def test_padding_changes_nothing(routing):
    model, batch = model_of(routing).train(), batch_of(routing)
    wide = [
        torch.cat([part, torch.full((len(part), 4), PAD)], 1)
        for part in (batch.source, batch.decoder_input, batch.labels)
    ]
    narrow = model(batch.source, batch.decoder_input, batch.labels, batch.ids)
    padded = model(*wide, batch.ids)
    torch.testing.assert_close(padded.loss, narrow.loss)
    for one, other in zip(*(losses.notes.get("moe", []) for losses in (padded, narrow)), strict=True):
        assert torch.equal(one.counts, other.counts) and torch.equal(one.dropped, other.dropped)
        torch.testing.assert_close(one.probabilities, other.probabilities)
        torch.testing.assert_close(one.squares, other.squares)


def test_loss_is_label_smoothed_cross_entropy():
    model, batch = model_of("dense").train(), batch_of()
    losses = model(batch.source, batch.decoder_input, batch.labels, batch.ids)
    logits = model.logits(batch.source, batch.decoder_input, batch.ids).flatten(0, 1)
    labels = batch.labels.flatten()
    torch.testing.assert_close(
        losses.loss, F.cross_entropy(logits, labels, ignore_index=PAD, label_smoothing=0.1, reduction="sum")
    )
    nll = F.cross_entropy(logits, labels, ignore_index=PAD, reduction="sum").detach()
    torch.testing.assert_close(losses.nll, nll)
    evaluated = model.eval()(batch.source, batch.decoder_input, batch.labels, batch.ids)
    torch.testing.assert_close((evaluated.loss.detach(), evaluated.nll), (nll, nll))  # nothing is smoothed
    assert not evaluated.notes and not evaluated.further


def initial(topology, recipe):
    model = Transformer(recipe, VOCABULARY, topology)
    initialize(model, 7, topology)
    return {
        name: float(model.get_parameter(local).double().sum())
        for local, name in global_names(model, topology).items()
    }


def test_initial_weights_do_not_depend_on_the_layout(pool):
    recipe = recipe_for("target", 1, 2, 1)
    whole = initial(Topology.single(), recipe)
    parts = pool.run(2, initial, recipe, expert=2)
    assert {**parts[0], **parts[1]} == whole
    assert len(parts[0]) < len(whole), "each rank holds its own experts only"
    split = pool.run(2, initial, recipe_for("target", 2, 1, 1), tensor=2)
    for name, value in whole.items():
        if "attention.query.weight" in name:
            assert (
                split[0][name] + split[1][name] == pytest.approx(value, abs=1e-6)
                and split[0][name] != split[1][name]
            )


def test_a_model_never_attends_by_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        build(recipe_for("token", 1, 1, 0), VOCABULARY)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)

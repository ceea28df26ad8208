"""Packed sentences compute what padded ones do: losses, auxiliary losses and gradients, of every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.sameness import METHODS, VOCABULARY, close, draw_masks, ragged_batch, recipe_for

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.languages import PAD
from lsmoe_ds.methods.base import StepSize
from lsmoe_ds.methods.packing import Packing
from lsmoe_ds.model import packed_attention
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.packed_attention import attend_packed
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

ROUTINGS = ("dense", "token", "sentence", "target", "pair", "static", "mixed", "capacity", "distilled")
MORE: dict[str, dict[str, Any]] = {
    "clsr": {"clsr": {"gate": 8}},
    "clsr, projections of each sublayer": {"clsr": {"gate": 8, "shared": False}},
    "modular": {"low_rank": {"rank": 4, "index": "modular", "pivot": "de"}},
    "fused": {"low_rank": {"rank": 3, "fuse_distillation": True}},
}


def recipe_of(name: str) -> Recipe:
    recipe = recipe_for(name if name not in MORE else "dense", 1, 1, 0)
    given = recipe.model_dump(exclude_none=True)
    given["model"] |= MORE.get(name, {})
    return Recipe.model_validate(given)


def losses_and_gradients(recipe: Recipe, packed: bool, again: bool = False) -> tuple[Any, dict[str, Any]]:
    """Compute one batch's losses, those of methods, and all gradients."""
    recipe.training.packed, recipe.training.activation_checkpointing = packed, again
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():  # biases, norms and matrices that would be zero
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    draw_masks(model, Topology.single())
    batch = ragged_batch(torch.Generator().manual_seed(9), recipe, 6)
    size = StepSize(int((batch.source != PAD).sum()), int((batch.decoder_input != PAD).sum()))
    found = model.train()(*batch.inputs)
    totals = model.count(found.notes)
    of_methods = {
        name: value
        for method in model.methods
        for name, value in method.losses(found.notes.get(method.name, []), totals[method.name], size).items()
    }
    (found.loss / size.target_tokens + sum(of_methods.values())).backward()
    numbers = {"loss": found.loss, "nll": found.nll, **found.further, **of_methods}
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: value.item() for name, value in numbers.items()}, gradients


@pytest.mark.parametrize("name", [*ROUTINGS, *METHODS, *MORE])
def test_losses_and_gradients_are_those_of_padded_sentences(name):
    wanted, theirs = losses_and_gradients(recipe_of(name), packed=False)
    for again in (False, True):
        found, ours = losses_and_gradients(recipe_of(name), True, again)
        assert found == pytest.approx(wanted, rel=1e-5), again
        assert ours.keys() == theirs.keys()
        for parameter, gradient in theirs.items():
            close(ours[parameter], gradient, f"gradient of {parameter}")


def example(lengths: list[int], longest: int) -> tuple[Packing, torch.Tensor]:
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Packing(real), torch.randn(*real.shape, 5, generator=torch.Generator().manual_seed(len(lengths)))


def test_rows_return_to_their_places_and_means_are_those_of_sentences():
    packing, x = example([3, 1, 4], 4)
    rows = packing.pack(x)
    assert rows.shape == (8, 1, 5) and packing.starts.tolist() == packing.starts_on_host == [0, 3, 4, 8]
    assert packing.positions.flatten().tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert torch.equal(packing.unpack(rows), x * packing.real[..., None])
    torch.testing.assert_close(
        packing.mean(rows), torch.stack([x[i, :length].mean(0) for i, length in enumerate((3, 1, 4))])
    )


@pytest.mark.parametrize("name", ["is_causal", "window_size"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_is_told_where_sentences_begin(monkeypatch, causal, name):
    """A stand-in that attends sentence by sentence, called as torch 2.10 and as later ones ask for it."""

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        found = []
        for (start, stop), (first, last) in zip(
            cu_seq_q.unfold(0, 2, 1), cu_seq_k.unfold(0, 2, 1), strict=True
        ):
            assert 0 < stop - start <= max_q and 0 < last - first <= max_k
            rows = query[start:stop], key[first:last], value[first:last]
            rows = (each.transpose(0, 1)[None] for each in rows)
            found.append(F.scaled_dot_product_attention(*rows, is_causal=is_causal)[0].transpose(0, 1))
        return torch.cat(found)

    def by_flag(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)

    def by_window(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        assert window_size in ((-1, -1), (-1, 0))
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))

    queries, _ = example([3, 1, 4], 4)
    keys = queries if causal else example([2, 5, 1], 6)[0]
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(n, 2, 1, 4, generator=generator) for n in (8, *[len(keys.index)] * 2))
    wanted = attend_packed(query, key, value, queries, keys, 0.0, causal)
    stand_in = {"is_causal": by_flag, "window_size": by_window}[name]
    monkeypatch.setattr(packed_attention, "has_kernel", lambda query, dropout: True)
    monkeypatch.setattr(packed_attention, "variable_length_kernel", lambda: stand_in)
    torch.testing.assert_close(attend_packed(query, key, value, queries, keys, 0.0, causal), wanted)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"size": 12}, False),
        ({"size": 264}, False),
        ({"is_cuda": False}, False),
        ({"capability": (7, 5)}, False),  # a T4
        ({"dropout": 0.1}, False),
        ({"kernel": None}, False),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_attend_from_is_padded(monkeypatch, changes, wanted):
    given = {"dtype": torch.bfloat16, "size": 64, "is_cuda": True, "capability": (8, 0), "dropout": 0.0}
    given |= {"kernel": attend_packed} | changes

    class Query:
        dtype, is_cuda, device = given["dtype"], given["is_cuda"], "cuda"
        shape = (8, 2, 1, given["size"])

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: given["capability"])
    monkeypatch.setattr(packed_attention, "variable_length_kernel", lambda: given["kernel"])
    assert packed_attention.has_kernel(Query(), given["dropout"]) is wanted


def test_a_sentence_has_one_noise():
    """With jitter, too, all tokens of a sentence choose the same experts."""
    recipe = recipe_of("sentence")
    for side in (recipe.model.encoder, recipe.model.decoder):
        side.moe.jitter = 0.5
    recipe.training.packed = True
    model, seen = Transformer(recipe, VOCABULARY).train(), []
    initialize(model, 1, Topology.single())
    for _, layer in model.moe_layers():
        layer.observer = seen.append
    model(*ragged_batch(torch.Generator().manual_seed(9), recipe, 6).inputs)
    assert len(seen) == 2
    for each in seen:
        assert len(each.sentences) > 12 and each.sentences.unique().tolist() == list(range(6))
        for sentence in range(6):
            chosen = each.routes.experts[each.sentences == sentence]
            assert torch.equal(chosen, chosen[:1].expand_as(chosen))

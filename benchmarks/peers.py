"""The same models from other hands: plain torch, transformers (Marian, Switch, NLLB-MoE, M2M-100) and
JoeyNMT.

Each is a module whose ``forward(batch)`` is its own mean training loss, and some can ``decode``. Peers that
are not installed are left out by name: see ``benchmarks/README.md``.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import PairBatch
from lsmoe_ds.data.vocabulary import SPECIALS
from lsmoe_ds.export import ctranslate2
from lsmoe_ds.export.huggingface import widest
from lsmoe_ds.languages import BOS, EOS, PAD
from lsmoe_ds.model.embedding import FIRST_POSITION, sinusoids
from lsmoe_ds.shipped import ROOT as PROJECT
from lsmoe_ds.training.optimizers import BETAS, EPSILON

sys.path.insert(0, str(PROJECT / "tests"))
from support.small_huggingface import use_chosen_experts


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        print(f"{distribution} is not installed, so it is left out (benchmarks/README.md)")
        return False
    return True


class PlainTransformer(nn.Module):
    """Our model from torch's own parts: pre-norm, final norms, tied scaled embeddings, sinusoidal
    positions.
    """

    def __init__(self, recipe: Recipe, vocabulary: int) -> None:
        super().__init__()
        model = recipe.model
        self.embedding = nn.Embedding(vocabulary, model.hidden)
        nn.init.normal_(self.embedding.weight, std=model.hidden**-0.5)
        self.register_buffer("positions", sinusoids(FIRST_POSITION, 256, model.hidden), persistent=False)
        self.transformer = nn.Transformer(
            model.hidden,
            model.heads,
            model.encoder.layers,
            model.decoder.layers,
            model.encoder.width(0),
            recipe.training.dropout,
            norm_first=True,
            batch_first=True,
        )
        # Ours has dropout on sublayer outputs only, as in M2M-100's defaults.
        for module in self.transformer.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout = nn.Identity()  # type: ignore[assignment]
        self.dropout = recipe.training.dropout

    def embed(self, ids: Tensor, offset: int = 0) -> Tensor:
        positions = self.get_buffer("positions")[offset : offset + ids.shape[1]]
        return F.dropout(
            self.embedding(ids) * self.embedding.embedding_dim**0.5 + positions, self.dropout, self.training
        )

    def forward(self, batch: PairBatch) -> Tensor:
        length = batch.decoder_input.shape[1]
        padding = batch.source == PAD
        hidden = self.transformer(
            self.embed(batch.source),
            self.embed(batch.decoder_input),
            tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(1),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        real = batch.labels != PAD
        return F.cross_entropy(
            F.linear(hidden[real], self.embedding.weight), batch.labels[real], label_smoothing=0.1
        )

    @torch.inference_mode()
    def decode(self, source: Tensor, forced: Tensor) -> Tensor:
        """Source [B, M] -> the most probable tokens [B, T], with keys and values kept in caches; read are
        ``forced`` [B, T].
        """

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (self.transformer.nhead, -1)).transpose(1, 2)

        decoder = self.transformer.decoder
        mask = (source != PAD)[:, None, None, :]
        memory = self.transformer.encoder(self.embed(source), src_key_padding_mask=source == PAD)
        cross = []
        for layer in decoder.layers:
            attention = layer.multihead_attn
            both = F.linear(
                memory,
                *(part[attention.embed_dim :] for part in (attention.in_proj_weight, attention.in_proj_bias)),
            )
            cross.append([heads(part) for part in both.chunk(2, 2)])
        own: list[list[Tensor]] = [[] for _ in decoder.layers]
        latest, found = torch.full_like(source[:, :1], EOS), []
        for position in range(forced.shape[1]):
            x = self.embed(latest, position)
            for i, layer in enumerate(decoder.layers):
                attention = layer.self_attn
                query, *new = F.linear(
                    layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias
                ).chunk(3, 2)
                own[i] = (
                    [torch.cat([old, heads(part)], 2) for old, part in zip(own[i], new, strict=True)]
                    if position
                    else [*map(heads, new)]
                )
                mixed = F.scaled_dot_product_attention(heads(query), own[i][0], own[i][1])
                x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
                attention = layer.multihead_attn
                size = attention.embed_dim
                query = F.linear(
                    layer.norm2(x), attention.in_proj_weight[:size], attention.in_proj_bias[:size]
                )
                mixed = F.scaled_dot_product_attention(heads(query), cross[i][0], cross[i][1], mask)
                x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
                x = x + layer.linear2(F.relu(layer.linear1(layer.norm3(x))))
            found.append(F.linear(decoder.norm(x[:, -1]), self.embedding.weight).argmax(1))
            latest = forced[:, position : position + 1]
        return torch.stack(found, 1)


class Transformers(nn.Module):
    """A model of transformers with its own loss, which smooths no labels."""

    model: Any  # of a class of transformers

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PairBatch) -> Tensor:
        loss: Tensor = self.model(
            input_ids=batch.source,
            attention_mask=(batch.source != PAD).long(),
            decoder_input_ids=batch.decoder_input,
            labels=batch.labels.masked_fill(batch.labels == PAD, -100),
            use_cache=False,
        ).loss
        return loss

    @torch.inference_mode()
    def decode(self, source: Tensor, forced: Tensor) -> Tensor:
        """As :meth:`PlainTransformer.decode`, through ``generate``; returned are the forced tokens."""
        rows = torch.arange(len(source))

        def force(before: Tensor, scores: Tensor) -> Tensor:
            scores[rows, forced[:, before.shape[1] - 1]] = torch.inf
            return scores

        found: Tensor = self.model.generate(
            input_ids=source,
            attention_mask=(source != PAD).long(),
            min_new_tokens=forced.shape[1],
            max_new_tokens=forced.shape[1],
            logits_processor=[force],
            num_beams=1,
            do_sample=False,
        )
        return found


class CTranslate2:
    """A dense model of ours in CTranslate2, with its weights (by global name) in a quantization, on as many
    threads as torch.
    """

    def __init__(
        self, tensors: dict[str, Tensor], recipe: Recipe, vocabulary: int, quantization: str
    ) -> None:
        self.pieces = [SPECIALS.get(index, str(index)) for index in range(vocabulary)]
        with tempfile.TemporaryDirectory() as folder:
            ctranslate2.specify(tensors, recipe, self.pieces, quantization).save(folder)
            self.translator = ctranslate2.library().Translator(
                folder, compute_type=quantization, intra_threads=torch.get_num_threads()
            )

    def decode(self, source: Tensor, forced: Tensor) -> object:
        """As many tokens as ``forced`` [B, T] has. It reads its own choices: for a dense model they cost what
        any tokens do, while tokens given as a prefix would go through the decoder all at once.
        """
        texts = [[self.pieces[index] for index in row if index not in (PAD, EOS)] for row in source.tolist()]
        length = forced.shape[1]
        found = self.translator.translate_batch(
            texts, beam_size=1, min_decoding_length=length, max_decoding_length=length
        )
        assert all(len(each.hypotheses[0]) == length for each in found)
        return found


def _shape(recipe: Recipe, vocabulary: int) -> dict[str, Any]:
    """Return the sizes of a recipe under the names that Marian, M2M-100 and NLLB-MoE give them."""
    model, dropout = recipe.model, recipe.training.dropout
    sides = {"encoder": model.encoder, "decoder": model.decoder}
    shape = {
        f"{name}_{key}": value
        for name, side in sides.items()
        for key, value in (("layers", side.layers), ("ffn_dim", widest(side)))
    }
    heads = {f"{name}_attention_heads": model.heads for name in sides}
    tokens = {
        "vocab_size": vocabulary,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
    }
    return {
        "d_model": model.hidden,
        **shape,
        **heads,
        **tokens,
        "max_position_embeddings": 256,
        "dropout": dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "scale_embedding": True,
        "forced_eos_token_id": None,
    }


def marian(recipe: Recipe, vocabulary: int) -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    return Transformers(MarianMTModel(MarianConfig(**_shape(recipe, vocabulary))))


def m2m100(recipe: Recipe, vocabulary: int) -> nn.Module:
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    return Transformers(M2M100ForConditionalGeneration(M2M100Config(**_shape(recipe, vocabulary))))


def nllb_moe(recipe: Recipe, vocabulary: int, experts: int, every: int) -> nn.Module:
    """Make transformers' NLLB-MoE: ``experts`` of the recipe's width in every ``every``-th layer, top-2, none
    full.

    Mended as tests/support/small_huggingface.py does, or the comparison would be with a model of two experts.
    """
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    use_chosen_experts()
    sparse = {
        "num_experts": experts,
        "encoder_sparse_step": every,
        "decoder_sparse_step": every,
        "expert_capacity": 2**20,
    }
    return Transformers(
        NllbMoeForConditionalGeneration(NllbMoeConfig(**_shape(recipe, vocabulary), **sparse))
    )


def switch(recipe: Recipe, vocabulary: int) -> nn.Module:
    """Switch Transformer (T5's attention) with as many experts in as many layers of each side as the recipe
    has; nothing dropped.
    """
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    model = recipe.model
    moe = model.encoder.moe
    assert moe is not None
    sparse = {
        f"num_sparse_{side}_layers": model.encoder.layers // moe.every for side in ("encoder", "decoder")
    }
    config = SwitchTransformersConfig(
        vocab_size=vocabulary,
        d_model=model.hidden,
        d_kv=model.hidden // model.heads,
        d_ff=model.encoder.width(0),
        num_layers=model.encoder.layers,
        num_decoder_layers=model.decoder.layers,
        num_heads=model.heads,
        num_experts=moe.experts,
        expert_capacity=2**20,
        dropout_rate=recipe.training.dropout,
        router_jitter_noise=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        **sparse,
    )
    return Transformers(SwitchTransformersForConditionalGeneration(config))


class JoeyNMT(nn.Module):
    """JoeyNMT's Transformer with its own loss: label-smoothed, summed over tokens."""

    def __init__(self, recipe: Recipe, vocabulary: int) -> None:
        super().__init__()
        from joeynmt.model import build_model

        model, dropout = recipe.model, recipe.training.dropout

        def side(layers: int, width: int) -> dict[str, Any]:
            return {
                "type": "transformer",
                "num_layers": layers,
                "num_heads": model.heads,
                "hidden_size": model.hidden,
                "ff_size": width,
                "dropout": dropout,
                "layer_norm": "pre",
                "embeddings": {"embedding_dim": model.hidden, "scale": True},
            }

        size = types.SimpleNamespace(
            **{
                f"{name}_index": value
                for name, value in (("pad", PAD), ("bos", BOS), ("eos", EOS), ("unk", EOS), ("sep", None))
            },
            specials=[],
            lang_tags=[],
            lookup=lambda token: token,
        )
        words = type(
            "Words", (types.SimpleNamespace,), {"__len__": lambda _: vocabulary, "__hash__": object.__hash__}
        )(**vars(size))
        encoder, decoder = (side(each.layers, each.width(0)) for each in (model.encoder, model.decoder))
        config = {"encoder": encoder, "decoder": decoder, "tied_embeddings": True, "tied_softmax": True}
        self.model = build_model(config, words, words)
        self.model.loss_function = ("crossentropy", 0.1)

    def forward(self, batch: PairBatch) -> Tensor:
        loss: Tensor = self.model(
            return_type="loss",
            src=batch.source,
            src_length=(batch.source != PAD).sum(1),
            src_mask=(batch.source != PAD)[:, None],
            trg_input=batch.decoder_input,
            trg=batch.labels,
            trg_mask=(batch.labels != PAD)[:, None],
        )[0]
        return loss / batch.target_tokens


def training(model: nn.Module, recipe: Recipe, batches: list[PairBatch]) -> Callable[[], None]:
    """Return a function that trains one step on each batch, without an engine.

    The loop is the usual one: loss, backward, clip, fused AdamW.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True
    )

    def run() -> None:
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            model(batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm)
            optimizer.step()

    return run

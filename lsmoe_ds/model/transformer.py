"""The encoder-decoder Transformer: pre-norm with a final norm, the architecture of M2M-100.

Any feed-forward can be a mixture of experts. B sentences, T target positions, M source positions, H hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.config.model import Side
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import SideName, Sublayer
from lsmoe_ds.directions import Languages, SentenceIds
from lsmoe_ds.languages import PAD
from lsmoe_ds.methods.base import Totals
from lsmoe_ds.methods.context import LanguageContext, Notes, Route
from lsmoe_ds.methods.objective import Objective
from lsmoe_ds.methods.packing import Packing
from lsmoe_ds.methods.sites import LayerSite, Linears, Site, SublayerSite, UnitsSite, WithSublayers
from lsmoe_ds.model.attention import Attention, Cache, GrowingCache, Mask
from lsmoe_ds.model.base import Losses, Model
from lsmoe_ds.model.embedding import Embedding
from lsmoe_ds.model.feed_forward import FeedForward
from lsmoe_ds.model.recomputing import as_a_whole, recompute
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.layers import output_logits, project
from lsmoe_ds.parallel.topology import Topology


@dataclass
class DecoderState:
    """The decoder's state for B sentences.

    In beam search each sentence has the same number W of consecutive hypotheses: ``context`` and ``own`` then
    have B W rows, while ``cross`` and ``mask`` keep B.
    """

    cross: list[Cache]  # for each layer, keys and values of the source
    mask: Mask  # [B, 1, 1, M], true where the source is real
    context: LanguageContext
    own: list[GrowingCache | None] = field(default_factory=list)  # for each layer, those of the target so far
    length: int = 0  # target positions so far

    def select(self, sentences: Tensor | None, hypotheses: Tensor | None = None) -> DecoderState:
        """Return the state of the sentences with these indices [B'], in that order; None keeps all.

        ``hypotheses`` [B' W'] are the rows of the hypotheses to continue, W' for each of these sentences.
        """

        def of(cache: Cache, index: Tensor) -> Cache:
            return cache[0].index_select(0, index), cache[1].index_select(0, index)

        rows = sentences if hypotheses is None else hypotheses
        assert rows is not None
        assert isinstance(self.mask, Tensor), "only training packs"
        cross = self.cross if sentences is None else [of(cache, sentences) for cache in self.cross]
        mask = self.mask if sentences is None else self.mask[sentences]
        own = [None if cache is None else cache.select(rows) for cache in self.own]
        return DecoderState(cross, mask, self.context.select(rows), own, self.length)


class Layer(WithSublayers):
    """An encoder or decoder layer: attention, in the decoder cross-attention, and a feed-forward.

    Each sublayer is norm, sublayer, add.
    """

    def __init__(
        self,
        recipe: Recipe,
        side: Side,
        index: int,
        decoder: bool,
        languages: Languages,
        topology: Topology,
    ) -> None:
        super().__init__()
        hidden, heads, dropout = recipe.model.hidden, recipe.model.heads, recipe.training.attention_dropout
        self.hidden = hidden
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads, dropout, topology)
        self.cross_norm = nn.LayerNorm(hidden) if decoder else None
        self.cross_attention = Attention(hidden, heads, dropout, topology) if decoder else None
        self.feed_forward_norm = nn.LayerNorm(hidden)
        self.feed_forward: nn.Module
        if side.is_moe(index):
            from lsmoe_ds.moe.layer import (
                MixtureOfExperts,
            )  # imports DeepSpeed, which a dense model does not need

            assert side.moe is not None
            width, alone = side.width(index), Topology.single(topology.device)
            shared = FeedForward(hidden, width, topology) if side.moe.has_shared else None
            self.feed_forward = MixtureOfExperts(
                hidden, side.moe, lambda: FeedForward(hidden, width, alone), languages, topology, shared
            )
        else:
            self.feed_forward = FeedForward(hidden, side.width(index), topology)
        self.is_moe = side.is_moe(index)
        self.dropout = recipe.training.dropout

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training else x

    def forward(
        self,
        x: Tensor,
        real: Tensor,
        context: LanguageContext,
        own_mask: Mask | None = None,
        causal: bool = False,
        cross: Cache | None = None,
        cross_mask: Mask | None = None,
        past: GrowingCache | None = None,
    ) -> tuple[Tensor, GrowingCache]:
        """Apply the layer, x [B, T, H] -> [B, T, H]; also return the keys and values of all positions so far.

        ``real`` [B, T] is true at real tokens. ``cross`` holds the source's keys and values, ``past`` those
        of the earlier positions, to which the new ones are appended.
        """
        normed = self.attention_norm(x)
        query, new = self.attention.project_qkv(normed, context)
        if past is None:
            past = GrowingCache(new)
        else:
            past.append(new)
        y = self.attention(query, past.filled, context, own_mask, causal)
        y = self.follow("attention", y, normed, real, context)
        x = x + self._drop(y)
        if self.cross_attention is not None:
            assert self.cross_norm is not None and cross is not None
            # All hypotheses of a sentence attend to one memory: [B W, T, H] -> [B, W T, H] and back.
            normed = self.cross_norm(x)
            sentences = len(x if context.packing else cross[0])
            query = self.cross_attention.project_q(normed.view(sentences, -1, x.shape[2]), context)
            y = self.cross_attention(query, cross, context, cross_mask).view_as(x)
            y = self.follow("cross_attention", y, normed, real, context)
            x = x + self._drop(y)
        normed = self.feed_forward_norm(x)
        y = self.feed_forward(normed, real, context) if self.is_moe else self.feed_forward(normed, context)
        x = x + self._drop(self.follow("feed_forward", y, normed, real, context))
        return self.finish(x, context), past

    def sites(self, side: SideName, number: int) -> Iterator[Site]:
        """Yield the sublayers, each with its linear layers and hidden units, then the layer; no experts."""
        found: dict[Sublayer, nn.Module | None] = {
            "attention": self.attention,
            "cross_attention": self.cross_attention,
            "feed_forward": self.feed_forward,
        }
        for name, module in found.items():
            if module is not None:
                yield SublayerSite(side, number, name, self.hidden, self)
            if isinstance(module, Linears):
                yield from module.linear_sites(side, number, name)
            if isinstance(module, FeedForward):
                yield UnitsSite(side, number, module.shapes["expand"][1], self.hidden, module)
        yield LayerSite(side, number, self.hidden, self)


class Transformer(Model):
    """The whole model, with the recipe's shape and ``vocabulary`` tokens V."""

    def __init__(self, recipe: Recipe, vocabulary: int, topology: Topology | None = None) -> None:
        topology = topology or Topology.single()
        super().__init__(recipe, topology)
        model, languages = recipe.model, recipe.languages
        self.embedding = Embedding(vocabulary, model.hidden, topology)
        self.add_shared_modules()
        self.encoder = nn.ModuleList(
            Layer(recipe, model.encoder, i, False, languages, topology) for i in range(model.encoder.layers)
        )
        self.decoder = nn.ModuleList(
            Layer(recipe, model.decoder, i, True, languages, topology) for i in range(model.decoder.layers)
        )
        self.encoder_norm = nn.LayerNorm(model.hidden)
        self.decoder_norm = nn.LayerNorm(model.hidden)
        self.install_methods()
        self.dropout = recipe.training.dropout
        self.recomputes = recipe.training.activation_checkpointing
        self.packs = recipe.training.packed
        self.summarize = model.decoder.moe is not None and model.decoder.moe.routing == "sentence"

    def _embed(self, ids: Tensor, offset: int = 0, packing: Packing | None = None) -> Tensor:
        embedded: Tensor = self.embedding(ids, offset, packing)
        return F.dropout(embedded, self.dropout) if self.training else embedded

    def _packing(self, real: Tensor) -> Packing | None:
        return Packing(real) if self.packs and self.training else None

    def _apply_layer(
        self, layer: nn.Module, x: Tensor, real: Tensor, context: LanguageContext, **options: Any
    ) -> tuple[Tensor, GrowingCache | None]:
        """Apply a layer. With activation checkpointing only its input is kept, without keys and values."""
        if not (self.recomputes and self.training and torch.is_grad_enabled()):
            found: tuple[Tensor, GrowingCache | None] = layer(x, real, context, **options)
            return found
        again = [context.replay(), compat.replay_tensor_parallel_random(self.topology.tensor)]
        return recompute(lambda x: as_a_whole(layer(x, real, context, **options)[0]), again, x), None

    def encode(self, source: Tensor, context: LanguageContext) -> tuple[Tensor, Mask]:
        """Encode source ids [B, M]: return the memory [B, M, H] and its mask [B, 1, 1, M].

        If the model packs, the memory is the rows of real tokens [N, 1, H], and the mask their packing.
        """
        real = source != PAD
        mask: Mask = real[:, None, None, :]
        packing = self._packing(real)
        if packing is not None:
            context, mask, real = context.pack(packing), packing, packing.rows
        x = self._embed(source, 0, packing)
        for layer in self.encoder:
            x, _ = self._apply_layer(layer, x, real, context, own_mask=mask)
        return self.encoder_norm(x), mask

    def _decode(self, tokens: Tensor, real: Tensor, state: DecoderState) -> Tensor:
        """Decode input ids [B, T] after ``state.length`` earlier positions: hidden states [B, T, H].

        Extends the state.
        """
        context, own_mask = state.context, None
        packing = self._packing(real)
        if packing is not None:
            context, own_mask, real = context.pack(packing), packing, packing.rows
        x = self._embed(tokens, state.length, packing)
        state.own = state.own or [None] * len(self.decoder)
        for i, layer in enumerate(self.decoder):
            # Padding is at the end, so the causal mask hides it from every real position. A single new
            # position needs no mask, since it may attend to all earlier ones.
            x, state.own[i] = self._apply_layer(
                layer,
                x,
                real,
                context,
                own_mask=own_mask,
                causal=tokens.shape[1] > 1,
                cross=state.cross[i],
                cross_mask=state.mask,
                past=state.own[i],
            )
        state.length += tokens.shape[1]
        x = self.decoder_norm(x)
        return x if packing is None else packing.unpack(x)

    def start(
        self,
        source: Tensor,
        ids: SentenceIds,
        notes: Notes | None = None,
        route: Route = "specific",
    ) -> DecoderState:
        """Encode source ids [B, M] and return the initial decoder state."""
        memory, mask = self.encode(source, LanguageContext(ids, None, notes, route))
        context = LanguageContext(ids, None, notes, route)
        of_source = context.pack(mask) if isinstance(mask, Packing) else context
        cross = [layer.cross_attention.project_kv(memory, of_source) for layer in self.decoder]  # type: ignore[union-attr, operator]
        if self.summarize:
            context.summary = of_source.mean(memory, source != PAD)
        return DecoderState(cross, mask, context)

    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Decode the next tokens [B, T]; return the logits [B, V] after the last one. Extends the state."""
        hidden = self._decode(tokens, torch.ones_like(tokens, dtype=torch.bool), state)
        return output_logits(hidden[:, -1], self.embedding.tokens, self.topology)

    def logits(
        self, source: Tensor, decoder_input: Tensor, ids: SentenceIds, route: Route = "specific"
    ) -> Tensor:
        """Return teacher-forced logits [B, T, V]; those at padding are meaningless."""
        hidden = self._decode(decoder_input, decoder_input != PAD, self.start(source, ids, route=route))
        return output_logits(hidden.flatten(0, 1), self.embedding.tokens, self.topology).unflatten(
            0, hidden.shape[:2]
        )

    def forward(
        self,
        source: Tensor,
        decoder_input: Tensor,
        labels: Tensor,
        ids: SentenceIds,
        route: Route = "specific",
    ) -> Losses:
        """Compute the losses of sources [B, M], decoder inputs and labels [B, T], summed over real labels.

        In training the objective chooses the routes. If it trains both, an MoE layer records twice the
        tokens, unless it has a shared feed-forward for the second route.
        """
        objective = self.objective if self.training else Objective()
        if self.training:
            (source, decoder_input, labels), ids = objective.expand((source, decoder_input, labels), ids)
            route = objective.route
        hidden, notes = self.states(source, decoder_input, ids, route)
        index = (
            (labels.reshape(-1) != PAD).nonzero().squeeze(1)
        )  # the vocabulary is projected for real tokens only
        objective.see(source, decoder_input, ids, index)
        hidden, labels = hidden.flatten(0, 1)[index], labels.reshape(-1)[index]
        smoothing = self.smoothing if self.training else 0.0
        logits = project(hidden, self.embedding.tokens, self.topology)
        return Losses(*objective.losses(logits, labels, smoothing, self.topology), notes)

    def states(
        self, source: Tensor, decoder_input: Tensor, ids: SentenceIds, route: Route = "specific"
    ) -> tuple[Tensor, Notes]:
        """Return the decoder's hidden states [B, T, H], and in training the notes of all methods."""
        notes: Notes = {}
        state = self.start(source, ids, notes if self.training else None, route)
        return self._decode(decoder_input, decoder_input != PAD, state), notes

    def sites(self) -> Iterator[Site]:
        """Yield the sites at which methods can add modules, layer by layer."""
        sides: tuple[SideName, ...] = ("encoder", "decoder")
        for side in sides:
            for number, layer in enumerate(getattr(self, side)):
                yield from layer.sites(side, number)

    @torch.no_grad()
    def totals_ahead(self, source: Tensor, decoder_input: Tensor, labels: Tensor, ids: SentenceIds) -> Totals:
        """Return the part of the totals that :meth:`forward` computes if it draws the same random numbers.

        This runs a forward pass, unless all methods can count from the ids.
        """
        real = {"encoder": source != PAD, "decoder": decoder_input != PAD}
        if (ahead := self.counted_ahead(real, ids)) is not None:
            return ahead
        (source, decoder_input), ids = self.objective.expand((source, decoder_input), ids)
        return self.count(self.states(source, decoder_input, ids, self.objective.route)[1])

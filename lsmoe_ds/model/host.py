"""Models of transformers whose linear layers are sites of methods.

B sentences, T positions, N labels, V vocabulary, C classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.config.host import (
    PREFIX,
    has_weights,
    is_in_head,
    load_pretrained,
    read_config,
    set_dropout,
    set_head,
)
from lsmoe_ds.config.host_outline import empty_host, layers_of, read_outline
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import LinearShapes, SideName
from lsmoe_ds.data.batches import IGNORED, SequenceBatch
from lsmoe_ds.data.labels import OUTSIDE
from lsmoe_ds.directions import SentenceIds
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods.base import Totals
from lsmoe_ds.methods.context import LanguageContext, Notes, Route
from lsmoe_ds.methods.objective import Objective
from lsmoe_ds.methods.sites import Linears, LinearSite
from lsmoe_ds.model.base import Losses, Model
from lsmoe_ds.model.recomputing import recompute
from lsmoe_ds.parallel.topology import Topology


def host_buffers(recipe: Recipe) -> dict[str, Tensor]:
    """Return the host's buffers, by their names in :class:`HostModel`, without creating its parameters."""
    init_empty_weights = importlib.import_module("accelerate").init_empty_weights
    folder = recipe.model.huggingface
    assert folder is not None
    config = read_config(folder)
    set_head(config, recipe.model.task, recipe.data.labels or ())
    with init_empty_weights(include_buffers=False):
        host = empty_host(folder, recipe.model.task, config)
    return {f"{PREFIX}{name}": buffer for name, buffer in host.named_buffers()}


def _without_ties(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Remove the second name of each tied parameter from a state dict, as ``named_parameters`` does."""
    names = {f"{prefix}{name}" for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for name in [name for name in state if name not in names]:
        del state[name]


class _Plain:
    """A linear layer of the host, without the module that a method added beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


class _Sublayer(Linears):
    """Hold the modules that methods add beside a sublayer's linear layers, named as in our own model."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: LinearShapes = {}


class Host(Model):
    """A model of the transformers library, called through its usual interface.

    If a method has added a module beside a linear layer, the module computes that layer's result. It reads
    the batch's languages from :attr:`context`, which is set for one forward pass.
    """

    def __init__(self, recipe: Recipe, vocabulary: int, topology: Topology | None = None) -> None:
        super().__init__(recipe, topology or Topology.single())
        folder, task, training = recipe.model.huggingface, recipe.model.task, recipe.training
        assert folder is not None
        config, labels = read_config(folder), recipe.data.labels or ()
        set_dropout(config, training.dropout, training.attention_dropout)
        set_head(config, task, labels)
        self.outline = read_outline(folder, task, labels)
        if vocabulary > self.outline.vocabulary:
            raise UserError(
                f"the tokenizer in {folder} has {vocabulary} tokens, more than the {self.outline.vocabulary} "
                "of the model's embedding: they do not belong together"
            )
        # Without weights if none are needed: for an outline, or if a checkpoint has them.
        empty = torch.get_default_device().type == "meta" or not has_weights(folder)
        self.host: Any
        self._fresh: list[str] = []  # parameters of the head that no weights were loaded for
        if empty:
            self.host = empty_host(folder, task, config)
        else:
            self.host, self._fresh = load_pretrained(folder, task, config)
        if task == "translate":  # otherwise the folder's settings would apply beside those of our search
            self.host.generation_config = type(self.host.generation_config)()
        self._is_headed = task != "translate"
        self.register_state_dict_post_hook(_without_ties)
        self.context: LanguageContext | None = None
        self.add_shared_modules()
        self._sublayers: dict[str, _Sublayer] = {}
        self._add_places()
        self.install_methods()
        for site in self.sites():
            if (added := site.module.beside.get(site.name)) is not None:
                layer = self.host.get_submodule(self.outline.modules[site.at])
                layer.forward = partial(self._beside, added, _Plain(layer))
        if training.activation_checkpointing:
            for _, _, _, layer in layers_of(self.host):
                layer.forward = partial(self._again, layer.forward)

    def _add_places(self) -> None:
        """Add modules such as ``decoder.0.attention``, which hold the modules that methods add."""
        for shape in self.outline.sites:
            at = f"{shape.side}.{shape.layer}.{shape.sublayer}"
            if at not in self._sublayers:
                above: nn.Module = self
                for name in (shape.side, str(shape.layer)):
                    if not hasattr(above, name):
                        above.add_module(name, nn.Module())
                    above = getattr(above, name)
                self._sublayers[at] = _Sublayer()
                above.add_module(shape.sublayer, self._sublayers[at])
            self._sublayers[at].shapes[shape.name] = (shape.inputs, shape.outputs, shape.split)

    def sites(self) -> Iterator[LinearSite]:
        for shape in self.outline.sites:
            module = self._sublayers[f"{shape.side}.{shape.layer}.{shape.sublayer}"]
            yield LinearSite(**vars(shape), module=module)

    def _again(self, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Apply a layer of the host with activation checkpointing: only its input is kept."""
        context = self.context
        if context is None or not (self.training and torch.is_grad_enabled()):
            return forward(*arguments, **options)
        return recompute(forward, [context.replay(), self._in_context(context)], *arguments, **options)

    @contextmanager
    def _in_context(self, context: LanguageContext) -> Iterator[None]:
        """Set :attr:`context` for the modules beside linear layers, also while a layer is recomputed."""
        self.context = context
        try:
            yield
        finally:
            self.context = None

    def _beside(self, added: nn.Module, base: _Plain, x: Tensor) -> Tensor:
        """Apply a linear layer of the host with the module beside it."""
        assert self.context is not None
        found: Tensor = added(base, x, self.context)
        return found

    def is_loaded(self, name: str) -> bool:
        return name.startswith(PREFIX) and name.removeprefix(PREFIX) not in self._fresh

    def is_in_head(self, name: str) -> bool:
        own = name.startswith(PREFIX) and self._is_headed
        return own and is_in_head(name.removeprefix(PREFIX), self.host)

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Replace parameters and buffers by these tensors, by local name; tied parameters appear once."""
        self.load_state_dict(dict(weights), assign=True, strict=False)
        self.host.tie_weights()

    def _logits_at(self, tokens: Tensor, real: Tensor, context: LanguageContext, index: Tensor) -> Tensor:
        """Return the logits [N, classes] at the labels' flat positions ``index`` [N]."""
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, labels: Tensor, real: Tensor, ids: SentenceIds, route: Route = "specific"
    ) -> Losses:
        """Compute the losses of sequences [B, T], summed over the labels that are not IGNORED."""
        objective = self.objective if self.training else Objective()
        if self.training:
            (tokens, labels, real), ids = objective.expand((tokens, labels, real), ids)
            route = objective.route
        notes: Notes = {}
        index = (labels.reshape(-1) != IGNORED).nonzero().squeeze(1)
        context = LanguageContext(ids, None, notes if self.training else None, route)
        logits, learned = self._logits_at(tokens, real, context, index), labels.reshape(-1)[index]
        smoothing = self.smoothing if self.training else 0.0
        return Losses(*objective.losses(logits, learned, smoothing, self.topology), notes)

    @torch.no_grad()
    def totals_ahead(self, tokens: Tensor, labels: Tensor, real: Tensor, ids: SentenceIds) -> Totals:
        sides: tuple[SideName, ...] = ("encoder", "decoder")
        ahead = self.counted_ahead({side: real.bool() for side in sides}, ids)
        assert ahead is not None, "no method beside linear layers counts hidden states"
        return ahead


class HostModel(Host):
    """A decoder-only language model that learns the answers of prompts."""

    def __init__(self, recipe: Recipe, vocabulary: int, topology: Topology | None = None) -> None:
        super().__init__(recipe, vocabulary, topology)
        self._head_is_plain: bool | None = None  # unknown before the first pass

    def _logits_at(self, tokens: Tensor, real: Tensor, context: LanguageContext, index: Tensor) -> Tensor:
        """Return the logits [N, V] at the flat positions ``index`` [N] of tokens [B, T], padded at the end.

        Padding needs no mask, since no position attends to a later one.
        """
        self.context = context
        try:
            if not self._is_head_plain():
                whole: Tensor = self.host(input_ids=tokens, use_cache=False).logits
                return whole.flatten(0, 1)[index]
            hidden = self.host.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            found: Tensor = self.host.get_output_embeddings()(hidden.flatten(0, 1)[index])
            return found
        finally:
            self.context = None

    def _is_head_plain(self) -> bool:
        """Tell whether the logits are just the product of the last states and the output layer.

        Some models also scale or cap them, which a pass on one token shows. If they do not, the output layer
        is applied only at positions with labels.
        """
        if self._head_is_plain is None:
            head = self.host.get_output_embeddings()
            token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
            training, context = self.host.training, self.context
            self.host.eval()
            self.context = LanguageContext(SentenceIds(*[token[0]] * 3))
            with torch.no_grad():
                states = self.host.base_model(input_ids=token, use_cache=False).last_hidden_state
                whole = self.host(input_ids=token, use_cache=False).logits
                self._head_is_plain = torch.allclose(head(states), whole)
            self.host.train(training)
            self.context = context
        return self._head_is_plain

    def logits(self, tokens: Tensor, ids: SentenceIds, route: Route = "specific") -> Tensor:
        """Return teacher-forced logits [B, T, V] of tokens padded at the end; ignore those at padding."""
        index = torch.arange(tokens.numel(), device=tokens.device)
        context = LanguageContext(ids, None, None, route)
        return self._logits_at(tokens, torch.ones_like(tokens), context, index).unflatten(0, tokens.shape)

    def generate(self, batch: SequenceBatch, route: Route, **options: Any) -> Any:
        """Continue prompts [B, T], padded at the beginning, with transformers' ``generate``.

        In beam search a sentence's hypotheses are adjacent rows, so the context of B sentences stays valid.
        """
        self.context = LanguageContext(batch.ids, None, None, route)
        try:
            return self.host.generate(input_ids=batch.tokens, attention_mask=batch.real, **options)
        finally:
            self.context = None


class LabellingModel(Host):
    """An encoder that labels words, or finds the start and end of an answer.

    ``real`` has the number of each token's segment, from 1, and 0 at padding. A question's second segment is
    its context.
    """

    def __init__(self, recipe: Recipe, vocabulary: int, topology: Topology | None = None) -> None:
        super().__init__(recipe, vocabulary, topology)
        self._has_types = getattr(self.host.config, "type_vocab_size", 1) > 1
        self._is_answering = recipe.model.task == "answer"

    def logits(self, tokens: Tensor, real: Tensor, ids: SentenceIds, route: Route = "specific") -> Tensor:
        """Return the logits of the classes at each token [B, T, C], or of an answer's ends [B, 2, T]."""
        return self._logits(tokens, real, LanguageContext(ids, None, None, route))

    def _logits(self, tokens: Tensor, real: Tensor, context: LanguageContext) -> Tensor:
        self.context = context
        types = {"token_type_ids": (real == 2).long()} if self._has_types else {}
        try:
            found = self.host(input_ids=tokens, attention_mask=(real > 0).long(), **types)
        finally:
            self.context = None
        if not self._is_answering:
            classes: Tensor = found.logits
            return classes
        # Not minus infinity, because an objective may subtract one logit from another.
        return torch.stack([found.start_logits, found.end_logits], 1).masked_fill(real[:, None] == 0, OUTSIDE)

    def _logits_at(self, tokens: Tensor, real: Tensor, context: LanguageContext, index: Tensor) -> Tensor:
        return self._logits(tokens, real, context).flatten(0, 1)[index]

"""The costs of a model: parameters, traffic between ranks, arithmetic, each with its formula.

Memory is in :mod:`lsmoe_ds.planning.memory`, experts in :mod:`lsmoe_ds.moe.costs`, and each method's costs
are in its section.

H hidden, F feed-forward width, V vocabulary, L sentence length.
"""

from __future__ import annotations

from dataclasses import dataclass

from lsmoe_ds.config.method import Held
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import (
    Count,
    LinearShape,
    Shape,
    SideName,
    SublayerShape,
    count_linears,
    shapes_of,
)
from lsmoe_ds.moe import costs as experts
from lsmoe_ds.moe.costs import Exchange

VALUE_BYTES = {"float32": 4, "bfloat16": 2}
LENGTH = 32  # default tokens per sentence


def passes(recipe: Recipe) -> int:
    """Count the passes of each token through the model in training: one per route."""
    return 2 if recipe.model.distills else 1


def count_side(
    recipe: Recipe, side: SideName, serving: bool = False, held: Held = "all", merged: bool = False
) -> Count:
    """Count the encoder or the decoder with its final norm. Each sublayer has a norm; a norm has 2 H.

    ``serving`` counts what must be loaded to translate one direction. Methods are then ``merged`` into the
    layers beside them, if they can be, and add nothing (see :mod:`lsmoe_ds.export.subnetwork`).
    """
    model, languages = recipe.model, recipe.languages
    merged = merged or serving
    methods = [method for method in model.methods if method.unmergeable or not merged]
    held = "specific" if merged else held
    settings = model.encoder if side == "encoder" else model.decoder
    total = Count(whole=2 * model.hidden)
    for method in methods:
        total += method.count_side(side, model, languages)
    for site in shapes_of(model):
        if site.side != side:
            continue
        if isinstance(site, LinearShape):
            total += count_linears({site.name: (site.inputs, site.outputs, site.split)})
        else:
            total += Count(whole=2 * model.hidden)
            if settings.moe is not None and site.sublayer == "feed_forward" and settings.is_moe(site.layer):
                tasks, width = len(languages.tasks(settings.moe.task)), settings.width(site.layer)
                total += experts.count_layer(model.hidden, width, settings.moe, tasks, serving, held)
        for method in methods:
            if method.is_at(site):
                total += method.count(site, languages, held)
    return total


@dataclass(frozen=True)
class Parts:
    """The parameters by part. The output layer is tied to the embedding and adds none."""

    vocabulary: Count
    encoder: Count
    decoder: Count

    @classmethod
    def of(cls, recipe: Recipe, serving: bool = False, held: Held = "all", merged: bool = False) -> Parts:
        model = recipe.model
        vocabulary = Count(split=recipe.data.vocabulary.size * model.hidden)
        return cls(
            vocabulary,
            count_side(recipe, "encoder", serving, held, merged),
            count_side(recipe, "decoder", serving, held, merged),
        )

    @property
    def whole(self) -> Count:
        return self.vocabulary + self.encoder + self.decoder

    def to_dict(self) -> dict[str, int]:
        return {
            "vocabulary": self.vocabulary.total,
            "encoder": self.encoder.total,
            "decoder": self.decoder.total,
            "output": 0,
            "total": self.whole.total,
        }


def step_bytes(recipe: Recipe, found: list[Exchange], world: int, at_home: bool = False) -> int:
    """Return an upper bound on the expected bytes that all ranks exchange in one step.

    The bound assumes no padding and all tokens on the more expensive side. The bytes are tokens x count of
    ``data.batch``, times how often each token is routed, times :meth:`Exchange.token_bytes`, plus the counts:
    all tensor-parallel peers dispatch each of the ``count`` micro-batches. If a rank has several
    micro-batches per step and a router or a method counts by hidden states, one more forward pass computes
    these counts ahead of the step.
    """
    batch, tensor, model = recipe.data.batch, recipe.parallel.tensor, recipe.model
    reads = any(method.reads_states for method in model.methods)
    reads = reads or any(moe.routing in ("token", "sentence") for _, _, moe in model.moe_layers())
    ahead = reads and batch.count * tensor > world
    each_token = [
        each.routed * each.token_bytes(at_home) * (1 + ahead * each.row_bytes_inference / each.row_bytes)
        for each in found
    ]
    counts = sum(batch.count * tensor * each.layers * each.count_bytes for each in found)
    return round(batch.tokens * batch.count * max(each_token, default=0.0)) + (1 + ahead) * counts


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token in a forward pass; a multiply-add counts as 2.

    Training takes about 3 times as many, for each route that a token takes.
    """

    length: int
    source: int  # per source token: the encoder, and the decoder's keys and values of the source
    target: int  # per target token: the decoder and the output layer
    source_attention: int  # the part of ``source`` that grows with the sentence length
    target_attention: int
    source_shared: int  # by the shared route if the model trains one, otherwise 0
    target_shared: int

    @property
    def source_training(self) -> int:
        return 3 * (self.source + self.source_shared)

    @property
    def target_training(self) -> int:
        return 3 * (self.target + self.target_shared)


def flops(recipe: Recipe, length: int = LENGTH) -> Flops:
    """Count the operations of the forward pass's matrix products.

    Source and target both have ``length`` L tokens::

        linear          2 inputs outputs          attention       4 L H over L positions
        output layer    2 H V                     experts, methods: see their own functions

    The decoder's keys and values of the source are computed once per source token and counted there. All L
    positions are counted, as if there were no causal mask. Norms, softmax, dropout and sums are left out.
    """
    model, hidden = recipe.model, recipe.model.hidden

    def of_site(site: Shape, shared: bool) -> int:
        total = sum(method.flops(site) for method in model.methods if method.is_at(site))
        if isinstance(site, LinearShape):
            return total + 2 * site.inputs * site.outputs
        side = model.encoder if site.side == "encoder" else model.decoder
        if side.moe is not None and site.sublayer == "feed_forward" and side.is_moe(site.layer):
            total += experts.flops(hidden, side.width(site.layer), side.moe, length, shared)
        return total

    attention: dict[SideName, int] = {"encoder": 0, "decoder": 0}
    for site in shapes_of(model):
        if isinstance(site, SublayerShape) and site.sublayer != "feed_forward":
            attention[site.side] += 4 * length * hidden

    def both_sides(shared: bool) -> tuple[int, int]:
        found = attention | {"decoder": attention["decoder"] + 2 * hidden * recipe.data.vocabulary.size}
        for site in shapes_of(model):
            found[site.reads] += of_site(site, shared)
        return found["encoder"], found["decoder"]

    by_shared = both_sides(True) if model.distills else (0, 0)
    return Flops(length, *both_sides(False), attention["encoder"], attention["decoder"], *by_shared)

"""The costs of a model: parameters and traffic between ranks, each with its formula.

Memory is in :mod:`lsmoe_ds.planning.memory`, arithmetic in :mod:`lsmoe_ds.planning.arithmetic`, experts in
:mod:`lsmoe_ds.moe.costs`, and each method's costs are in its section.

H hidden, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsmoe_ds.config.method import Held
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import Count, LinearShape, SideName, SublayerShape, count_linears, shapes_of
from lsmoe_ds.moe import costs as experts
from lsmoe_ds.moe.costs import Exchange

if TYPE_CHECKING:
    from lsmoe_ds.config.host_outline import HostOutline

SIDES: tuple[SideName, ...] = ("encoder", "decoder")
VALUE_BYTES = {"float32": 4, "bfloat16": 2}


def passes(recipe: Recipe) -> int:
    """Count the passes of each token through the model in training: one per route."""
    return 2 if recipe.model.distills else 1


def outline_of(recipe: Recipe) -> HostOutline:
    """Describe a recipe's model of the transformers library."""
    from lsmoe_ds.config.host_outline import read_outline  # needs transformers and torch

    assert recipe.model.huggingface is not None
    return read_outline(recipe.model.huggingface, recipe.model.task, recipe.data.labels or ())


def count_side(
    recipe: Recipe, side: SideName, serving: bool = False, held: Held = "all", merged: bool = False
) -> Count:
    """Count the encoder or the decoder with its final norm; for a model of transformers, what methods add.

    Each sublayer has a norm with 2 H parameters.

    ``serving`` counts what must be loaded to translate one direction. Methods are then ``merged`` into the
    layers beside them, if they can be, and add nothing (see :mod:`lsmoe_ds.export.subnetwork`).
    """
    model, languages = recipe.model, recipe.languages
    merged = merged or serving
    methods = [method for method in model.methods if method.unmergeable or not merged]
    held = "specific" if merged else held
    settings = model.encoder if side == "encoder" else model.decoder
    is_ours = model.huggingface is None  # otherwise count only what methods add
    total = Count(whole=2 * model.hidden * is_ours)
    for method in methods:
        total += method.count_side(side, model, languages)
    for site in shapes_of(model):
        if site.side != side:
            continue
        if isinstance(site, LinearShape) and is_ours:
            total += count_linears({site.name: (site.inputs, site.outputs, site.split)})
        elif isinstance(site, SublayerShape) and is_ours:
            total += Count(whole=2 * model.hidden)
            if settings.moe is not None and site.sublayer == "feed_forward" and settings.is_moe(site.layer):
                tasks, width = len(languages.tasks(settings.moe.task)), settings.width(site.layer)
                total += experts.count_layer(model.hidden, width, settings.moe, tasks, serving, held)
        for method in model.methods:
            if method.is_at(site):
                adds = method in methods
                total += method.count(site, languages, held) if adds else method.count_served(site)
    return total


def count_masks(recipe: Recipe) -> Count:
    """Count the booleans of all masks of methods; each needs a byte of memory."""
    total = Count()
    for site in shapes_of(recipe.model):
        for method in recipe.model.methods:
            if method.is_at(site):
                total += method.count_masks(site, recipe.languages)
    return total


@dataclass(frozen=True)
class Parts:
    """The parameters by part. An output layer tied to the embedding, as in our own models, counts 0."""

    vocabulary: Count
    encoder: Count
    decoder: Count
    output: Count

    @classmethod
    def of(cls, recipe: Recipe, serving: bool = False, held: Held = "all", merged: bool = False) -> Parts:
        model = recipe.model
        encoder, decoder = (count_side(recipe, side, serving, held, merged) for side in SIDES)
        if model.huggingface is None:
            return cls(Count(split=recipe.data.vocabulary.size * model.hidden), encoder, decoder, Count())
        own = outline_of(recipe).around.parameters
        vocabulary, *sides, output = (
            Count(whole=own.get(part, 0)) for part in ("vocabulary", *SIDES, "output")
        )
        return cls(vocabulary, sides[0] + encoder, sides[1] + decoder, output)

    @property
    def whole(self) -> Count:
        return self.vocabulary + self.encoder + self.decoder + self.output

    def to_dict(self) -> dict[str, int]:
        return {
            "vocabulary": self.vocabulary.total,
            "encoder": self.encoder.total,
            "decoder": self.decoder.total,
            "output": self.output.total,
            "total": self.whole.total,
        }


def counts_ahead(recipe: Recipe, world: int) -> bool:
    """Tell whether each step needs one more forward pass ahead of it.

    It does if a rank has several micro-batches and a router or a method counts by hidden states, unless
    ``training.auxiliary_over`` is micro-batch.
    """
    model = recipe.model
    reads = any(method.reads_states for method in model.methods)
    reads = reads or any(moe.routing in ("token", "sentence") for _, _, moe in model.moe_layers())
    several = recipe.data.batch.count * recipe.parallel.tensor > world
    return reads and several and recipe.training.auxiliary_over == "step"


def step_bytes(recipe: Recipe, found: list[Exchange], world: int, at_home: bool = False) -> int:
    """Return an upper bound on the expected bytes that all ranks exchange in one step.

    The bound assumes no padding and all tokens on the more expensive side. The bytes are tokens x count of
    ``data.batch``, times how often each token is routed, times :meth:`Exchange.token_bytes`. Counts and
    replicas' weights are added for each of the ``count`` micro-batches, which all tensor-parallel peers
    dispatch. A pass ahead of the step (:func:`counts_ahead`) exchanges rows and weights, too.
    """
    batch, tensor, ahead = recipe.data.batch, recipe.parallel.tensor, counts_ahead(recipe, world)
    each_token = [each.routed * each.token_bytes(at_home, ahead) for each in found]
    counts = sum(batch.count * tensor * each.layers * each.count_bytes for each in found)
    forward = 1 + ahead + recipe.training.activation_checkpointing
    lent = batch.count * tensor * sum(forward * each.lent_bytes + each.lent_bytes_back for each in found)
    return round(batch.tokens * batch.count * max(each_token, default=0.0)) + forward * counts + lent

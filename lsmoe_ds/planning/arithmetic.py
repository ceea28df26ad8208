"""Count the operations of a model's matrix products, in a forward pass and in training.

H hidden, V vocabulary, L sentence length, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

from lsmoe_ds.config.host import PREFIX
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import (
    LayerShape,
    LinearShape,
    MatrixProduct,
    Shape,
    SideName,
    SublayerShape,
    shapes_of,
)
from lsmoe_ds.moe import costs as experts
from lsmoe_ds.planning.costs import outline_of
from lsmoe_ds.planning.trained import trains

LENGTH = 32  # default tokens per sentence
NORMS = {"attention": "attention_norm", "cross_attention": "cross_norm", "feed_forward": "feed_forward_norm"}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token in a forward pass and in training; a multiply-add counts as 2.

    Training needs a forward and a backward pass for each route. A decoder-only model reads a prompt of source
    tokens before its target tokens; an encoder-only model has no target tokens.
    """

    length: int
    source: int  # per source token: the encoder, and the decoder's keys and values of the source
    target: (
        int  # per target token: the decoder and the output layer (an encoder-only model's is in ``source``)
    )
    source_attention: int  # the part of ``source`` that grows with the sentence length
    target_attention: int
    source_shared: int  # on the shared route if the model trains one, otherwise 0
    target_shared: int
    source_training: int
    target_training: int
    source_experts: int = 0  # the part of ``source_training`` in experts, over all layers
    target_experts: int = 0

    @property
    def forward(self) -> int:
        """Return the operations of a forward pass of one source and one target token, over all routes."""
        return self.source + self.target + self.source_shared + self.target_shared


def flops(recipe: Recipe, length: int = LENGTH, trained: Callable[[str], bool] | None = None) -> Flops:
    """Count the operations of the matrix products.

    Source and target both have ``length`` L tokens::

        linear          2 inputs outputs          attention       4 L H over L positions
        output layer    2 H V                     experts, methods: see their own functions

    The decoder's keys and values of the source are computed once per source token and counted there. All L
    positions are counted, as if there were no causal mask. Norms, softmax, dropout and sums are left out.
    A decoder-only model attends to 2 L positions, with its own query width, and applies its output layer only
    to target tokens. An encoder-only model multiplies each token by its C classes, 2 H C.

    In the backward pass a product of F operations, of an input and a weight, needs F for the gradient of the
    input if anything below the input trains, and F if the weight trains. The two products of attention, F
    operations together, need F / 2 for each of the gradients of queries, keys, values and attention weights
    that is needed below. A norm of a model of transformers counts as if it were before its layer. With
    ``training.activation_checkpointing`` the products of each layer through which a gradient passes are
    computed once more. ``trained`` is the result of :func:`lsmoe_ds.planning.trained.trains`, which is called
    if it is None. Raises UserError where that function does.
    """
    return _Pass(recipe, length, trained or trains(recipe)).run()


class _Names:
    """The names of a model's parameters, and the products that compute its logits."""

    def __init__(self, recipe: Recipe) -> None:
        hidden, vocabulary = recipe.model.hidden, recipe.data.vocabulary.size
        self.below: tuple[str, ...] = ("embedding.tokens.weight",)
        self.above: tuple[str, ...] = ("decoder_norm.weight", "decoder_norm.bias")
        self.heads = [MatrixProduct(2 * hidden * vocabulary, self.below[0])]

    def linear(self, site: LinearShape) -> str:
        return site.at

    def norm(self, site: SublayerShape) -> tuple[str, ...]:
        at = f"{site.side}.{site.layer}.{NORMS[site.sublayer]}"
        return f"{at}.weight", f"{at}.bias"


class _NamesOfHost(_Names):
    def __init__(self, recipe: Recipe) -> None:
        self.host = outline_of(recipe)
        around = self.host.around
        self.below, self.above = (tuple(map(_in_host, names)) for names in (around.below, around.above))
        self.heads = [MatrixProduct(2 * h * v, _in_host(name)) for name, h, v in around.heads]

    def linear(self, site: LinearShape) -> str:
        return _in_host(self.host.modules[site.at])

    def norm(self, site: SublayerShape) -> tuple[str, ...]:
        return tuple(map(_in_host, self.host.around.norms[site.side, site.layer]))


def _in_host(name: str) -> str:
    return f"{PREFIX}{name}"


class _Pass:
    """One pass through a model, from the embedding upward, that adds up the operations of each product.

    Its methods return whether the result of the layer that they count needs a gradient, that is, whether it
    is computed from any parameter that trains.
    """

    def __init__(self, recipe: Recipe, length: int, trained: Callable[[str], bool]) -> None:
        self.recipe, self.model, self.length, self.trains = recipe, recipe.model, length, trained
        self.alone = recipe.model.alone  # the only side, if the model has one side
        self.names = _Names(recipe) if recipe.model.huggingface is None else _NamesOfHost(recipe)
        self.positions = 2 * length if self.alone == "decoder" else length
        self.routes = (
            (False, True) if self.model.distills else (False,)
        )  # for each route, whether it is the shared one
        self.forward: dict[tuple[SideName, bool], int] = {}
        self.attention: dict[SideName, int] = {"encoder": 0, "decoder": 0}
        self.backward: dict[SideName, int] = {"encoder": 0, "decoder": 0}
        self.again: dict[SideName, int] = {"encoder": 0, "decoder": 0}  # with activation checkpointing
        # The operations of experts in training, by side.
        self.of_experts: dict[SideName, int] = {"encoder": 0, "decoder": 0}
        self.memory = False  # whether the encoder's output needs a gradient

    def run(self) -> Flops:
        x = begun = any(map(self.trains, self.names.below))
        side: SideName = self.alone or "encoder"
        for (of, _), layer in groupby(shapes_of(self.model), key=lambda site: (site.side, site.layer)):
            if of != side:
                self.memory = x or any(map(self.trains, ("encoder_norm.weight", "encoder_norm.bias")))
                side, x = of, begun
            before = self.taken(side)
            for _, sites in groupby(layer, key=lambda site: site.sublayer):
                x = self.sublayer(list(sites), x) or x
            if self.recipe.training.activation_checkpointing and x:
                self.again[side] += self.taken(side) - before
        x = x or any(map(self.trains, self.names.above))
        if self.alone == "decoder":  # the same layers read its prompt
            self.forward |= {("encoder", shared): self.forward["decoder", shared] for shared in self.routes}
            for taken in (self.attention, self.backward, self.again):
                taken["encoder"] = taken["decoder"]
        self.products(self.names.heads, side, x)
        training = {
            side: taken + self.again[side] + self.taken(side) for side, taken in self.backward.items()
        }
        return Flops(
            length=self.length,
            source=self.forward.get(("encoder", False), 0),
            target=self.forward.get(("decoder", False), 0),
            source_attention=self.attention["encoder"],
            target_attention=self.attention["decoder"],
            source_shared=self.forward.get(("encoder", True), 0),
            target_shared=self.forward.get(("decoder", True), 0),
            source_training=training["encoder"],
            target_training=training["decoder"],
            source_experts=self.of_experts["encoder"],
            target_experts=self.of_experts["decoder"],
        )

    def taken(self, side: SideName) -> int:
        """Return the operations of the forward pass so far, by all routes."""
        return sum(self.forward.get((side, shared), 0) for shared in self.routes)

    def add(self, side: SideName, forward: int, backward: int, routes: Iterable[bool]) -> None:
        for shared in routes:
            self.forward[side, shared] = self.forward.get((side, shared), 0) + forward
            self.backward[side] += backward

    def products(
        self,
        products: list[MatrixProduct],
        side: SideName,
        x: bool,
        y: bool = False,
        routes: Iterable[bool] | None = None,
    ) -> bool:
        """Count the products of a site. ``x`` and ``y`` tell whether its input, and the output to which they
        are added, if any, need a gradient.
        """
        needed, before = False, False
        for each in products:
            reads = {"input": x, "output": y, "before": before, "memory": self.memory}[each.reads]
            own = each.weight is not None and self.trains(each.weight)
            self.add(side, each.flops, each.flops * (reads + own), self.routes if routes is None else routes)
            if each.weight is not None and ".feed_forward.experts." in each.weight:
                again = self.recipe.training.activation_checkpointing
                taken = each.flops * (1 + reads + own + again)
                self.of_experts[side] += taken * len(list(self.routes if routes is None else routes))
            before = reads or own or any(map(self.trains, each.beside))
            needed = needed or before
        return needed

    def linear(self, site: LinearShape, x: bool) -> bool:
        """Count a linear layer and what methods add beside it."""
        at = self.names.linear(site)
        own = MatrixProduct(2 * site.inputs * site.outputs, f"{at}.weight", (f"{at}.bias",))
        return self.products([own, *self.of_methods(site)], site.reads, x)

    def of_methods(self, site: Shape) -> list[MatrixProduct]:
        return [
            product
            for method in self.model.methods
            if method.is_at(site)
            for product in method.products(site)
        ]

    def sublayer(self, sites: list[Shape], x: bool) -> bool:
        """Count a sublayer with its norm and what methods add after it, or what they add after a layer."""
        site = sites[0]
        if isinstance(site, LayerShape):
            return self.products(self.of_methods(site), site.side, x)
        assert isinstance(site, SublayerShape)
        x = x or any(map(self.trains, self.names.norm(site)))
        linears = {each.name: each for each in sites if isinstance(each, LinearShape)}
        if site.sublayer != "feed_forward":
            y = self.attend(linears, x, self.memory if site.sublayer == "cross_attention" else x)
        elif linears:
            inner = [self.linear(linears[name], x) for name in ("gate", "expand") if name in linears]
            y = self.linear(linears["contract"], any(inner))
        else:
            y = self.experts(site, x)
        for method in self.model.methods:
            if method.is_at(site):
                y = self.products(method.products(site), site.side, x, y) or y
        return y

    def attend(self, linears: dict[str, LinearShape], x: bool, memory: bool) -> bool:
        """Count an attention from x to a memory."""
        query = self.linear(linears["query"], x)
        key, value = (self.linear(linears[name], memory) for name in ("key", "value"))
        side, each = linears["query"].side, 2 * self.positions * linears["query"].outputs
        weights = query or key
        self.attention[side] += 2 * each
        self.add(side, 2 * each, each * (query + key + weights + value), self.routes)
        return self.linear(linears["output"], weights or value)

    def experts(self, site: SublayerShape, x: bool) -> bool:
        """Count a layer of experts, on each route."""
        side = self.model.encoder if site.side == "encoder" else self.model.decoder
        assert side.moe is not None
        needed = False
        for shared in self.routes:
            found = experts.products(site, side.width(site.layer), side.moe, self.length, shared)
            needed = self.products(found, site.side, x, routes=[shared]) or needed
        return needed

"""What a model costs: parameters, traffic between ranks, arithmetic. Each formula stands with its function; memory has
:mod:`lsmoe_ds.planning.memory`.

H hidden, F feed-forward width, E experts, K top-k, V vocabulary, L sentence length; R expert-parallel ranks, or of low-rank
matrices the sum of ranks r.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, lcm
from typing import Literal

from lsmoe_ds.config.recipe import MoE, Recipe, Side

VALUE_BYTES = {"float32": 4, "bfloat16": 2}
LENGTH = 32  # tokens of a sentence, where nothing else is said
# Low-rank matrices that are counted: all; those of the languages; those that all languages share; or none, for they are
# folded into the layers beside which they stand. In the same way experts, and the feed-forward that was distilled from them.
Matrices = Literal["all", "specific", "shared", "none"]


@dataclass(frozen=True)
class Count:
    """Parameters by how ranks hold them."""

    split: int = 0  # spread over the tensor-parallel ranks: column linears with their biases, row weights, the embedding
    whole: int = 0  # on every rank: norms, row biases, routers; of low-rank matrices the side that is not spread
    expert: int = 0  # spread over the expert-parallel ranks

    def __add__(self, other: Count) -> Count:
        return Count(self.split + other.split, self.whole + other.whole, self.expert + other.expert)

    @property
    def total(self) -> int:
        return self.split + self.whole + self.expert


def attention(hidden: int) -> Count:
    """Query, key, value (column linears) and output (row linear): 4 (H^2 + H)."""
    return Count(split=4 * hidden * hidden + 3 * hidden, whole=hidden)


def feed_forward(hidden: int, width: int) -> Count:
    """Expand [F, H] + [F], contract [H, F] + [H]: 2 H F + F + H."""
    return Count(split=2 * hidden * width + width, whole=hidden)


def router(hidden: int, settings: MoE, tasks: int) -> Count:
    """Token and sentence routing: E H, with a bias E (H + 1). Task routing: tasks E. Static: nothing."""
    rows = {"token": hidden, "sentence": hidden, "task": tasks, "static": 0}[settings.routing]
    return Count(whole=(rows + settings.router_bias) * settings.experts)


def rank_sum(recipe: Recipe, matrices: Matrices) -> int:
    """R, the sum of the ranks of a bank's matrices that are counted ("Condensing Multilingual Knowledge", sections 2.2 and 4)."""
    settings = recipe.model.low_rank
    if settings is None:
        return 0
    specific = sum(settings.rank_of(code) for code in recipe.languages.codes) if matrices in ("all", "specific") else 0
    return specific + (settings.shared_rank if settings.fuse_distillation and matrices in ("all", "shared") else 0)


def passes(recipe: Recipe) -> int:
    """Through the model, of each token in training: Fuse Distillation takes both routes."""
    return 2 if recipe.model.distills else 1


def low_rank(ranks: int, width: int, hidden: int) -> Count:
    """The matrices beside a column linear [width, H] and a row linear [H, width] (feed-forward: both once, width F; attention:
    three and one, width H): vertical R width and flat R H beside the first, flat R width and vertical R H beside the second.
    """
    return Count(split=ranks * width, whole=ranks * hidden)


def count_low_rank(recipe: Recipe, side: Side, layer: int, blocks: int, matrices: Matrices) -> Count:
    """Of a layer with ``blocks`` attentions: R (F + H) beside each of two linears, and 2 R H beside each of four."""
    settings, hidden, ranks = recipe.model.low_rank, recipe.model.hidden, rank_sum(recipe, matrices)
    total = Count()
    if settings is not None and settings.is_in(layer, "feed_forward") and not side.is_moe(layer):
        for _ in range(2):
            total += low_rank(ranks, side.width(layer), hidden)
    if settings is not None and settings.is_in(layer, "attention"):
        for _ in range(4 * blocks):
            total += low_rank(ranks, hidden, hidden)
    return total


def count_clsr(recipe: Recipe, side: Side, decoder: bool) -> Count:
    """W_shared H^2 of the side; W_lang L H^2, of the side or of each sublayer; a gate (H + 2) G of each sublayer
    (:mod:`lsmoe_ds.methods.clsr.method`)."""
    settings, hidden = recipe.model.clsr, recipe.model.hidden
    sublayers = len(settings.sublayers(decoder)) * side.layers if settings is not None else 0
    if settings is None or not sublayers:
        return Count()
    specific = len(recipe.languages.codes) * hidden * hidden * (1 if settings.shared else sublayers)
    return Count(whole=hidden * hidden + specific + sublayers * (hidden + 2) * settings.gate)


def count_side(recipe: Recipe, side: Side, decoder: bool, serving: bool = False, matrices: Matrices = "all") -> Count:
    """Parameters of the encoder or decoder with its final norm. A norm has 2 H, a decoder layer three of them.

    ``serving``: what must be loaded to translate one direction ("Beyond Distillation", section 3.2). A layer routed by
    token or sentence needs all its experts and the router; of one routed by task or statically the K experts are known
    beforehand, and joined into one feed-forward of width K F; low-rank matrices are folded into their layers, whatever
    ``matrices`` says, and what is distilled from experts is left out (see :mod:`lsmoe_ds.export.subnetwork`).
    """
    matrices = "none" if serving else matrices
    hidden = recipe.model.hidden
    blocks = 2 if decoder else 1
    total = Count(whole=2 * hidden) + count_clsr(recipe, side, decoder)
    for layer in range(side.layers):
        width, moe = side.width(layer), side.moe if side.is_moe(layer) else None
        total += Count(whole=2 * hidden * (blocks + 1))
        for _ in range(blocks):
            total += attention(hidden)
        total += count_low_rank(recipe, side, layer, blocks, matrices)
        distilled = moe is not None and moe.fuse_distillation
        if moe is None or (distilled and matrices in ("all", "shared")):
            total += feed_forward(hidden, width)
        if moe is None or (distilled and matrices == "shared"):
            continue
        if serving and moe.by_task:
            total += feed_forward(hidden, moe.top_k * width)
        else:
            total += Count(expert=moe.experts * feed_forward(hidden, width).total)
            total += router(hidden, moe, len(recipe.languages.tasks(moe.task)))
    return total


@dataclass(frozen=True)
class Parts:
    """Parameters by part. The output layer is the embedding itself, tied, and adds none."""

    vocabulary: Count
    encoder: Count
    decoder: Count

    @classmethod
    def of(cls, recipe: Recipe, serving: bool = False, matrices: Matrices = "all") -> Parts:
        model = recipe.model
        vocabulary = Count(split=recipe.data.vocabulary.size * model.hidden)
        return cls(
            vocabulary,
            count_side(recipe, model.encoder, False, serving, matrices),
            count_side(recipe, model.decoder, True, serving, matrices),
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


def bytes_per_row(hidden: int, top_k: int, value_bytes: int, training: bool, learned: bool = True) -> int:
    """Bytes that one row costs which leaves its rank for another that holds experts of it.

    Out and back: 2 H values. The numbers and weights of its experts go out as 2 K float32. In training the gradients of all
    this take the same ways: 4 H values + 4 K float32. Static routing has no ``learned`` weights, so no gradient of them.
    """
    ways = 2 if training else 1
    return ways * 2 * hidden * value_bytes + (ways if learned else 1) * 2 * top_k * 4


def rows_at_random(experts: int, top_k: int, ranks: int, groups: int = 1) -> float:
    """Rows that leave their rank per token and layer, expected where K distinct experts are chosen at random.

    A token goes once to each rank that holds at least one of its experts, and a row to its own rank costs nothing::

        (R - 1) (1 - C(E - E/R, K) / C(E, K))

    With ``groups`` the choice is among the E / groups experts of a random group, which stand side by side.
    """
    each, block = experts // groups, experts // ranks
    reached = 0.0
    for group in range(groups):
        for rank in range(ranks):
            held = max(0, min((group + 1) * each, (rank + 1) * block) - max(group * each, rank * block))
            reached += 1 - comb(each - held, top_k) / comb(each, top_k)
    return reached / groups * (ranks - 1) / ranks


def rows_at_home(settings: MoE, affine: MoE | None, ranks: int, tensor: int) -> float | None:
    """The same where every task-affine batch is on a rank that holds its task's experts; None where no such rank exists.

    That is 0, but for tensor-parallel peers: they share a batch's tokens, and only some of them hold the experts.
    """
    follows = affine is not None and (settings.task, settings.expert_groups) == (affine.task, affine.expert_groups)
    if not settings.by_task or not follows or settings.expert_groups % ranks:
        return None
    away, met = 0.0, 0
    for first in range(0, lcm(tensor, ranks), tensor):
        peers = [rank % ranks for rank in range(first, first + tensor)]
        for home in set(peers):
            away, met = away + sum(rank != home for rank in peers) / tensor, met + 1
    return away / met


@dataclass(frozen=True)
class Exchange:
    """What expert parallelism sends between ranks, for one side's layers with experts."""

    side: str
    layers: int
    row_bytes: int  # training
    row_bytes_inference: int
    rows: float  # that leave, per token and layer, experts chosen at random
    rows_home: float | None  # the same with all task-affine batches at home
    routed: int  # times, of each token in training: twice in Fuse Distillation, unless a shared feed-forward takes one route
    count_bytes: int  # leaving each rank, per layer and micro-batch: one int64 for each other rank

    def token_bytes(self, at_home: bool = False) -> float:
        """Per token of this side that is routed, through all its layers, forward and backward."""
        rows = self.rows_home if at_home and self.rows_home is not None else self.rows
        return self.layers * rows * self.row_bytes


def exchanges(recipe: Recipe, value_bytes: int) -> list[Exchange]:
    """Of each side that has experts; nothing without expert parallelism."""
    model, layout = recipe.model, recipe.parallel
    found = []
    for name, side in (("encoder", model.encoder), ("decoder", model.decoder)):
        layers = sum(side.is_moe(layer) for layer in range(side.layers))
        if side.moe is not None and layers and layout.expert > 1:
            moe, learned = side.moe, side.moe.routing != "static"
            found.append(
                Exchange(
                    side=name,
                    layers=layers,
                    row_bytes=bytes_per_row(model.hidden, moe.top_k, value_bytes, True, learned),
                    row_bytes_inference=bytes_per_row(model.hidden, moe.top_k, value_bytes, False, learned),
                    rows=rows_at_random(moe.experts, moe.top_k, layout.expert, moe.expert_groups),
                    rows_home=rows_at_home(moe, model.affine, layout.expert, layout.tensor),
                    routed=model.routed(moe),
                    count_bytes=8 * (layout.expert - 1),
                )
            )
    return found


def step_bytes(recipe: Recipe, found: list[Exchange], world: int, at_home: bool = False) -> int:
    """Expected bytes of one step between all ranks, at most: no padding, and all tokens on the dearer side.

    tokens x count of ``data.batch``, as often as they are routed, times :meth:`Exchange.token_bytes`, and the counts: each
    of the ``count`` micro-batches is dispatched by all its tensor-parallel peers. Where a rank has several micro-batches a step
    and a router reads hidden states, or CLSR has gates, first choices and gates are summed ahead of the step by one more forward
    pass.
    """
    batch, tensor, model = recipe.data.batch, recipe.parallel.tensor, recipe.model
    reads = model.clsr is not None or any(moe.routing in ("token", "sentence") for _, _, moe in model.moe_layers())
    ahead = reads and batch.count * tensor > world
    each_token = [each.routed * each.token_bytes(at_home) * (1 + ahead * each.row_bytes_inference / each.row_bytes) for each in found]
    counts = sum(batch.count * tensor * each.layers * each.count_bytes for each in found)
    return round(batch.tokens * batch.count * max(each_token, default=0.0)) + (1 + ahead) * counts


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token in a forward pass; a multiply-add counts as 2. Training takes about 3 times that, of
    each route that a token takes."""

    length: int
    source: int  # per source token: the encoder, and the decoder's keys and values of it
    target: int  # per target token: the decoder and the output layer
    source_attention: int  # of these, what grows with the sentence length
    target_attention: int
    source_shared: int  # by the shared route of Fuse Distillation; otherwise 0
    target_shared: int

    @property
    def source_training(self) -> int:
        return 3 * (self.source + self.source_shared)

    @property
    def target_training(self) -> int:
        return 3 * (self.target + self.target_shared)


def flops(recipe: Recipe, length: int = LENGTH) -> Flops:
    """Matrix products of the forward pass, source and target both of ``length`` L tokens::

        linear          2 inputs outputs                  attention       8 H^2, and 4 L H over L positions
        feed-forward    4 H F                             experts         K (4 H F + 2 H)
        token router    2 H E                             sentence router 2 H E / L
        output layer    2 H V                             task, static    0
        low-rank        2 r (inputs + outputs) of each linear, r the largest rank of a language
        CLSR            4 H^2 + 2 G (H + 1) after each sublayer

    Keys and values of the source for the decoder's layers (4 H^2 each) are computed once per source token and counted
    there. The causal mask saves nothing here: all L positions are counted. Norms, softmax, dropout and sums are left out.
    """
    model, hidden, settings = recipe.model, recipe.model.hidden, recipe.model.low_rank

    def side_flops(side: Side, decoder: bool, shared: bool) -> int:
        total = 0
        if model.clsr is not None:
            total += len(model.clsr.sublayers(decoder)) * side.layers * (4 * hidden * hidden + 2 * model.clsr.gate * (hidden + 1))
        for layer in range(side.layers):
            each = 4 * hidden * side.width(layer)
            moe = side.moe if side.is_moe(layer) else None
            if moe is not None and not (shared and moe.fuse_distillation):
                each = moe.top_k * (each + 2 * hidden)
                each += {"token": 2 * hidden * moe.experts, "sentence": 2 * hidden * moe.experts // length}.get(moe.routing, 0)
            elif moe is None and settings is not None and settings.is_in(layer, "feed_forward"):
                each += 4 * settings.shared_rank * (hidden + side.width(layer))
            total += each + 8 * hidden * hidden + 2 * pair(layer)
        return total

    def pair(layer: int) -> int:
        """Low-rank matrices beside two linear layers of an attention."""
        return 8 * settings.shared_rank * hidden if settings is not None and settings.is_in(layer, "attention") else 0

    encoder, decoder = model.encoder.layers, model.decoder.layers
    source_attention, target_attention = 4 * length * hidden * encoder, 8 * length * hidden * decoder
    # Over the source: its keys and values are two of the four linears, a target token's query and output the other two.
    across = decoder * 4 * hidden * hidden + sum(pair(layer) for layer in range(decoder))

    def both_sides(shared: bool) -> tuple[int, int]:
        output = 2 * hidden * recipe.data.vocabulary.size
        source = side_flops(model.encoder, False, shared) + across + source_attention
        return source, side_flops(model.decoder, True, shared) + across + output + target_attention

    by_shared = both_sides(True) if model.distills else (0, 0)
    return Flops(length, *both_sides(False), source_attention, target_attention, *by_shared)

"""What a model costs: parameters, traffic between ranks, arithmetic. Each formula stands with its function; memory has
:mod:`lsmoe_ds.memory`.

H hidden, F feed-forward width, E experts, K top-k, V vocabulary, L sentence length; R expert-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, lcm

from lsmoe_ds.config import MoE, Recipe, Side

VALUE_BYTES = {"float32": 4, "bfloat16": 2}
LENGTH = 32  # tokens of a sentence, where nothing else is said


@dataclass(frozen=True)
class Count:
    """Parameters by how ranks hold them."""

    split: int = 0  # spread over the tensor-parallel ranks: column linears with their biases, row weights, the embedding
    whole: int = 0  # on every rank: norms, row biases, routers
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
    """Token and sentence routing: E H. Task routing: tasks E. Static: nothing."""
    rows = {"token": hidden, "sentence": hidden, "task": tasks, "static": 0}[settings.routing]
    return Count(whole=rows * settings.experts)


def count_side(recipe: Recipe, side: Side, decoder: bool, serving: bool = False) -> Count:
    """Parameters of the encoder or decoder with its final norm. A norm has 2 H, a decoder layer three of them.

    ``serving``: what must be loaded to translate one direction ("Beyond Distillation", section 3.2). A layer routed by
    token or sentence needs all its experts and the router; of one routed by task or statically the K experts are known
    beforehand, and joined into one feed-forward of width K F (see :mod:`lsmoe_ds.convert.subnetwork`).
    """
    hidden = recipe.model.hidden
    blocks = 2 if decoder else 1
    total = Count(whole=2 * hidden)
    for layer in range(side.layers):
        width, moe = side.width(layer), side.moe if side.is_moe(layer) else None
        total += Count(whole=2 * hidden * (blocks + 1))
        for _ in range(blocks):
            total += attention(hidden)
        if moe is None:
            total += feed_forward(hidden, width)
        elif serving and moe.by_task:
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
    def of(cls, recipe: Recipe, serving: bool = False) -> Parts:
        model = recipe.model
        vocabulary = Count(split=recipe.data.vocabulary.size * model.hidden)
        return cls(
            vocabulary,
            count_side(recipe, model.encoder, False, serving),
            count_side(recipe, model.decoder, True, serving),
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
    count_bytes: int  # leaving each rank, per layer and micro-batch: one int64 for each other rank

    def token_bytes(self, at_home: bool = False) -> float:
        """Per token of this side, through all its layers, forward and backward."""
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
                    count_bytes=8 * (layout.expert - 1),
                )
            )
    return found


def step_bytes(recipe: Recipe, found: list[Exchange], world: int, at_home: bool = False) -> int:
    """Expected bytes of one step between all ranks, at most: no padding, and all tokens on the dearer side.

    tokens x count of ``data.batch`` times :meth:`Exchange.token_bytes`, and the counts: each of the ``count`` micro-batches
    is dispatched by all its tensor-parallel peers. Where a rank has several micro-batches a step and a router reads hidden
    states, first choices are counted ahead of the step by one more forward pass.
    """
    batch, tensor = recipe.data.batch, recipe.parallel.tensor
    reads = any(moe.routing in ("token", "sentence") for _, _, moe in recipe.model.moe_layers())
    ahead = reads and batch.count * tensor > world
    each_token = [each.token_bytes(at_home) * (1 + ahead * each.row_bytes_inference / each.row_bytes) for each in found]
    tokens = batch.tokens * batch.count * max(each_token, default=0.0)
    return round(tokens) + (1 + ahead) * sum(batch.count * tensor * each.layers * each.count_bytes for each in found)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token in a forward pass; a multiply-add counts as 2. Training takes about 3 times that."""

    length: int
    source: int  # per source token: the encoder, and the decoder's keys and values of it
    target: int  # per target token: the decoder and the output layer
    source_attention: int  # of these, what grows with the sentence length
    target_attention: int


def flops(recipe: Recipe, length: int = LENGTH) -> Flops:
    """Matrix products of the forward pass, source and target both of ``length`` L tokens::

        linear          2 inputs outputs                  attention       8 H^2, and 4 L H over L positions
        feed-forward    4 H F                             experts         K (4 H F + 2 H)
        token router    2 H E                             sentence router 2 H E / L
        output layer    2 H V                             task, static    0

    Keys and values of the source for the decoder's layers (4 H^2 each) are computed once per source token and counted
    there. The causal mask saves nothing here: all L positions are counted. Norms, softmax, dropout and sums are left out.
    """
    model, hidden = recipe.model, recipe.model.hidden

    def side_flops(side: Side) -> int:
        total = 0
        for layer in range(side.layers):
            each = 4 * hidden * side.width(layer)
            if side.moe is not None and side.is_moe(layer):
                each = side.moe.top_k * (each + 2 * hidden)
                each += {"token": 2 * hidden * side.moe.experts, "sentence": 2 * hidden * side.moe.experts // length}.get(
                    side.moe.routing, 0
                )
            total += each + 8 * hidden * hidden
        return total

    encoder, decoder = model.encoder.layers, model.decoder.layers
    source_attention, target_attention = 4 * length * hidden * encoder, 8 * length * hidden * decoder
    return Flops(
        length,
        side_flops(model.encoder) + decoder * 4 * hidden * hidden + source_attention,
        side_flops(model.decoder) + decoder * 4 * hidden * hidden + 2 * hidden * recipe.data.vocabulary.size + target_attention,
        source_attention,
        target_attention,
    )

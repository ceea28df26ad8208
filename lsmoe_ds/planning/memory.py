"""Compute the memory that a rank needs in training. Each function's docstring has its formula.

B sentences, T positions, S tokens, H hidden, F feed-forward width, E experts, K top-k, V vocabulary; t
tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from lsmoe_ds.config.deepspeed import STAGE_0_BUCKET
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import (
    Count,
    LinearShape,
    SideName,
    SublayerShape,
    count_feed_forward,
    shapes_of,
)
from lsmoe_ds.moe import costs as experts
from lsmoe_ds.moe.load import lent_experts
from lsmoe_ds.planning.costs import VALUE_BYTES, Parts, count_masks, outline_of, passes
from lsmoe_ds.planning.trained import count_averages, count_trained, largest_trained

BUCKET = 500_000_000  # values: DeepSpeed's default for stages 1 and 2
PROCESS = (
    480 * 2**20
)  # measured on Linux: Python, torch, DeepSpeed, Megatron-core and their threads, with nothing loaded
TRANSFORMERS = 150 * 2**20  # measured likewise: what importing transformers and a model's class adds
# Allocator fragmentation, measured on a CPU: some blocks of one micro-batch's shapes fit none of the next
# one's.
ALLOCATOR = 1.4
GPU_ALLOCATOR = 1.1  # the same for torch's allocator on an H200, which splits and merges blocks


@dataclass(frozen=True)
class Memory:
    """The bytes on each rank.

    ``weights``, ``gradients`` and ``optimizer`` are permanent (gradients from the backward pass to the
    optimizer step); ``activations`` and ``buffers`` are temporary. No sum includes ``host``.
    """

    precision: str
    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    process: int = PROCESS
    host: int = 0  # what an offloaded optimizer keeps in the host's memory

    @property
    def total(self) -> int:
        """Return the permanent bytes."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Return the permanent bytes, the process itself, and ALLOCATOR times the temporary bytes.

        Activations and buffers are not needed at the same time, but blocks freed by one rarely fit the other.
        """
        return self.total + self.process + round(ALLOCATOR * (self.activations + self.buffers))

    @property
    def gpu_peak(self) -> int:
        """Return the same on a GPU, whose allocator needs GPU_ALLOCATOR times the temporary bytes.

        The bytes of the process represent the driver's context and what libraries load.
        """
        return self.total + self.process + round(GPU_ALLOCATOR * (self.activations + self.buffers))


def local_parameters(count: Count, tensor: int, expert: int) -> tuple[int, int]:
    """Return the (dense, expert) parameters of one rank: split / tensor + whole, and expert / R."""
    return count.split // tensor + count.whole, count.expert // expert


def memory(recipe: Recipe, world: int, stage: int, precision: str, trained: Count | None = None) -> Memory:
    """Compute the memory of one rank; ``trained`` counts the parameters that train, if known already.

    In bfloat16, stage 0 is for optimizers that step 16-bit parameters themselves, such as Adafactor
    (:func:`lsmoe_ds.config.deepspeed.complete`).

    v is the bytes per value (4 or 2). n is the number of the rank's parameters (:func:`local_parameters`);
    d dense and e expert ones of them train (:func:`lsmoe_ds.planning.trained.count_trained`). m is the number
    of booleans in its masks (:func:`lsmoe_ds.planning.costs.count_masks`), a byte each.
    ZeRO partitions dense state over the D = world / tensor data ranks, and expert state over the X = world /
    expert ranks that hold the same experts; p = d / D + e / X::

        weights     v n + m              in every stage
        gradients   v (d + e)            stage 0
                    4 (d + e)            stage 1;    4 p   in stage 2: sums in float32
        optimizer   8 (d + e)            stage 0: Adam's two float32 moments
                    12 p                 stages 1 and 2: also a float32 copy of the weights, which DeepSpeed
                                         keeps even of a float32 model
                    8 of these           in the host's memory with ``adam.offload``
                    4 (d + e) or 4 p     in addition, for the moving average of ``training.ema``
                    4 a + 4 k (d + e)    Adafactor: its averages, and k of momentum and a float32 copy

    Adafactor's averages are a values (:func:`lsmoe_ds.planning.trained.count_averages`): n + m of a matrix
    [n, m], n of a vector. :func:`activations`, :func:`replica_bytes`, :func:`chunk_bytes` and
    :func:`buffers` compute the temporary memory. A teacher (:func:`teacher_values`) adds its weights and
    logits.
    """
    value, layout = VALUE_BYTES[precision], recipe.parallel
    held = sum(local_parameters(Parts.of(recipe).whole, layout.tensor, layout.expert))
    masks = sum(local_parameters(count_masks(recipe), layout.tensor, layout.expert))
    teacher, said = teacher_values(recipe)
    dense, experts = local_parameters(trained or count_trained(recipe), layout.tensor, layout.expert)
    own = dense + experts
    part = ceil(dense * layout.tensor / world) + ceil(experts * layout.expert / world)
    optimizer = recipe.training.optimizer_settings
    stepped = own if stage == 0 else part
    state = optimizer.value_bytes(stage, value == 2) * stepped
    if optimizer.averaged:
        state += 4 * sum(local_parameters(count_averages(recipe), layout.tensor, layout.expert))
    if recipe.training.ema is not None:
        state += 4 * stepped
    return Memory(
        precision=precision,
        stage=stage,
        weights=value * (held + teacher) + masks,
        gradients=value * own if stage == 0 else 4 * (own if stage == 1 else part),
        optimizer=state,
        activations=activations(recipe, value)
        + replica_bytes(recipe, value)
        + chunk_bytes(recipe, value)
        + value * said,
        buffers=buffers(recipe, dense, experts, part, world, stage, value),
        host=optimizer.host_bytes() * stepped,
        process=PROCESS + (recipe.model.huggingface is not None) * TRANSFORMERS,
    )


def activations(recipe: Recipe, value: int) -> int:
    """Count the bytes that one micro-batch stores for its backward pass, with ``value`` bytes v per value.

    The micro-batch has ``data.batch.tokens`` padded tokens S, half source and half target. The table is per
    token, in values, with a factor 1 / t for what is split over tensor-parallel ranks; a model of
    transformers has all S tokens on its one side::

        self-attention      3 H + 4 H / t        in and out of its norm, dropout's mask; query, key, value,
                                                 weighted sum of values
        over the source     3 H + 2 H / t        the same for a target token, and 2 H / t for a source
                                                 token's key and value
        feed-forward        3 H + F / t
        experts             3 H + K (2 H + F) / t, and 2 E float32 where each token chooses
        a side's ends       3 H                  in and out of its last norm, dropout's mask on the embedding
        output layer        H + V / t            per target token: the gradient overwrites the logits
        methods                                  see each method's ``values``
        of transformers     2 H for a layer norm, 3 H for one in Python, H for a dropout mask, if any; in an
                            attention its own widths; 2 F for the input of a feed-forward's activation
                            function, 2 F for a gate; C classes per token of an encoder

    If both routes are trained, everything counts twice. On the shared route a feed-forward replaces the
    experts from which it is distilled. Attention probabilities are not stored:
    ``scaled_dot_product_attention`` recomputes them (with ``training.attention_dropout`` on a CPU it stores
    them).

    With ``training.activation_checkpointing`` a layer keeps only its input, H. Recomputed values are kept for
    one layer at a time; the logits are freed before. So the larger of the largest layer and the logits is
    counted. Keys and values of the source, and what methods add to them, are computed outside the decoder's
    layers.

    Three things are approximate: the split into source and target (a batch with longer target sentences needs
    more); the dropout masks, counted as values as on a CPU (on a GPU they are bytes); and the load of the
    experts, assumed to be even over their ranks. Each micro-batch starts after the activations of the one
    before are freed.
    """
    model, tensor, hidden = recipe.model, recipe.parallel.tensor, recipe.model.hidden
    twice = passes(recipe)
    mask = (recipe.training.dropout > 0) * hidden
    norm = 2 * hidden + mask  # in and out of a norm, and dropout's mask
    # Outside the layers: the ends of both sides, and what the output layer reads.
    beside: float = 2 * norm + hidden
    logits = recipe.data.vocabulary.size / tensor
    layers: dict[tuple[SideName, int], float] = {}
    # How often a feed-forward's width is kept (ReLU keeps only its result), and a side's share of the tokens.
    inner, share = 1, 0.5
    if (alone := model.alone) is not None:
        around = outline_of(recipe).around
        mask, inner, share = mask * around.drops, 2, 1.0
        # The mask of the embedding; before the classes of words, a mask and its result.
        beside, norm = around.kept_outside + mask * (3 if model.task == "tag" else 1), mask
        logits = around.heads[0][2] * (0.5 if alone == "decoder" else 1.0)
        layers |= around.kept
    for site in shapes_of(model):
        side, at = model.encoder if site.side == "encoder" else model.decoder, (site.side, site.layer)
        layers.setdefault(at, 0.0)
        own: float = sum(method.values(site, tensor) for method in model.methods if method.is_at(site))
        if isinstance(site, SublayerShape):
            layers[at] += norm
            if site.sublayer == "feed_forward" and side.is_moe(site.layer):
                assert side.moe is not None
                own += experts.values(hidden, side.width(site.layer), side.moe) / tensor
                if side.moe.routing == "token":  # in float32
                    own += 4 / value * 2 * side.moe.experts * model.routed(side.moe) / twice
        elif isinstance(site, LinearShape) and site.name != "contract":
            # The input of an attention's output layer, and the results of all other layers.
            width = site.inputs if site.name == "output" else site.outputs
            own += width * (inner if site.sublayer == "feed_forward" else 1) / tensor
        if site.reads == site.side:
            layers[at] += own
        else:
            beside += own
    if recipe.training.activation_checkpointing:
        # A layer's input is also the input of its first norm, or the result of the last layer's last norm.
        within = hidden * len(layers) + max(logits, max(layers.values()) - hidden)
    else:
        within = sum(layers.values()) + logits
    return round(value * twice * share * recipe.data.batch.tokens * (beside + within))


def teacher_values(recipe: Recipe) -> tuple[int, int]:
    """Count the parameters of ``training.teacher``, whole on each rank, and its logits of one micro-batch.

    A teacher that is on another machine counts nothing.
    """
    teacher = recipe.training.teacher
    if teacher is None or not (stored := teacher.model / "recipe.yaml").is_file():
        return 0, 0
    logits = recipe.data.batch.tokens // 2 * recipe.data.vocabulary.size
    return Parts.of(load_recipe(stored)).whole.total, logits


def replica_bytes(recipe: Recipe, value: int) -> int:
    """Count the bytes of experts' weights that are lent for a forward and backward pass.

    For l lent values, a layer keeps v l bytes: all layers, or with ``training.activation_checkpointing`` one
    at a time. One layer needs another (v + 4) l while its gradients are summed over ranks, in float32.
    """
    model, languages = recipe.model, recipe.languages
    if recipe.parallel.expert == 1:
        return 0
    lent = [
        lent_experts(moe, languages)
        * count_feed_forward(
            model.hidden, (model.encoder if side == "encoder" else model.decoder).width(layer)
        ).total
        for side, layer, moe in model.moe_layers()
    ]
    largest = max(lent, default=0)
    kept = largest if recipe.training.activation_checkpointing else sum(lent)
    return value * kept + (value + 4) * largest


def chunk_bytes(recipe: Recipe, value: int) -> int:
    """Count the bytes of the gradient of a layer's local experts that waits for that of other chunks."""
    model, ranks = recipe.model, recipe.parallel.expert
    waiting = [
        moe.experts
        // ranks
        * count_feed_forward(
            model.hidden, (model.encoder if side == "encoder" else model.decoder).width(layer)
        ).total
        for side, layer, moe in model.moe_layers()
        if moe.chunks > 1 and ranks > 1
    ]
    return value * max(waiting, default=0)


def buffers(recipe: Recipe, dense: int, experts: int, part: int, world: int, stage: int, value: int) -> int:
    """Return the bytes of the buffers in which DeepSpeed reduces gradients and updates the weights.

    d, e, p and v as in :func:`memory`, b = ``reduce_bucket_size``::

        stage 0     4 min(2^24, max(d, e))          copies of dense, then of expert gradients
                    6 min(2^24, max(d, e))          in bfloat16: in both types
                    at least s l, with Adafactor
        stages 1, 2 4 min(b, d + e) + 4 p           the bucket; gradients of the rank's part, in one tensor
        stage 2     2 min(b, d + e)                 in bfloat16: the bucket, and float32 copies
                    + 4 min(b, max(d, e))           of its dense, then of its expert gradients

    Adafactor steps one parameter after another and needs s bytes for each of the l values of the largest one:
    4 in float32, 8 in bfloat16, 16 without float32 copies of the weights.
    A stage-0 bucket holds at least one whole gradient, so 2^24 is replaced by V H / t or the size of a
    method's largest parameter if that is more. On a GPU the bucket of stages 1 and 2 always has all its b
    values. Rows that are exchanged with other ranks' experts and ZeRO's padding are left out: they are small.
    """
    if stage == 0:
        largest = recipe.data.vocabulary.size * recipe.model.hidden // recipe.parallel.tensor
        largest = max(
            [largest, *(method.largest(recipe.model, recipe.languages) for method in recipe.model.methods)]
        )
        copies = min(max(STAGE_0_BUCKET, largest), max(dense, experts)) if world > 1 else 0
        copies *= 4 if value == 4 else 2 + 4
        optimizer = recipe.training.optimizer_settings
        if optimizer.steps_halves:  # after the gradients are reduced
            return max(copies, optimizer.step_bytes(value == 2) * largest_trained(recipe))
        return copies
    config = recipe.deepspeed if isinstance(recipe.deepspeed, dict) else {}
    bucket = int(config.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET))
    full = min(bucket, dense + experts)
    if stage == 2 and value == 2:
        return value * full + 4 * min(bucket, max(dense, experts))
    return 4 * (full + part)

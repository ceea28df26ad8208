"""The memory that a rank needs in training. Each function's docstring has its formula.

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
TRANSFORMERS = 150 * 2**20  # measured there: what importing it and a model's class adds
# Allocator fragmentation, measured on a CPU: some blocks of one micro-batch's shapes fit none of the next
# one's.
ALLOCATOR = 1.4
GPU_ALLOCATOR = 1.1  # the same of torch's on an H200, whose blocks are cut and joined


@dataclass(frozen=True)
class Memory:
    """The bytes on each rank.

    ``weights``, ``gradients`` and ``optimizer`` are permanent (gradients from the backward pass to the
    optimizer step); ``activations`` and ``buffers`` are temporary. ``host`` is part of no sum.
    """

    precision: str
    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    process: int = PROCESS
    host: int = 0  # what an optimizer keeps in the host's memory, beside a GPU

    @property
    def total(self) -> int:
        """Return the permanent bytes."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Return the permanent bytes, the process itself, and ALLOCATOR times the temporary bytes.

        Activations and buffers are not needed at the same moment, but the memory blocks that one frees rarely
        fit the other.
        """
        return self.total + self.process + round(ALLOCATOR * (self.activations + self.buffers))

    @property
    def gpu_peak(self) -> int:
        """Return the same on a GPU, whose allocator takes GPU_ALLOCATOR times the temporary bytes.

        The process stands for the driver's context and what libraries load.
        """
        return self.total + self.process + round(GPU_ALLOCATOR * (self.activations + self.buffers))


def local_parameters(count: Count, tensor: int, expert: int) -> tuple[int, int]:
    """Return the (dense, expert) parameters of one rank: split / tensor + whole, and expert / R."""
    return count.split // tensor + count.whole, count.expert // expert


def memory(recipe: Recipe, world: int, stage: int, precision: str, trained: Count | None = None) -> Memory:
    """Compute the memory of one rank; ``trained`` is what of the parameters trains, if that is known already.

    In bfloat16, stage 0 is for optimizers that step it themselves, such as Adafactor
    (:func:`lsmoe_ds.config.deepspeed.complete`).

    v is the bytes per value (4 or 2); n is the number of the rank's parameters (:func:`local_parameters`), of
    which d dense and e expert ones train (:func:`lsmoe_ds.planning.trained.count_trained`); m is the number
    of truth values in its masks (:func:`lsmoe_ds.planning.costs.count_masks`), a byte each.
    ZeRO partitions dense state over the D = world / tensor data ranks, and expert state over the X = world /
    expert ranks that hold the same experts; p = d / D + e / X::

        weights     v n + m              in every stage
        gradients   v (d + e)            stage 0
                    4 (d + e)            stage 1;    4 p   in stage 2: sums in float32
        optimizer   8 (d + e)            stage 0: Adam's two float32 moments
                    12 p                 stages 1 and 2: also a float32 copy of the weights, which DeepSpeed
                                         keeps even of a float32 model
                    8 of these           in the host's memory with ``adam.offload``
                    4 (d + e) or 4 p     beside, for the moving average of ``training.ema``
                    4 a + 4 k (d + e)    Adafactor: its averages, and k of momentum and a float32 copy

    Adafactor's averages are a values (:func:`lsmoe_ds.planning.trained.count_averages`): n + m of a matrix
    [n, m], n of a vector. :func:`activations`, :func:`replica_bytes` and :func:`buffers` compute the
    temporary memory. A teacher (:func:`teacher_values`) has its weights and logits beside.
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
        activations=activations(recipe, value) + replica_bytes(recipe, value) + value * said,
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
                                                 mixture
        over the source     3 H + 2 H / t        the same for a target token, and 2 H / t for a source
                                                 token's key and value
        feed-forward        3 H + F / t
        experts             3 H + K (2 H + F) / t, and 2 E float32 where each token chooses
        a side's ends       3 H                  in and out of its last norm, dropout's mask on the embedding
        output layer        H + V / t            per target token: the gradient takes the place of the logits
        methods                                  see each method's ``values``
        of transformers     2 H of a layer norm, 3 H of one in Python, H for a mask of dropout where there is
                            one; in an attention its own widths; 2 F for what a feed-forward's activation
                            function reads, 2 F for a gate; C classes of an encoder's token

    If both routes are trained, everything counts twice. On the shared route a feed-forward takes the place of
    the experts from which it is distilled. Attention probabilities are not stored:
    ``scaled_dot_product_attention`` recomputes them (with ``training.attention_dropout`` on a CPU it stores
    them).

    With ``training.activation_checkpointing`` a layer keeps its input alone, H, and what is computed again is
    kept of one layer at a time: that of the largest is counted, or the logits if they are more, which are
    gone by then. Keys and values of the source, and what methods add to them, are computed outside the
    decoder's layers.

    Three things are approximate: the split into source and target (a batch with longer target sentences takes
    more); the dropout masks, counted as values as on a CPU (on a GPU they are bytes); and the even load of
    the experts over their ranks. With several micro-batches each starts after the last one's activations are
    freed.
    """
    model, tensor, hidden = recipe.model, recipe.parallel.tensor, recipe.model.hidden
    twice = passes(recipe)
    mask = (recipe.training.dropout > 0) * hidden
    norm = 2 * hidden + mask  # in and out of a norm, and dropout's mask
    # Outside the layers: the ends of both sides, and what the output layer reads.
    beside: float = 2 * norm + hidden
    logits = recipe.data.vocabulary.size / tensor
    layers: dict[tuple[SideName, int], float] = {}
    inner, share = 1, 0.5  # times a feed-forward's width is kept (a ReLU keeps its result alone); of tokens
    if (alone := model.alone) is not None:
        around = outline_of(recipe).around
        mask, inner, share = mask * around.drops, 2, 1.0
        # The embedding's mask; before classes of words a mask and its result.
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
            # The mixture that the output layer of an attention reads, and the results of all others.
            width = site.inputs if site.name == "output" else site.outputs
            own += width * (inner if site.sublayer == "feed_forward" else 1) / tensor
        if site.reads == site.side:
            layers[at] += own
        else:
            beside += own
    if recipe.training.activation_checkpointing:
        # The input of a layer is also what its first norm reads, or the result of the last layer's last one.
        within = hidden * len(layers) + max(logits, max(layers.values()) - hidden)
    else:
        within = sum(layers.values()) + logits
    return round(value * twice * share * recipe.data.batch.tokens * (beside + within))


def teacher_values(recipe: Recipe) -> tuple[int, int]:
    """Count the parameters of the teacher of ``training.teacher``, which is whole on each rank, and its
    logits of one micro-batch. Nothing is counted of a teacher that is on another machine.
    """
    teacher = recipe.training.teacher
    if teacher is None or not (stored := teacher.model / "recipe.yaml").is_file():
        return 0, 0
    logits = recipe.data.batch.tokens // 2 * recipe.data.vocabulary.size
    return Parts.of(load_recipe(stored)).whole.total, logits


def replica_bytes(recipe: Recipe, value: int) -> int:
    """Count the bytes of the weights of experts that are lent for a forward and backward pass.

    With l values in a layer v l are kept of each, or with ``training.activation_checkpointing`` of one at a
    time, and (v + 4) l of one layer while its gradients are summed over the ranks, in float32.
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


def buffers(recipe: Recipe, dense: int, experts: int, part: int, world: int, stage: int, value: int) -> int:
    """Return the bytes of the buffers in which DeepSpeed reduces gradients and updates the weights.

    d, e, p and v as in :func:`memory`, b = ``reduce_bucket_size``::

        stage 0     4 min(2^24, max(d, e))          copies of dense, then of expert gradients
                    6 min(2^24, max(d, e))          in bfloat16: in both types
                    at least s l, with Adafactor
        stages 1, 2 4 min(b, d + e) + 4 p           the bucket; gradients of the rank's part, in one tensor
        stage 2     2 min(b, d + e)                 in bfloat16: the bucket, and float32 copies
                    + 4 min(b, max(d, e))           of its dense, then of its expert gradients

    Adafactor steps one parameter after another; for each value of the largest, of l values, it needs s bytes:
    4 in float32, 8 in bfloat16, 16 without float32 copies of the weights.
    A stage-0 bucket holds at least one whole gradient: if that is more, V H / t values or as many as a
    method's largest parameter. On a GPU the bucket of stages 1 and 2 always takes all its b values. Rows in
    exchange with other ranks' experts and ZeRO's padding are left out, because they are small.
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

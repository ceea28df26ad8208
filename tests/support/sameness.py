"""Take two small steps in any layout, and compare them with those of one process."""

from __future__ import annotations

import pytest
import torch

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Batch, PairBatch, Step
from lsmoe_ds.languages import EOS, PAD
from lsmoe_ds.methods.lass.method import MaskedWeight

VOCABULARY = 48
UNITS = 4
LORA = {"rank": {"de": 2, "en": 0, "fr": 3, "ru": 1}, "at": "all", "index": "learned"}
LORA |= {"prune": {"ratio": 0.5, "start": 0, "length": 1, "over": "language", "matrices": "both"}}
LARGE = {**LORA, "rank": {"de": 2, "en": 0, "fr": 17, "ru": 1}}  # multiplied in both ways
SQUARE = {**LORA, "index": {"source": ["encoder"], "target": ["all"]}, "columns": 10}
METHODS = {
    "lms": {"low_rank": {"rank": 3, "at": "both"}},
    "lora": {"low_rank": LORA},
    "large": {"low_rank": LARGE},
    "square": {"low_rank": SQUARE},
    "units": {"neurons": {"random": 0.6}},
    "adapters": {"adapters": {"width": 5}},
    "lass": {"lass": {"tuned": "none"}},
    "rows": {"neurons": {"random": 0.6, "remove": "rows"}, "low_rank": {"rank": 3}},
}


def recipe_for(routing: str, tensor: int, expert: int, stage: int, clip: float = 0.5) -> Recipe:
    moe = {"every": 2, "experts": 8, "top_k": 2, "balance_loss_weight": 0.05, "z_loss_weight": 0.01}
    token, target = {"routing": "token"}, {"routing": "task", "task": "target"}
    full = {"capacity": {"training": 0.75, "drop": "probability"}}
    sides = {
        "dense": (None, None),
        "token": (token, token),
        "sentence": ({"routing": "sentence"}, {"routing": "sentence", "top_k": 1}),
        "target": (target, target),
        "pair": ({"routing": "task", "task": "pair", "top_k": 1}, {"routing": "task", "task": "pair"}),
        "static": (
            {"routing": "static", "task": "source"},
            {"routing": "static", "task": "pair", "expert_groups": 2},
        ),
        "mixed": (token, {**target, "expert_groups": 2}),
        **{name: (None, {**target}) for name in METHODS},
        "distilled": (
            {"routing": "static", "task": "source", "top_k": 1, "fuse_distillation": True},
            {**token, "fuse_distillation": True},
        ),
        "chunks": ({**token, "chunks": 2}, {**target, "expert_groups": 2, "chunks": 3}),
        "pair in chunks": (
            {"routing": "task", "task": "pair", "top_k": 1, "chunks": 2},
            {"routing": "task", "task": "pair", "chunks": 2},
        ),
        "capacity in chunks": ({**token, **full, "chunks": 5}, {**target, **full, "chunks": 3}),
        "capacity": ({**token, **full}, {**token, "capacity": {"training": 0.75, "drop": "position"}}),
    }[routing]
    encoder, decoder = (({"moe": {**moe, **side}} if side else {}) for side in sides)
    return Recipe.model_validate(
        {
            "name": "test",
            "data": {
                "corpora": ["none"],
                "languages": ["de", "fr", "ru"],
                "vocabulary": {"size": VOCABULARY * 2},
                "batch": {"tokens": 64, "count": UNITS},
            },
            "model": {
                "hidden": 16,
                "heads": 4,
                "encoder": {"layers": 2, "feed_forward": 24, **encoder},
                "decoder": {"layers": 2, "feed_forward": 24, **decoder},
                **METHODS.get(routing, {}),
            },
            "training": {
                "steps": 3,
                "learning_rate": 0.01,
                "warmup": 2,
                "dropout": 0.0,
                "label_smoothing": 0.1,
                "max_grad_norm": clip,
                **({"start_from": "none"} if routing == "lass" else {}),
            },
            "parallel": {"tensor": tensor, "expert": expert},
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }
    )


def ragged_batch(generator: torch.Generator, recipe: Recipe, sentences: int) -> Batch:
    languages = recipe.languages
    lengths = torch.randint(1, 9, (2, sentences), generator=generator)
    source = torch.full((sentences, int(lengths[0].max()) + 1), PAD)
    labels = torch.full((sentences, int(lengths[1].max()) + 1), PAD)
    for i in range(sentences):
        for row, length in ((source[i], int(lengths[0, i])), (labels[i], int(lengths[1, i]))):
            row[:length] = torch.randint(4, VOCABULARY, (length,), generator=generator)
            row[length] = EOS
    decoder_input = torch.full_like(labels, PAD)
    decoder_input[:, 0] = EOS
    decoder_input[:, 1:] = torch.where(labels[:, :-1] == EOS, PAD, labels[:, :-1])
    direction = torch.randint(0, len(languages.directions), (sentences,), generator=generator)
    ids = torch.tensor([[languages.id(d.source), languages.id(d.target)] for d in languages.directions])[
        direction
    ]
    return PairBatch(source, decoder_input, labels, ids[:, 0], ids[:, 1], direction)


def steps_of(recipe: Recipe, rank: int, ranks: int) -> list[Step]:
    generator = torch.Generator().manual_seed(7)
    steps = []
    for _ in range(2):  # the second with the weights and the optimizer state of the first
        # Wildly unequal units: one sentence beside nine.
        units = [
            ragged_batch(generator, recipe, sentences)
            for sentences in (1, 9, 4, 2)[: recipe.data.batch.count]
        ]
        tokens = sum(unit.target_tokens for unit in units)
        source_tokens = sum(int((unit.source != PAD).sum()) for unit in units)
        steps.append(Step(units[rank::ranks], tokens, source_tokens, 0, []))
    return steps


def draw_masks(model, topology) -> None:
    """Draw the masks of LaSS, which a training would find in fine-tuned models, alike in every layout."""
    modules = [module for module in model.modules() if isinstance(module, MaskedWeight)]
    for number, module in enumerate(modules):
        dimension, whole = 1 if module.split == "column" else 2, list(module.mask.shape)
        whole[dimension] *= topology.tensor
        mask = torch.rand(whole, generator=torch.Generator().manual_seed(number)) < 0.6
        module.mask.copy_(mask.chunk(topology.tensor, dimension)[topology.tensor_rank])


def train(topology, recipe: Recipe):
    """Take two steps; return losses, gradient norms, the first step's gradients and the final weights of the
    whole model, by global name.
    """
    from deepspeed.utils import safe_get_full_grad

    from lsmoe_ds.parallel.parameters import global_names, partition_dimension
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    draw_masks(engine.module, topology)
    # Adam divides rounding noise by itself where the true gradient is zero (a key's bias): the weights of two
    # correct runs differ there. With a larger epsilon they are a smooth function of the gradients, and
    # comparable.
    for group in engine.optimizer.param_groups:
        group["eps"] = 1e-3
    names = global_names(engine.module, topology)
    gradients: dict[str, tuple] = {}
    true_step = engine.step

    def step_after_reading_gradients(*arguments, **options):
        if engine.is_gradient_accumulation_boundary() and not gradients:
            for name, parameter in engine.module.named_parameters():
                gradient = safe_get_full_grad(parameter)
                # NumPy: a tensor would travel between processes by shared memory, one file handle each.
                gradients[names[name]] = (gradient.float().numpy().copy(), partition_dimension(parameter))
        return true_step(*arguments, **options)

    engine.step = step_after_reading_gradients
    results = [
        train_step(engine, step, i + 1, recipe, topology)
        for i, step in enumerate(steps_of(recipe, topology.data_rank, topology.data))
    ]
    weights = {
        names[name]: (parameter.detach().numpy().copy(), partition_dimension(parameter))
        for name, parameter in engine.module.named_parameters()
    }
    engine.destroy()
    return (
        [
            (
                *(r.metrics.get(name, 0.0) for name in ("loss", "nll", "balance", "z_loss", "dropped")),
                r.grad_norm,
            )
            for r in results
        ],
        gradients,
        weights,
    )


def whole(results, tensor: int, which: int) -> dict[str, torch.Tensor]:
    """Return the whole model's tensors from those of all ranks: tensor-parallel parts joined, experts
    collected, replicas checked.
    """
    found: dict[str, torch.Tensor] = {}
    for first in range(0, len(results), tensor):
        peers = [results[first + t][which] for t in range(tensor)]
        for name in {name for peer in peers for name in peer}:
            parts = [(torch.from_numpy(peer[name][0]), peer[name][1]) for peer in peers if name in peer]
            value = parts[0][0] if parts[0][1] is None else torch.cat([p for p, _ in parts], parts[0][1])
            if parts[0][1] is None:
                for other, _ in parts[1:]:
                    torch.testing.assert_close(
                        other, value, rtol=0, atol=1e-7, msg=f"tensor-parallel replicas of {name} differ"
                    )
            if name in found:
                torch.testing.assert_close(
                    value, found[name], rtol=0, atol=1e-7, msg=f"data-parallel replicas of {name} differ"
                )
            found[name] = value
    return found


def close(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """Allow 1e-5 of the tensor's largest value, or of 0.01 where all are smaller (a key's bias)."""
    limit = 1e-5 * max(wanted.abs().max().item(), 1e-2)
    difference = (found - wanted).abs().max().item()
    assert difference <= limit, f"{name}: differs by {difference:.2e}, allowed {limit:.2e}"


def assert_same(found: list, wanted: list, tensor: int) -> None:
    """Compare what all ranks return from :func:`train` with what one process returns."""
    for numbers, *_ in found:
        for step, expected in zip(numbers, wanted[0][0], strict=True):
            assert step == pytest.approx(expected, rel=1e-5), "losses, dropped share and gradient norm differ"
    for which, what in ((1, "gradient"), (2, "weight")):
        ours, theirs = whole(found, tensor, which), whole(wanted, 1, which)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            close(ours[name], theirs[name], f"{what} of {name}")


def in_units(units: int, recipe: Recipe) -> Recipe:
    recipe.data.batch.count = units
    return recipe

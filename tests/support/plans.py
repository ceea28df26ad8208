"""Plan small recipes and those of papers, and count what the planned models do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.languages import EOS
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology
from support import PROJECT
from support.sameness import ragged_batch, steps_of

VOCABULARY = 96
PAPERS = PROJECT / "recipes" / "papers"
ROUTINGS = {
    "dense": None,
    "token": {"routing": "token"},
    "sentence": {"routing": "sentence"},
    "target": {"routing": "task", "task": "target"},
    "source": {"routing": "task", "task": "source", "top_k": 1},
    "pair": {"routing": "task", "task": "pair", "top_k": 3},
    "static": {"routing": "static", "task": "pair"},
}
SIDES = [(name, name) for name in ROUTINGS] + [("token", "target"), ("pair", "dense"), ("static", "sentence")]


def recipe_of(
    encoder: str, decoder: str, tensor: int = 1, expert: int = 1, stage: int = 1, bf16: bool = False, **more
) -> Recipe:
    def moe(name: str) -> dict | None:
        return (
            None
            if ROUTINGS[name] is None
            else {"experts": 4, "every": 2, "top_k": 2, **ROUTINGS[name], **more}
        )

    return Recipe.model_validate(
        {
            "name": "small",
            "data": {
                "corpora": ["none"],
                "languages": ["de", "fr", "ru"],
                "vocabulary": {"size": VOCABULARY},
                "batch": {"tokens": 64, "count": 8},
            },
            "model": {
                "hidden": 16,
                "heads": 4,
                "encoder": {"layers": 3, "feed_forward": [24, 20, 12], "moe": moe(encoder)},
                "decoder": {"layers": 4, "feed_forward": [8, 24, 16, 28], "moe": moe(decoder)},
            },
            "training": {"steps": 3, "dropout": 0.0, "max_grad_norm": 0.0},
            "parallel": {"tensor": tensor, "expert": expert},
            "deepspeed": {
                "zero_optimization": {"stage": stage},
                **({"bf16": {"enabled": True}} if bf16 else {}),
            },
        }
    )


def sizes(weights) -> dict[str, int]:
    """Count parameters by part, from (name, tensor)."""
    found = {"vocabulary": 0, "encoder": 0, "decoder": 0, "output": 0, "total": 0}
    for name, value in weights:
        part = name.split(".")[0].removesuffix("_norm").replace("embedding", "vocabulary")
        found[part] += value.numel()
        found["total"] += value.numel()
    return found


def traffic(topology, recipe):
    """Return rows and bytes that left this rank in forward and backward of one micro-batch, by MoE layer
    in order.
    """
    model = Transformer(recipe, VOCABULARY, topology)
    initialize(model, 1, topology)
    batch = ragged_batch(torch.Generator().manual_seed(topology.rank), recipe, 6)
    losses = model(batch.source, batch.decoder_input, batch.labels, batch.ids)
    losses.loss.backward()
    dispatchers = [module.traffic.take() for module in model.modules() if hasattr(module, "traffic")]
    return [(taken.rows, taken.bytes) for taken in dispatchers]


def step_traffic(topology, recipe):
    """Return rows and bytes of a step that left any rank."""
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    result = train_step(engine, steps_of(recipe, topology.data_rank, topology.data)[0], 1, recipe, topology)
    engine.destroy()
    return sum(side.rows for side in result.exchanged.values()), sum(
        side.bytes for side in result.exchanged.values()
    )


# Operations of products that torch does not count: by the shapes of what is multiplied.
PRODUCTS = {
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.baddbmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2],
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],
}


def flops_of(recipe: Recipe, length: int, run: Callable[..., object]) -> int:
    """Count the operations of ``run(model, *batch)``: three sentences of ``length`` tokens on both sides."""
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    generator = torch.Generator().manual_seed(2)
    source, decoder_input = (torch.randint(4, VOCABULARY, (3, length), generator=generator) for _ in range(2))
    decoder_input[:, 0] = EOS
    ids = ragged_batch(generator, recipe, 3).ids
    with (
        FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        run(model, source, decoder_input, decoder_input, ids)
    return counter.get_total_flops()


def flops_by_torch(recipe: Recipe, length: int) -> int:
    """Count the operations of the same sentences at inference."""

    @torch.no_grad()
    def run(model, *batch) -> None:
        model.eval()
        model(*batch)

    return flops_of(recipe, length, run)


def millions(count: float) -> int:
    return round(count / 1e6)


def dense(name: str) -> Recipe:
    return load_recipe(PAPERS / f"{name}.yaml", ["model.encoder.moe=null", "model.decoder.moe=null"])


def task_moe(encoder: str, decoder: str, name: str = "wmt-base-32", top_k: int = 2) -> Recipe:
    overrides = []
    for side, task in (("encoder", encoder), ("decoder", decoder)):
        routing = f"task, task: {task}" if task in ("pair", "target") else task
        experts = 32 if name == "wmt-base-32" else 128
        overrides.append(f"model.{side}.moe={{experts: {experts}, top_k: {top_k}, routing: {routing}}}")
    return load_recipe(PAPERS / f"{name}.yaml", overrides)

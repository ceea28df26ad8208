"""Curves of thirty training steps of eight small models, which a change of structure must not change.

``PYTHONPATH=tests python -m support.golden_curves`` records them in ``tests/golden``: a file for each recipe,
with a curve for each layout; with ``--compare`` it tells which still are the same, to the bit. Record them
only for a change of the mathematics that is meant. Numbers are exact (``float.hex``).
"""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

from support import PROJECT

FOLDER = PROJECT / "tests" / "golden"
LAYOUTS = {"one": {}, "tensor-2-expert-2": {"tensor": 2, "expert": 2}}
WORLDS = {"one": 1, "tensor-2-expert-2": 4}
STEPS, VOCABULARY = 30, 48
NAMES = ("loss", "nll", "balance", "z_loss", "gates", "distillation", "grad_norm")
MOE = {"experts": 4, "every": 2, "top_k": 2, "balance_loss_weight": 0.05, "z_loss_weight": 0.01}
TARGET = {**MOE, "routing": "task", "task": "target"}
STATIC = {**MOE, "routing": "static", "task": "source", "fuse_distillation": True}
# By name: what the encoder's and the decoder's experts are, and the other sections of the model.
MODELS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None, dict[str, Any]]] = {
    "dense": (None, None, {}),
    "token": ({**MOE, "routing": "token", "jitter": 0.01}, {**MOE, "routing": "token"}, {}),
    "task": ({**MOE, "routing": "token"}, TARGET, {}),
    "static-fd": (STATIC, {**STATIC, "task": "target"}, {}),
    "lms-pair": (None, None, {"low_rank": {"rank": 4, "index": "pair"}}),
    "lms-fd": (None, None, {"low_rank": {"rank": 4, "index": "language", "fuse_distillation": True}}),
    "clsr": (None, None, {"clsr": {"gate": 8, "budget": 0.4}}),
    "lms-attention-task": (TARGET, TARGET, {"low_rank": {"rank": 4, "index": "language", "at": "attention"}}),
}


def recipe_of(name: str, tensor: int = 1, expert: int = 1) -> Any:
    from lsmoe_ds.config.recipe import Recipe

    encoder, decoder, more = MODELS[name]
    return Recipe.model_validate(
        {
            "name": name,
            "data": {
                "corpora": ["none"],
                "languages": ["de", "fr", "ru"],
                "vocabulary": {"size": 64},
                "batch": {"tokens": 128, "count": 4},
            },
            "model": {
                "hidden": 16,
                "heads": 4,
                "encoder": {"layers": 2, "feed_forward": 32, **({"moe": encoder} if encoder else {})},
                "decoder": {"layers": 2, "feed_forward": 32, **({"moe": decoder} if decoder else {})},
                **more,
            },
            "training": {
                "steps": STEPS,
                "learning_rate": 0.01,
                "warmup": 8,
                "dropout": 0.1,
                "attention_dropout": 0.1,
            },
            "parallel": {"tensor": tensor, "expert": expert},
            "deepspeed": {"zero_optimization": {"stage": 1}},
        }
    )


def train(topology: Any, name: str, steps: int) -> dict[str, list[str]]:
    """Train on random tokens, on every rank; returns each number of the first steps."""
    import torch

    from lsmoe_ds.data.batches import Step
    from lsmoe_ds.languages import PAD
    from lsmoe_ds.parallel import compat
    from lsmoe_ds.training.engine import build_engine, train_step
    from support.sameness import ragged_batch

    recipe = recipe_of(name, topology.tensor, topology.expert)
    compat.seed_tensor_parallel_random(1 + 1009 * topology.data_rank, topology.tensor_rank)
    engine = build_engine(recipe, VOCABULARY, topology)
    generator = torch.Generator().manual_seed(3)
    curves: dict[str, list[str]] = {name: [] for name in NAMES}
    for number in range(1, steps + 1):
        batches = [ragged_batch(generator, recipe, sentences) for sentences in (3, 5, 2, 4)]
        tokens = (
            sum(batch.target_tokens for batch in batches),
            sum(int((batch.source != PAD).sum()) for batch in batches),
        )
        step = Step(batches[topology.data_rank :: topology.data], *tokens, 0, [])
        result = train_step(engine, step, number, recipe, topology)
        for key, curve in curves.items():
            curve.append(float({"grad_norm": result.grad_norm, **result.metrics}.get(key, 0.0)).hex())
    engine.destroy()
    return curves


def record(pool: Any, name: str, spread: int = STEPS) -> dict[str, dict[str, list[str]]]:
    """Train in every layout, on several processes the first ``spread`` steps; returns the curves of rank 0,
    on which all ranks agree.
    """
    found = {}
    for layout, sizes in LAYOUTS.items():
        ranks = pool.run(WORLDS[layout], train, name, STEPS if layout == "one" else spread, **sizes)
        assert all(curves == ranks[0] for curves in ranks), (
            f"{name}, {layout}: the ranks have different losses"
        )
        found[layout] = ranks[0]
    return found


def machine() -> dict[str, str]:
    """Name what floating-point results may depend on."""
    import torch

    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "model": next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            "",
        ),
    }


if __name__ == "__main__":
    from support.workers import Pool

    workers, compare = Pool(), "--compare" in sys.argv
    for each in [argument for argument in sys.argv[1:] if argument != "--compare"] or MODELS:
        value = {"machine": machine(), **record(workers, each)}
        if compare:
            before = json.loads((FOLDER / f"{each}.json").read_text())
            print(
                each,
                *(
                    f"{layout}: {'the same' if value[layout] == before[layout] else 'DIFFERS'}"
                    for layout in LAYOUTS
                ),
                flush=True,
            )
            continue
        lines = re.sub(
            r'\[\s+("[^]]*")\s+\]',
            lambda found: f"[{' '.join(found[1].split())}]",
            json.dumps(value, indent=1),
        )
        (FOLDER / f"{each}.json").write_text(lines + "\n")
        print(each, flush=True)
    workers.close()

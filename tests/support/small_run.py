"""A small run as `lsmoe data prepare` and `lsmoe train` leave it: real prepared data, real checkpoints of a
DeepSpeed engine.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.languages import PAD

TARGET_TOP2 = {"routing": "task", "task": "target", "experts": 4, "every": 2, "top_k": 2}
PAIR_TOP1 = {"routing": "task", "task": "pair", "experts": 4, "every": 1, "top_k": 1}
TOKEN_TOP2 = {"routing": "token", "experts": 4, "every": 2, "top_k": 2}


def make_recipe(
    folder: Path,
    encoder: dict | None,
    decoder: dict | None,
    tensor: int = 1,
    expert: int = 1,
    stage: int = 1,
    bf16: bool = False,
) -> Recipe:
    precision = {"bf16": {"enabled": True}} if bf16 else {}
    return Recipe.model_validate(
        {
            "name": "small",
            "data": {
                "corpora": [{"path": folder / "text.tsv", "format": "tsv"}],
                "directory": folder / "data",
                "languages": ["de", "fr"],
                "vocabulary": {"size": 140},
                "held_out": {"dev": 5, "test": 20},
                "batch": {"tokens": 256, "count": 4, "max_length": 24},
            },
            "model": {
                "hidden": 16,
                "heads": 4,
                "encoder": {"layers": 2, "feed_forward": 24, "moe": encoder},
                "decoder": {"layers": 3, "feed_forward": [24, 16, 24], "moe": decoder},
            },
            "training": {
                "steps": 2,
                "learning_rate": 0.05,
                "warmup": 1,
                "dropout": 0.0,
                "max_grad_norm": 0.0,
            },
            "parallel": {"tensor": tensor, "expert": expert},
            "deepspeed": {"zero_optimization": {"stage": stage}, **precision},
        }
    )


def write_corpus(folder: Path, lines: int = 300) -> None:
    """Made-up sentences in three made-up languages; the second and third spell every English word their own
    way.
    """
    random_words = random.Random(5)
    words = [
        "".join(random_words.choice("bdfgklmnprst") + random_words.choice("aeiou") for _ in range(2 + i % 2))
        for i in range(40)
    ]
    rows = ["en\tde\tfr"]
    for _ in range(lines):
        chosen = [random_words.choice(words) for _ in range(random_words.randint(3, 7))]
        rows.append(
            "\t".join(
                [
                    " ".join(chosen),
                    " ".join(w + "en" for w in chosen),
                    " ".join(w[::-1] + "e" for w in chosen),
                ]
            )
        )
    (folder / "text.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def train_and_save(topology: Any, recipe: Recipe, run: Path, vocabulary: int) -> dict[str, Any]:
    """Two steps on random tokens and a checkpoint, on every rank; returns the rank's own weights by global
    name.
    """
    import torch

    from lsmoe_ds.checkpoint import saving as checkpoints
    from lsmoe_ds.data.batches import Step
    from lsmoe_ds.parallel.parameters import global_names, partition_dimension
    from lsmoe_ds.training.engine import build_engine, train_step
    from support.sameness import ragged_batch

    engine = build_engine(recipe, vocabulary, topology)
    generator = torch.Generator().manual_seed(3)
    for number in (1, 2):
        units = [ragged_batch(generator, recipe, sentences) for sentences in (3, 5, 2, 4)]
        tokens = (
            sum(unit.target_tokens for unit in units),
            sum(int((unit.source != PAD).sum()) for unit in units),
        )
        step = Step(units[topology.data_rank :: topology.data], *tokens, 0, [])
        train_step(engine, step, number, recipe, topology)
    with checkpoints.Saver(run, topology, keep=1) as saver:
        saver.save(engine, 2, {})
    names = global_names(engine.module, topology)
    weights = {
        names[name]: (p.detach().float().numpy().copy(), partition_dimension(p))
        for name, p in engine.module.named_parameters()
    }
    engine.destroy()
    return weights


def make_run(
    pool: Any, folder: Path, encoder: dict | None, decoder: dict | None, world: int = 1, **layout: Any
) -> tuple[Path, list[Any]]:
    """Prepare data, train and save below ``folder``; return the run and the weights of its ranks."""
    from lsmoe_ds.checkpoint.run_folder import open_run
    from lsmoe_ds.data.prepare import prepare

    if not (folder / "text.tsv").exists():
        write_corpus(folder)
    recipe = make_recipe(folder, encoder, decoder, **layout)
    data = prepare(recipe)
    run = folder / "-".join(["run", *(f"{key}{value}" for key, value in layout.items())])
    open_run(recipe, run, data.folder / "vocabulary.model")
    sizes = {key: layout.get(key, 1) for key in ("tensor", "expert")}
    return run, pool.run(world, train_and_save, recipe, run, data.vocabulary.size, **sizes)

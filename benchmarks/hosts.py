"""Training adapters of a language model, and decoding with several of them, beside peft and transformers.

    python benchmarks/hosts.py --model data/models/smollm2 [--rounds 3]

Training: the same model, batches, rank and places of matrices, each in a process of its own: our training
step with modular LoRA, of one direction as peft trains it and of four in one mixed batch; and `Trainer` of
transformers with LoRA of peft. Tokens are real ones, prompts included. Decoding: 8 prompts of four directions
in one batch, with beams: by us, by peft with `adapter_names`, and by peft with one adapter after another.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, argument_parser, in_processes, peak_memory, run_main, write

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import IGNORED, SequenceBatch, Step
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.launch import joining
from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import build_engine, train_step

CODES = ("de", "fr", "it", "nl")
RANK, SENTENCES, WORDS = 8, 8, (14, 26)  # of each batch; words of a sentence
PROMPTS, WRITTEN = 8, 16
KINDS = ("ours", "ours, four directions", "peft")
TEXT = (
    "<|im_start|>user\nTranslate from {source_language} to {target_language}:\n{source}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
SENTENCE = [
    "The",
    "document",
    "could",
    "not",
    "be",
    "saved",
    "because",
    "the",
    "selected",
    "folder",
    "does",
    "not",
    "exist",
    "on",
    "this",
    "computer",
]


def recipe_of(model: Path, batch: int = 4096) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "data": {
                "corpora": ["none"],
                "languages": CODES,
                "batch": {"tokens": batch},
                "prompt": {"text": TEXT},
            },
            "model": {
                "huggingface": str(model),
                "low_rank": {"rank": RANK, "index": "modular", "at": "attention"},
            },
            "training": {
                "steps": 1000,
                "learning_rate": 1e-4,
                "warmup": 100,
                "label_smoothing": 0,
                "trainable": "methods",
            },
        }
    )


def tokenizer_of(recipe: Recipe) -> HostTokenizer:
    assert recipe.data.vocabulary.file is not None
    return HostTokenizer.load(recipe.data.vocabulary.file)


def batches_of(recipe: Recipe, count: int, directions: int) -> list[SequenceBatch]:
    """Return batches of pairs of like lengths, in the first ``directions`` directions out of English."""
    tokenizer = tokenizer_of(recipe)
    form = form_of(recipe.data, recipe.languages, tokenizer)
    generator = np.random.default_rng(1)
    numbers = [i for i, d in enumerate(recipe.languages.directions) if d.source == "en"][:directions]
    found = []
    for _ in range(count):
        pairs = [
            [
                tokenizer.encode(" ".join(generator.choice(SENTENCE, generator.integers(*WORDS))))
                for _ in range(2)
            ]
            for _ in range(SENTENCES)
        ]
        chosen = sorted(numbers[i % len(numbers)] for i in range(SENTENCES))
        made = form.collate([s for s, _ in pairs], [t for _, t in pairs], chosen)
        assert isinstance(made, SequenceBatch)
        found.append(made)
    return found


def whole(batch: SequenceBatch) -> dict[str, torch.Tensor]:
    """Return a batch as transformers reads it: the labels are the tokens themselves, which it shifts."""
    following = torch.cat([batch.tokens[:, 1:], batch.tokens[:, :1]], 1)
    learned = batch.labels != IGNORED
    following = torch.where(learned, batch.labels, following)
    real = torch.cat([batch.real[:, 1:], torch.zeros_like(batch.real[:, :1])], 1) | learned.long()
    first = batch.tokens[:, :1]
    return {
        "input_ids": torch.cat([first, following], 1),
        "attention_mask": torch.cat([torch.ones_like(first), real], 1),
        "labels": torch.cat([torch.full_like(first, IGNORED), batch.labels], 1),
    }


def train_ours(model: Path, batches: list[SequenceBatch]) -> list[float]:
    """Return the seconds of each step."""
    joining.join()
    topology, recipe = Topology.build(device=joining.device()), recipe_of(model)
    compat.seed_tensor_parallel_random(1, 0)
    tokens = tokenizer_of(recipe).size
    engine, seconds = build_engine(recipe, tokens, topology), []
    for number, batch in enumerate(batches, 1):
        begun = time.perf_counter()
        step = Step([batch], batch.target_tokens, int(batch.real.sum()), len(batch.tokens), [])
        train_step(engine, step, number, recipe, topology)
        seconds.append(time.perf_counter() - begun)
    return seconds


def adapted(model: Path, names: tuple[str, ...]) -> Any:
    """Return the model with a LoRA adapter of peft under each name."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
    )
    found = peft.get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        found.add_adapter(name, config)
    return found


def train_peft(model: Path, batches: list[SequenceBatch]) -> list[float]:
    """Return the seconds of each step of ``Trainer``."""
    import transformers

    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.begun)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=len(batches),
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = transformers.Trainer(
            adapted(model, ("one",)),
            arguments,
            train_dataset=[whole(batch) for batch in batches],
            data_collator=lambda features: features[0],
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds


def part(kind: str, model: Path, steps: int) -> dict[str, Any]:
    batches = batches_of(recipe_of(model), steps + 2, 4 if kind.endswith("directions") else 1)
    seconds = (train_peft if kind == "peft" else train_ours)(model, batches)[2:]
    tokens = [int(batch.real.sum()) + len(batch.tokens) for batch in batches[2:]]
    return {"tokens/s": sum(tokens) / sum(seconds), "GiB": peak_memory()}


def decoders(model: Path) -> dict[str, Callable[[], object]]:
    """Return what writes ``WRITTEN`` tokens to each of ``PROMPTS`` prompts of four directions, 5 beams."""
    from lsmoe_ds.model.host import HostModel
    from lsmoe_ds.model.initialization import initialize

    recipe = recipe_of(model)
    tokenizer = tokenizer_of(recipe)
    ours = HostModel(recipe, tokenizer.size)
    initialize(ours, 1, Topology.single())
    ours.eval().requires_grad_(False)
    numbers = [i for i, d in enumerate(recipe.languages.directions) if d.source == "en"]
    form = form_of(recipe.data, recipe.languages, tokenizer)
    generator = np.random.default_rng(2)
    sources = [tokenizer.encode(" ".join(generator.choice(SENTENCE, 12))) for _ in range(PROMPTS)]
    chosen = sorted(numbers[i % 4] for i in range(PROMPTS))
    batch = form.collate(sources, None, chosen)
    assert isinstance(batch, SequenceBatch)
    options = {
        "num_beams": 5,
        "max_new_tokens": WRITTEN,
        "min_new_tokens": WRITTEN,
        "do_sample": False,
        "pad_token_id": 2,
    }
    names = tuple(CODES)
    theirs = adapted(model, names).eval()
    order = [recipe.languages.directions[number].target for number in chosen]

    @torch.inference_mode()
    def mixed() -> None:
        read = {"input_ids": batch.tokens, "attention_mask": batch.real}
        theirs.generate(**read, adapter_names=order, **options)

    @torch.inference_mode()
    def alone() -> None:
        for name in names:
            rows = [i for i, each in enumerate(order) if each == name]
            theirs.set_adapter(name)
            theirs.generate(input_ids=batch.tokens[rows], attention_mask=batch.real[rows], **options)

    return {
        "ours": torch.inference_mode()(partial(ours.generate, batch, "specific", **options)),
        "peft, adapter_names": mixed,
        "peft, one after another": alone,
    }


def main() -> None:
    parser = argument_parser(__doc__, rounds=3)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a folder of transformers")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="of each training")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        found = part(arguments.kind, arguments.model, arguments.steps)
        arguments.part.write_text(json.dumps(found), encoding="utf-8")
        return
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    options = ["--model", str(arguments.model), "--steps", str(arguments.steps)]
    for _ in range(arguments.rounds):
        for kind in KINDS:
            runs[kind].append(in_processes(__file__, [*options, "--kind", kind], 1))
    training = {
        kind: {key: round(statistics.median(run[key] for run in each), 2) for key in each[0]}
        for kind, each in runs.items()
    }
    for kind, row in training.items():
        row["tokens/s to peft"] = round(row["tokens/s"] / training["peft"]["tokens/s"], 3)
        print(kind, row)
    contestants = decoders(arguments.model)
    for run in contestants.values():
        run()
    seconds = alternate(contestants, arguments.rounds)
    decoding = {
        name: {"tokens/s": round(PROMPTS * WRITTEN / value, 1), "to ours": round(value / seconds["ours"], 3)}
        for name, value in seconds.items()
    }
    print(decoding)
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
    write(
        {"versions": versions, "model": arguments.model.name, "training": training, "decoding": decoding},
        arguments.out,
    )


if __name__ == "__main__":
    run_main(main)

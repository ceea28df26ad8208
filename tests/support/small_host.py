"""A tiny language model of transformers with a tokenizer of its own, and a recipe on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lsmoe_ds.config.host import count_tokens
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prompts import IGNORED
from lsmoe_ds.directions import Direction, Languages, SentenceIds
from lsmoe_ds.model.host import HostModel
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.parallel.topology import Topology

START, END = "<|start|>", "<|end|>"
TEXT = f"{START}{{source_language}} to {{target_language}}:\n{{source}}\n{START}"
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
CAUSAL = {"num_key_value_heads": 2, "max_position_embeddings": 256}
LANGUAGES = Languages(tuple(map(Direction.parse, ("en-de", "de-en", "en-fr", "fr-en", "de-fr"))))


def write_host(folder: Path, kind: str = "Llama", **settings: Any) -> Path:
    """Save a random model of a class of transformers, with a byte-level tokenizer."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    # First letters of the small corpus with the space before them, which a prompt can join to them.
    tokenizer.train_from_iterator(
        ["baden leise German French English", " b d f g k l m n p r s t" * 9], trainer
    )
    tokenizer.add_special_tokens([AddedToken(START), AddedToken(END)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": START}))
    end = tokenizer.token_to_id(END)
    config = getattr(transformers, f"{kind}Config")(
        **{**SIZES, **CAUSAL, **settings}, vocab_size=tokenizer.get_vocab_size() + 2, eos_token_id=end
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():  # so that nothing is 1 or 0 by chance of initialization
        parameter.data.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def host_recipe(folder: Path, host: Path, stage: int = 0, **low_rank: Any) -> Recipe:
    """Return a recipe on the corpus that :func:`support.small_run.write_corpus` has written."""
    return Recipe.model_validate(host_settings(folder, host, stage, **low_rank))


def host_settings(folder: Path, host: Path, stage: int = 0, **low_rank: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "data": {
            "corpora": [{"path": str(folder / "text.tsv"), "format": "tsv"}],
            "directory": str(folder / "data"),
            "directions": ["en-de", "de-en", "en-fr", "fr-en", "de-fr"],
            "held_out": {"dev": 5, "test": 10},
            "batch": {"tokens": 512, "count": 2, "max_length": 96},
            "prompt": {"text": TEXT},
        },
        "model": {"huggingface": str(host), "low_rank": low_rank or None},
        **two_steps(stage, "methods" if low_rank else "all"),
    }


def two_steps(stage: int, trainable: str) -> dict[str, Any]:
    """Return how models of transformers train in tests."""
    return {
        "training": {
            "steps": 2,
            "learning_rate": 0.01,
            "warmup": 1,
            "label_smoothing": 0.0,
            "dropout": 0.0,
            "trainable": trainable,
        },
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }


def built(recipe: Recipe) -> HostModel:
    """Return a model whose low-rank matrices are all drawn."""
    tokens = count_tokens(recipe.data.vocabulary.file)
    model = HostModel(recipe, tokens)
    initialize(model, 1, Topology.single())
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "low_rank" in name and not name.endswith("index"):
            parameter.data.normal_(0.0, 0.2)
    return model


def example(model: HostModel, directions: list[int]) -> tuple[torch.Tensor, torch.Tensor, SentenceIds]:
    """Return random tokens [B, 9], labels of the last five, and the ids of B directions."""
    torch.manual_seed(7)
    tokens = torch.randint(0, 250, (len(directions), 9))
    labels = tokens.roll(-1, 1)
    labels[:, :4], labels[:, -1] = IGNORED, IGNORED
    pairs = [LANGUAGES.directions[number] for number in directions]
    numbers = [[LANGUAGES.id(code) for code in (pair.source, pair.target)] for pair in pairs]
    return tokens, labels, SentenceIds(*torch.tensor(numbers).T, torch.tensor(directions))

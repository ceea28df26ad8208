"""Small random models as Hugging Face has them, made with the classes of transformers."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import safetensors.torch
import sentencepiece
import torch

from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.export.importing import read_huggingface

DATA = ("data.corpora=[none]", "data.languages=[de,fr]")
NLLB_CODES = ["ace_Arab", "deu_Latn", "eng_Latn", "fra_Latn", "zho_Hans", "zho_Hant", "arb_Arab", "ars_Arab", "nob_Latn", "ger_Latn"]
CONFIG = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_ffn_dim": 24,
    "encoder_attention_heads": 4,
    "decoder_layers": 3,
    "decoder_ffn_dim": 40,
    "decoder_attention_heads": 4,
}


def pieces_of(kind: str) -> bytes:
    """A sentencepiece model as those of M2M-100 and NLLB: ids 0 to 2 <unk>, <s>, </s>; text is normalized by it."""
    chosen, model = random.Random(3), io.BytesIO()
    letters = ("bdfgklmnprst", "aeiouäéжが")
    words = ["".join(chosen.choice(letters[0]) + chosen.choice(letters[1]) for _ in range(chosen.randint(1, 4))) for _ in range(200)]
    lines = (" ".join(chosen.choice(words) for _ in range(chosen.randint(2, 9))).capitalize() + chosen.choice(".?!") for _ in range(2000))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type=kind, vocab_size=300, minloglevel=2, num_threads=1
    )
    return model.getvalue()


SPARSE = {"encoder_layers": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 3, "num_experts": 6}


def write_model(folder: Path, rows: int) -> None:
    """Weights and config.json of a random model."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    save_random(M2M100ForConditionalGeneration, M2M100Config(vocab_size=rows, dropout=0.0, **CONFIG), folder)


def save_random(kind: Any, config: Any, folder: Path) -> None:
    torch.manual_seed(7)
    model = kind(config)
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if getattr(module, "is_sparse", False):  # what all tokens have in common would make them choose alike
            torch.nn.init.zeros_(module.ff_layer_norm.bias)
            torch.nn.init.ones_(module.ff_layer_norm.weight)
    model.save_pretrained(folder)


def write_m2m(folder: Path) -> None:
    """Ids in another order than the pieces, three pieces without an id and three ids without a piece, eight rows for made-up words."""
    model = pieces_of("bpe")
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    random.Random(5).shuffle(pieces)
    ids = ["<s>", "<pad>", "</s>", "<unk>", *pieces[:-3], "no_piece", "nor_this", "▁nor_that"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(ids)}))
    write_model(folder, len(ids) + 100 + 8)


def write_nllb(folder: Path) -> None:
    write_model(folder, write_nllb_vocabulary(folder))


def write_nllb_moe(folder: Path, **changed: Any) -> None:
    """Write a random NLLB-MoE of :data:`CONFIG` and :data:`SPARSE`; ``changed`` are keys of ``NllbMoeConfig``."""
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    rows = write_nllb_vocabulary(folder)
    settings = {"vocab_size": rows, "dropout": 0.0, "attention_dropout": 0.0, **CONFIG, **SPARSE, **changed}
    save_random(NllbMoeForConditionalGeneration, NllbMoeConfig(**settings), folder)


def write_nllb_vocabulary(folder: Path) -> int:
    """Write the vocabulary of an NLLB, and return how many rows its embedding has."""
    (folder / "sentencepiece.bpe.model").write_bytes(pieces_of("bpe"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<mask>", "additional_special_tokens": NLLB_CODES}))
    return 301 + len(NLLB_CODES) + 1 + 2


def tokenizer_of(folder: Path) -> Any:
    from transformers import M2M100Tokenizer, NllbTokenizer

    if (folder / "vocab.json").exists():
        return M2M100Tokenizer(folder / "vocab.json", folder / "sentencepiece.bpe.model")
    return NllbTokenizer.from_pretrained(folder, additional_special_tokens=NLLB_CODES)


def imported(folder: Path, *overrides: str) -> tuple[Tensors, Any, Vocabulary]:
    tensors, recipe, model = read_huggingface(folder, [*DATA, *overrides], Path("out"))
    return tensors, recipe, Vocabulary(model)


def shard(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        safetensors.torch.save_file({name: tensors[name].half() for name in held}, folder / file)
    places = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

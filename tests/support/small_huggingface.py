"""Small random models as Hugging Face has them, made with the classes of transformers."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import sentencepiece
import torch

from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.export.importing import Asked, read_huggingface

DATA = ("data.corpora=[none]", "data.languages=[de,fr]")
NLLB_CODES = [
    "ace_Arab",
    "deu_Latn",
    "eng_Latn",
    "fra_Latn",
    "zho_Hans",
    "zho_Hant",
    "arb_Arab",
    "ars_Arab",
    "nob_Latn",
    "ger_Latn",
]
SPECIAL_IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
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
    """Train a sentencepiece model like those of M2M-100 and NLLB, and return its bytes.

    Ids 0 to 2 are <unk>, <s> and </s>; the model normalizes text.
    """
    chosen, model = random.Random(3), io.BytesIO()
    letters = ("bdfgklmnprst", "aeiouäéжが")
    words = [
        "".join(chosen.choice(letters[0]) + chosen.choice(letters[1]) for _ in range(chosen.randint(1, 4)))
        for _ in range(200)
    ]
    lines = (
        " ".join(chosen.choice(words) for _ in range(chosen.randint(2, 9))).capitalize()
        + chosen.choice(".?!")
        for _ in range(2000)
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type=kind,
        vocab_size=300,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


SPARSE = {"encoder_layers": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 3, "num_experts": 6}


def write_model(folder: Path, rows: int, text: Sequence[int] = ()) -> None:
    """Weights and config.json of a random model; with ids of ``text`` one that is fluent
    (:func:`make_fluent`).
    """
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    config = M2M100Config(vocab_size=rows, dropout=0.0, **CONFIG)
    save_random(M2M100ForConditionalGeneration, config, folder, 4, text)


def save_random(kind: Any, config: Any, folder: Path, seed: int = 7, text: Sequence[int] = ()) -> None:
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    model = kind(config)
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if getattr(module, "is_sparse", False):  # what all tokens have in common would make them choose alike
            torch.nn.init.zeros_(module.ff_layer_norm.bias)
            torch.nn.init.ones_(module.ff_layer_norm.weight)
    if text:
        make_fluent(model, text)
    model.generation_config = GenerationConfig(**{name: getattr(model.config, name) for name in SPECIAL_IDS})
    model.save_pretrained(folder)


@torch.no_grad()
def make_fluent(model: Any, text: Sequence[int], ending: float = 60.0) -> None:
    """Make a random model translate like a trained one: into ``text`` and nothing else, differently for each
    source and language, and with an end that grows likelier from the tenth token on.
    """
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)  # what layers find in the source reaches the output
    norm, embedding = model.model.decoder.layer_norm, model.model.shared.weight
    embedding *= 0.3  # a token is followed by others than itself
    norm.weight *= 8
    norm.weight[0], norm.bias[0] = 0.0, 80.0  # the first value of an embedding becomes a bias of its logit
    embedding[:, 0] = -0.3
    embedding[torch.tensor(text), 0] = embedding[2, 0] = 0.0
    half = embedding.shape[1] // 2
    slow = round((half - 1) * 0.286)  # a sine with a period of some 90 tokens
    position = [slow, slow + half]  # and its cosine, to which no layer may add
    embedding[:, position] = 0.0
    embedding[2, position] = torch.tensor([1.0, -1.0])
    norm.weight[position], norm.bias[position] = ending, 0.0
    for name, linear in model.model.decoder.named_modules():  # of attentions and feed-forwards, experts too
        if name.endswith((".out_proj", ".fc2")):
            linear.weight[position], linear.bias[position] = 0.0, 0.0


def use_chosen_experts() -> None:
    """Mend NLLB-MoE of transformers 5, which reads a mask as numbers of experts: every token would take
    experts 0 and 1.
    """
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    NllbMoeSparseMLP.forward = right_experts


def right_experts(self: Any, hidden_states: torch.Tensor, padding_mask: Any = None) -> torch.Tensor:
    """Give the experts of a layer what they are written for: numbers of experts, and their weights."""
    tokens = hidden_states.flatten(0, 1)
    weights, chosen = self.router(tokens, padding_mask)[1].topk(2, -1)
    out: torch.Tensor = self.experts(tokens, chosen, weights)
    return out.view_as(hidden_states)


def write_m2m(folder: Path, fluent: bool = False) -> None:
    """Ids in another order than the pieces, three pieces without an id and three ids without a piece, eight
    rows for made-up words.
    """
    model = pieces_of("bpe")
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    random.Random(5).shuffle(pieces)
    ids = ["<s>", "<pad>", "</s>", "<unk>", *pieces[:-3], "no_piece", "nor_this", "▁nor_that"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(ids)}))
    spoken = [index for index, piece in enumerate(ids) if index > 3 and piece in pieces]
    write_model(folder, len(ids) + 100 + 8, spoken if fluent else ())


def write_nllb(folder: Path, fluent: bool = False) -> None:
    write_model(folder, write_nllb_vocabulary(folder), range(4, 301) if fluent else ())


def write_nllb_moe(folder: Path, **changed: Any) -> None:
    """Write a random NLLB-MoE of :data:`CONFIG` and :data:`SPARSE`; ``changed`` are keys of
    ``NllbMoeConfig``.
    """
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    rows = write_nllb_vocabulary(folder)
    settings = {"vocab_size": rows, "dropout": 0.0, "attention_dropout": 0.0, **CONFIG, **SPARSE, **changed}
    save_random(NllbMoeForConditionalGeneration, NllbMoeConfig(**settings), folder)


def write_nllb_vocabulary(folder: Path) -> int:
    """Write the vocabulary of an NLLB, and return how many rows its embedding has."""
    (folder / "sentencepiece.bpe.model").write_bytes(pieces_of("bpe"))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"mask_token": "<mask>", "additional_special_tokens": NLLB_CODES})
    )
    return 301 + len(NLLB_CODES) + 1 + 2


def tokenizer_of(folder: Path) -> Any:
    from transformers import M2M100Tokenizer, NllbTokenizer

    if (folder / "vocab.json").exists():
        return M2M100Tokenizer(folder / "vocab.json", folder / "sentencepiece.bpe.model")
    return NllbTokenizer.from_pretrained(folder, additional_special_tokens=NLLB_CODES)


def imported(folder: Path, *overrides: str) -> tuple[Tensors, Any, Vocabulary]:
    tensors, recipe, model = read_huggingface(folder, Asked([*DATA, *overrides]), Path("out"))
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

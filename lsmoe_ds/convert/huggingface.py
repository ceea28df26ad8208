"""A dense model as ``transformers`` loads it: M2M-100 with a fast tokenizer that gives our ids. Written without transformers.

What M2M-100 lacks is made up for exactly: feed-forwards narrower than the widest of their side are filled up with zeros.
H hidden, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import base64
import importlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from lsmoe_ds.config import Recipe, Side
from lsmoe_ds.convert.folder import Stored
from lsmoe_ds.convert.tensors import Entry, Tensors, save_tensors
from lsmoe_ds.data.batching import DirectionIds, collate
from lsmoe_ds.data.cleaning import INVISIBLE
from lsmoe_ds.data.vocabulary import SPECIALS, Vocabulary, parse_model
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import write_json
from lsmoe_ds.inference.beam_search import Hypothesis, Search, never_generated
from lsmoe_ds.languages import BOS, EOS, PAD, UNK, Direction, Languages, tag
from lsmoe_ds.model.guide import Route

POSITIONS = 1024  # transformers makes further ones when they are needed
EMBEDDING = ("embedding.tokens.weight", "model.shared.weight")
PARTS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "cross_attention.query": "encoder_attn.q_proj",
    "cross_attention.key": "encoder_attn.k_proj",
    "cross_attention.value": "encoder_attn.v_proj",
    "cross_attention.output": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
    "feed_forward.expand": "fc1",
    "feed_forward.contract": "fc2",
    "feed_forward_norm": "final_layer_norm",
}
"""Parts of a layer, by our name."""

SPACE = "\u2581"
LESS_THAN = "\u2060"
"""Stands for ``<`` in the pieces of the tokenizer: no text holds this invisible character once it is normalized, and without a
``<`` no text spells a tag."""


def write_files(folder: Path, tensors: Mapping[str, Tensor], recipe: Recipe, vocabulary: Path) -> list[str]:
    """The writer of the kind ``huggingface``; raises UserError if the tensors or the vocabulary are not the recipe's."""
    loaded = Vocabulary.load(vocabulary)
    model = config(recipe, loaded.size)
    names = save_tensors(rename(tensors, recipe, loaded.size), folder)
    written = {
        "config.json": model,
        "generation_config.json": generation_config(recipe, loaded),
        "tokenizer.json": tokenizer(loaded, vocabulary.read_bytes(), recipe.languages.directions[0].target, recipe.data.vocabulary.type),
        "tokenizer_config.json": tokenizer_config(recipe),
        "special_tokens_map.json": special_tokens(),
    }
    for name, value in written.items():
        write_json(folder / name, value)
    return [*names, *written]


def widest(side: Side) -> int:
    return max(side.width(layer) for layer in range(side.layers))


def config(recipe: Recipe, vocabulary: int) -> dict[str, Any]:
    """``config.json`` of M2M-100."""
    model, encoder, decoder = recipe.model, recipe.model.encoder, recipe.model.decoder
    return {
        "architectures": ["M2M100ForConditionalGeneration"],
        "model_type": "m2m_100",
        "is_encoder_decoder": True,
        "vocab_size": vocabulary,
        "d_model": model.hidden,
        "encoder_layers": encoder.layers,
        "encoder_attention_heads": model.heads,
        "encoder_ffn_dim": widest(encoder),
        "decoder_layers": decoder.layers,
        "decoder_attention_heads": model.heads,
        "decoder_ffn_dim": widest(decoder),
        "activation_function": "relu",
        "scale_embedding": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": max(POSITIONS, longest_translation(recipe) + 2),
        "dropout": recipe.training.dropout,
        "attention_dropout": recipe.training.attention_dropout,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before version 5
    }


def longest_translation(recipe: Recipe) -> int:
    """The most tokens that we generate for the longest source, EOS not counted."""
    return int(Search().limits(torch.tensor(recipe.data.batch.max_length)))


def generation_config(recipe: Recipe, vocabulary: Vocabulary) -> dict[str, Any]:
    """Our search (see lsmoe_ds/inference/beam_search.py); ``renormalize_logits``: what is never generated has no probability."""
    return {
        "num_beams": Search().beam,
        "length_penalty": Search().length_penalty,
        "early_stopping": True,
        "min_new_tokens": 1,  # beside EOS
        "max_new_tokens": longest_translation(recipe) + 1,
        "suppress_tokens": sorted(never_generated(vocabulary)),
        "renormalize_logits": True,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
    }


# Weights.


def their_name(name: str) -> str | None:
    """Name of one of our tensors in M2M-100; None for one that it lacks."""
    if name == EMBEDDING[0]:
        return EMBEDDING[1]
    if found := re.fullmatch(r"(encoder|decoder)_norm\.(weight|bias)", name):
        return f"model.{found[1]}.layer_norm.{found[2]}"
    found = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None or found[3] not in PARTS:
        return None
    return f"model.{found[1]}.layers.{found[2]}.{PARTS[found[3]]}.{found[4]}"


def our_names(recipe: Recipe) -> Iterator[str]:
    """Names of all tensors of a dense model."""
    yield EMBEDDING[0]
    for side, layers in (("encoder", recipe.model.encoder.layers), ("decoder", recipe.model.decoder.layers)):
        for kind in ("weight", "bias"):
            yield f"{side}_norm.{kind}"
            for part in PARTS:
                if side == "decoder" or not part.startswith("cross_"):
                    yield from (f"{side}.{layer}.{part}.{kind}" for layer in range(layers))


def rename(tensors: Mapping[str, Tensor], recipe: Recipe, vocabulary: int) -> Tensors:
    """The tensors under M2M-100's names, feed-forwards [F, H] filled up with zeros to the widest of their side."""
    wanted, ours = set(our_names(recipe)), Tensors.of(tensors)
    if odd := sorted(wanted ^ ours.keys()):
        raise UserError(f"the weights do not belong to the recipe: {odd[0]} is {'missing' if odd[0] in wanted else 'not a part of it'}")
    if ours.shape(EMBEDDING[0])[0] != vocabulary:
        raise UserError(f"the weights are of {ours.shape(EMBEDDING[0])[0]} tokens, but the vocabulary has {vocabulary}")
    widths = {"encoder": widest(recipe.model.encoder), "decoder": widest(recipe.model.decoder)}
    renamed = {}
    for name in ours:
        theirs = their_name(name)
        assert theirs is not None
        renamed[theirs] = _widened(ours, name, widths.get(name.split(".")[0], 0))
    return Tensors(renamed)


def _widened(tensors: Tensors, name: str, width: int) -> Entry:
    """Of a feed-forward the tensor with zeros up to ``width``; any other as it is."""
    shape = list(tensors.shape(name))
    dimension = 0 if "feed_forward.expand" in name else 1 if name.endswith("feed_forward.contract.weight") else None
    if dimension is None or shape[dimension] == width:
        return tensors.entries[name]
    missing = width - shape[dimension]
    shape[dimension] = width
    at_end = (0, missing) if dimension == len(shape) - 1 else (0, 0, 0, missing)
    return Entry(tuple(shape), lambda: F.pad(tensors[name], at_end))


# The tokenizer.


def special_tokens() -> dict[str, str]:
    return {name: SPECIALS[index] for name, index in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD), ("unk_token", UNK))}


def tokenizer_config(recipe: Recipe) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens(),
        "model_max_length": recipe.data.batch.max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a tag or </s> that is written in a text is text
    }


def tokenizer(vocabulary: Vocabulary, model: bytes, target: str, kind: str = "unigram") -> dict[str, Any]:
    """``tokenizer.json`` of a vocabulary (``model`` is its sentencepiece model): a source is the tag of ``target``, the pieces, EOS.

    The normalizer is :func:`lsmoe_ds.data.cleaning.clean_text` and sentencepiece's own treatment of spaces.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tags = [tag(code) for code in vocabulary.codes]
    silent = (*SPECIALS, *(vocabulary.tag_id(code) for code in vocabulary.codes), *vocabulary.unused)
    special = {index: processor.id_to_piece(index) for index in silent}
    pieces = [special.get(index) or processor.id_to_piece(index).replace("<", LESS_THAN) for index in range(vocabulary.size)]
    head = tag(target)
    assert head in tags
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for index, piece in special.items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(parse_model(model).normalizer_spec.precompiled_charsmap))},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(head), {"Sequence": {"id": "A", "type_id": 0}}, _special(SPECIALS[EOS])],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                piece: {"id": piece, "ids": [index], "tokens": [piece]}
                for piece, index in ((head, vocabulary.tag_id(target)), (SPECIALS[EOS], EOS))
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace(SPACE, " "),
                _replace(LESS_THAN, "<"),
                {"type": "Fuse"},
                _replace(" +", " ", regex=True),
                _replace("^ | $", "", regex=True),
            ],
        },
        "model": _bpe(pieces, set(special)) if kind == "bpe" else _unigram(pieces, [processor.get_score(i) for i in range(len(pieces))]),
    }


def _unigram(pieces: list[str], scores: list[float]) -> dict[str, Any]:
    return {"type": "Unigram", "unk_id": UNK, "vocab": list(zip(pieces, scores, strict=True)), "byte_fallback": False}


def _bpe(pieces: list[str], special: set[int]) -> dict[str, Any]:
    """sentencepiece joins whatever makes a piece, the earliest piece first; here each way to make one is listed."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    parts = ids.keys() - {pieces[index] for index in special}
    merges = [
        [piece[:cut], piece[cut:]]
        for index, piece in enumerate(pieces)
        if index not in special
        for cut in range(1, len(piece))
        if piece[:cut] in parts and piece[cut:] in parts
    ]
    return {"type": "BPE", "unk_token": SPECIALS[UNK], "fuse_unk": True, "byte_fallback": False, "vocab": ids, "merges": merges}


def _normalizers(charsmap: bytes) -> Iterator[dict[str, Any]]:
    """``charsmap`` is how sentencepiece normalizes: nothing in our own vocabularies, something in imported ones."""
    spaces = "".join(rf"\x{{{code:x}}}" for code in range(0x10000) if chr(code).isspace())
    yield {"type": "NFC"}
    yield _replace(INVISIBLE.pattern, "", regex=True)
    yield _replace(f"[{spaces}]+", " ", regex=True)
    yield (strip := {"type": "Strip", "strip_left": True, "strip_right": True})
    if charsmap:
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
        yield _replace(" +", " ", regex=True)
        yield strip
    yield _replace("<", LESS_THAN)
    # As sentencepiece: a space in front of what is not empty, spaces made visible, and none at the end.
    yield {"type": "Prepend", "prepend": SPACE}
    yield _replace(" ", SPACE)
    yield _replace(f"{SPACE}+$", "", regex=True)


def _replace(pattern: str, content: str, regex: bool = False) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex" if regex else "String": pattern}, "content": content}


def _special(piece: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": 0}}


# The check.


@dataclass(frozen=True)
class Exported:
    """A folder of the kind ``huggingface`` in transformers, on the CPU; see :class:`lsmoe_ds.inference.engine.Engine`."""

    model: Any
    tokenizer: Any
    recipe: Recipe
    vocabulary: Vocabulary
    languages: Languages
    step: int
    home: Path
    route: Route = "specific"
    device: str = "cpu"

    @classmethod
    def load(cls, stored: Stored) -> Exported:
        """As anybody would load it; needs transformers."""
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        model = transformers.M2M100ForConditionalGeneration.from_pretrained(stored.home).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(stored.home)
        return cls(model, tokenizer, stored.recipe, Vocabulary.load(stored.vocabulary), stored.recipe.languages, 0, stored.home)

    def encode(self, line: str) -> list[int]:
        """Ids of a line by the tokenizer of the folder, without tag and EOS."""
        return list(self.tokenizer(line)["input_ids"][1:-1])

    def logits(self, source: Tensor, decoder_input: Tensor) -> Tensor:
        """Teacher-forced logits [B, T, V]; those at padding mean nothing."""
        found: Tensor = self.model(input_ids=source, attention_mask=source != PAD, decoder_input_ids=decoder_input).logits
        return found

    def search(self, sources: Sequence[Sequence[int]], direction: Direction, search: Search) -> list[Hypothesis]:
        """By the folder's own settings, but for the beam and the greatest length, which is ours for each sentence."""
        number = self.languages.direction_id(direction)
        batch = collate(sources, None, [number] * len(sources), DirectionIds.of(self.languages, self.vocabulary))
        limits = search.limits((batch.source != PAD).sum(1))

        def end(tokens: Tensor, scores: Tensor) -> Tensor:
            """Nothing but EOS where the greatest length is reached; tokens [B W, positions], scores [B W, V]."""
            over = (limits < tokens.shape[1]).repeat_interleave(search.beam)
            ends = scores[over, EOS]
            scores = scores.masked_fill(over[:, None], -math.inf)
            scores[over, EOS] = ends
            return scores

        # An end that is forced has its own probability, so it comes after the normalization, which generate would do last.
        transformers: Any = importlib.import_module("transformers")
        processors = transformers.LogitsProcessorList([transformers.LogitNormalization(), end])
        found = self.model.generate(
            input_ids=batch.source,
            attention_mask=batch.source != PAD,
            num_beams=search.beam,
            length_penalty=search.length_penalty,
            max_new_tokens=int(limits.max()) + 1,
            logits_processor=processors,
            renormalize_logits=False,
        )
        return [Hypothesis(_until_eos(row[1:]), math.nan) for row in found.tolist()]


def _until_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens

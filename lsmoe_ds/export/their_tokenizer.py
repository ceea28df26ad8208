"""Write the original tokenizer of an imported model beside its export: M2M100Tokenizer or NllbTokenizer.

Both put the tag of the source language before a source (``data.tags: source-target``). An imported vocabulary
keeps its ids, so for all text these files are equivalent to the original ones.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sentencepiece

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.vocabulary import SPECIALS, UNUSED, Vocabulary, parse_model
from lsmoe_ds.export.their_vocabulary import M2M_100_LANGUAGES, PIECE_IDS, SENTENCEPIECE
from lsmoe_ds.export.tokenizer import SPACE, added_tokens, bpe, special_tokens, template
from lsmoe_ds.languages import UNK

MASK = "<mask>"
NLLB = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")


@dataclass(frozen=True)
class Style:
    """A tokenizer class and its names of languages, by our code: ``languages`` are values of its
    ``src_lang``, ``tokens`` their tags.
    """

    tokenizer_class: Literal["M2M100Tokenizer", "NllbTokenizer"]
    languages: Mapping[str, str]
    tokens: Mapping[str, str]


def style_of(vocabulary: Vocabulary, recipe: Recipe) -> Style | None:
    """Return the style of the model's original tokenizer; None if it cannot be written, because the model was
    not imported, uses tags differently, or has further languages.
    """
    tokens = vocabulary.their_tags
    if recipe.data.tags != "source-target" or not tokens or not {*recipe.languages.codes} <= tokens.keys():
        return None
    ids = [vocabulary.tag_id(code) for code in tokens]
    if list(tokens.values()) == [f"__{code}__" for code in M2M_100_LANGUAGES.split()] and ids == list(
        range(ids[0], ids[0] + len(ids))
    ):
        return Style("M2M100Tokenizer", {code: token.strip("_") for code, token in tokens.items()}, tokens)
    if all(NLLB.fullmatch(token) for token in tokens.values()) and vocabulary.type == "bpe":
        return Style("NllbTokenizer", tokens, tokens)
    return None


def files_of(style: Style, vocabulary: Vocabulary, model: bytes, recipe: Recipe) -> dict[str, Any]:
    """Return the files of the tokenizer by name, as JSON values or bytes. ``model`` is the vocabulary's
    sentencepiece model.
    """
    first = recipe.languages.directions[0]
    tags = list(style.tokens.values())
    written: dict[str, Any] = {
        "special_tokens_map.json": {**special_tokens(), "additional_special_tokens": tags},
        "tokenizer_config.json": {
            "tokenizer_class": style.tokenizer_class,
            **special_tokens(),
            "additional_special_tokens": tags,
            "src_lang": style.languages[first.source],
            "tgt_lang": style.languages[first.target],
            "model_max_length": recipe.data.batch.max_length,
            "clean_up_tokenization_spaces": False,
        },
    }
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(vocabulary.size)]
    if style.tokenizer_class == "M2M100Tokenizer":
        named = pieces[: min(vocabulary.tag_id(code) for code in style.tokens)]
        return {
            **written,
            PIECE_IDS: {piece: index for index, piece in enumerate(named)},
            SENTENCEPIECE: _published(model),
        }
    # The model fixes the ids of all pieces, including tags, so that no class numbers them itself.
    special = dict(enumerate(SPECIALS.values())) | {
        vocabulary.tag_id(code): token for code, token in style.tokens.items()
    }
    silent = special | {index: pieces[index] for index in vocabulary.unused}
    free = [index for index in vocabulary.unused if pieces[index].startswith(UNUSED)]
    if MASK not in silent.values() and free:  # otherwise the class adds it, with an id beyond the embedding
        silent[free[0]] = MASK
    charsmap = parse_model(model).normalizer_spec.precompiled_charsmap
    normalizers = (
        [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}]
        if charsmap
        else []
    )
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(silent),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*normalizers, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
        },
        "pre_tokenizer": spaces,
        "post_processor": template(style.tokens[first.source], vocabulary.tag_id(first.source)),
        "decoder": spaces,
        "model": bpe(
            [silent.get(index, piece) for index, piece in enumerate(pieces)],
            [processor.get_score(index) for index in range(len(pieces))],
            set(silent),
        ),
    }
    return {"tokenizer.json": made, **written}


def _published(model: bytes) -> bytes:
    """Return a vocabulary as it was before the import: <unk>, <s>, </s>, then pieces of text."""
    proto = parse_model(model)
    kinds = type(proto).SentencePiece
    text = [piece for index, piece in enumerate(proto.pieces) if index != UNK and piece.type != kinds.CONTROL]
    head = {"<unk>": kinds.UNKNOWN, "<s>": kinds.CONTROL, "</s>": kinds.CONTROL}
    pieces = [*(kinds(piece=name, score=0.0, type=kind) for name, kind in head.items()), *text]
    spec = proto.trainer_spec
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    spec.vocab_size = len(pieces)
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    spec.unk_piece, spec.bos_piece, spec.eos_piece = head
    del spec.control_symbols[:], spec.accept_language[:]
    return bytes(proto.SerializeToString(deterministic=True))

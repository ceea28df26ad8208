"""Convert our vocabulary to a ``tokenizer.json`` (tokenizers library) that gives the same ids, and back."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sentencepiece

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.cleaning import INVISIBLE
from lsmoe_ds.data.vocabulary import SPECIALS, Vocabulary, parse_model
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import BOS, EOS, PAD, UNK, tag

KINDS = {"Unigram": 1, "BPE": 2}  # with sentencepiece's numbers
TAG = re.compile(r"<2[a-z]{2,3}(_[A-Za-z0-9]+)*>")
SPACE = "\u2581"
LESS_THAN = "\u2060"
"""Stands for ``<`` in the pieces of the tokenizer: no text holds this invisible character once it is
normalized, and without a ``<`` no text spells a tag.
"""


def special_tokens() -> dict[str, str]:
    return {
        name: SPECIALS[index]
        for name, index in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD), ("unk_token", UNK))
    }


def tokenizer_config(recipe: Recipe) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens(),
        "model_max_length": recipe.data.batch.max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a tag or </s> that occurs in a text is plain text
    }


def tokenizer(vocabulary: Vocabulary, model: bytes, language: str, kind: str = "unigram") -> dict[str, Any]:
    """Return ``tokenizer.json`` of a vocabulary (``model`` is its sentencepiece model): a source is the tag
    of ``language``, the pieces, EOS.

    The normalizer is :func:`lsmoe_ds.data.cleaning.clean_text` and sentencepiece's own treatment of spaces.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tags = [tag(code) for code in vocabulary.codes]
    silent = (*SPECIALS, *(vocabulary.tag_id(code) for code in vocabulary.codes), *vocabulary.unused)
    special = {index: processor.id_to_piece(index) for index in silent}
    pieces = [
        special.get(index) or processor.id_to_piece(index).replace("<", LESS_THAN)
        for index in range(vocabulary.size)
    ]
    scores = [processor.get_score(index) for index in range(vocabulary.size)]
    head = tag(language)
    assert head in tags
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(special),
        "normalizer": {
            "type": "Sequence",
            "normalizers": list(_normalizers(parse_model(model).normalizer_spec.precompiled_charsmap)),
        },
        "pre_tokenizer": None,
        "post_processor": template(head, vocabulary.tag_id(language)),
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
        "model": bpe(pieces, scores, set(special)) if kind == "bpe" else _unigram(pieces, scores),
    }


def added_tokens(special: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return the ``added_tokens`` of ``tokenizer.json`` for special tokens by id."""
    shape = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": index, "content": piece, **shape} for index, piece in special.items()]


def template(head: str, index: int) -> dict[str, Any]:
    """Return the post-processor that puts the tag ``head``, whose id is ``index``, before a text, and EOS
    after it.
    """
    return {
        "type": "TemplateProcessing",
        "single": [_special(head), {"Sequence": {"id": "A", "type_id": 0}}, _special(SPECIALS[EOS])],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            piece: {"id": piece, "ids": [each], "tokens": [piece]}
            for piece, each in ((head, index), (SPECIALS[EOS], EOS))
        },
    }


def _unigram(pieces: list[str], scores: list[float]) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": UNK,
        "vocab": list(zip(pieces, scores, strict=True)),
        "byte_fallback": False,
    }


def bpe(pieces: list[str], scores: list[float], special: set[int]) -> dict[str, Any]:
    """Return a BPE model that lists every merge that makes a piece.

    sentencepiece has no list: it joins any two neighbors that make a piece, the highest score first.
    """
    ids = {piece: index for index, piece in enumerate(pieces)}
    parts = ids.keys() - {pieces[index] for index in special}
    merges = [
        [piece[:cut], piece[cut:]]
        for index, piece in sorted(enumerate(pieces), key=lambda each: -scores[each[0]])
        if index not in special
        for cut in range(1, len(piece))
        if piece[:cut] in parts and piece[cut:] in parts
    ]
    return {
        "type": "BPE",
        "unk_token": SPECIALS[UNK],
        "fuse_unk": True,
        "byte_fallback": False,
        "vocab": ids,
        "merges": merges,
    }


def _normalizers(charsmap: bytes) -> Iterator[dict[str, Any]]:
    """Yield the normalizers. ``charsmap`` is sentencepiece's own normalization, which only imported
    vocabularies have.
    """
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
    # As sentencepiece does: a space before text that is not empty, visible spaces, and none at the end.
    yield {"type": "Prepend", "prepend": SPACE}
    yield _replace(" ", SPACE)
    yield _replace(f"{SPACE}+$", "", regex=True)


def _replace(pattern: str, content: str, regex: bool = False) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex" if regex else "String": pattern}, "content": content}


def _special(piece: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": 0}}


def is_ours(made: Any) -> bool:
    """Tell whether :func:`tokenizer` made the content of a ``tokenizer.json``, even if another library saved
    it again.
    """
    try:
        added = {token["id"]: token["content"] for token in made["added_tokens"]}
        kind = made["model"]["type"]
    except (KeyError, TypeError):
        return False
    ours = all(added.get(index) == piece for index, piece in SPECIALS.items())
    return ours and kind in KINDS and any(TAG.fullmatch(str(piece)) for piece in added.values())


def read_tokenizer(made: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """Convert a ``tokenizer.json`` to a sentencepiece model that segments text in the same way; return it
    with the id of every piece and token.

    Raises UserError if the file is damaged, or of a kind that sentencepiece lacks.
    """
    try:
        ids = {str(token["content"]): int(token["id"]) for token in made["added_tokens"]}
        model = made["model"]
        if model["type"] not in KINDS or model.get("byte_fallback"):
            kind = model["type"] if model["type"] not in KINDS else "byte fallback"
            raise UserError(
                f"tokenizer.json is of the kind {kind!r}: allowed are {' and '.join(KINDS)} without byte "
                "fallback"
            )
        normalizer = made["normalizer"]
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        charsmap = [each["precompiled_charsmap"] for each in steps if each["type"] == "Precompiled"]
        replaced = any(each == _replace("<", LESS_THAN) for each in steps)
        proto = parse_model(b"")
        pieces = list(_scored_pieces(model))
        if len({piece for _, piece, _ in pieces}) < len(pieces):
            raise ValueError("a piece is there twice")
        for index, piece, score in pieces:
            if piece not in ids and piece not in SPECIALS.values():
                text = piece.replace(LESS_THAN, "<") if replaced else piece
                proto.pieces.add(piece=text, score=score, type=type(proto).SentencePiece.NORMAL)
                ids[text] = index
            ids.setdefault(piece, index)
        proto.trainer_spec.model_type = KINDS[model["type"]]
        proto.normalizer_spec.name = "charsmap" if charsmap else "identity"
        proto.normalizer_spec.precompiled_charsmap = base64.b64decode(charsmap[0]) if charsmap else b""
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"tokenizer.json is damaged: {error}") from None
    return proto, ids


def _scored_pieces(model: dict[str, Any]) -> Iterator[tuple[int, str, float]]:
    """Yield id, piece and score of the pieces of a tokenizer's model. In BPE, pieces of
    earlier merges have higher scores.
    """
    if model["type"] == "Unigram":
        yield from ((index, str(piece), float(score)) for index, (piece, score) in enumerate(model["vocab"]))
        return
    joined: dict[str, int] = {}
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        joined.setdefault(first + second, len(joined))
    yield from (
        (int(index), str(piece), -float(joined.get(piece, len(joined))))
        for piece, index in model["vocab"].items()
    )


def set_specials(proto: Any, tags: Sequence[str]) -> None:
    """Record in a sentencepiece model which pieces are special and which are ``tags``."""
    spec = proto.trainer_spec
    spec.vocab_size = len(proto.pieces)
    spec.bos_id, spec.pad_id, spec.eos_id, spec.unk_id = BOS, PAD, EOS, UNK
    spec.bos_piece, spec.pad_piece, spec.eos_piece, spec.unk_piece = (
        SPECIALS[index] for index in (BOS, PAD, EOS, UNK)
    )
    spec.control_symbols[:] = tags

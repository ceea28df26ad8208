"""M2M-100, NLLB and NLLB-MoE models of Hugging Face as ours; of dense ones :mod:`lsmoe_ds.export.huggingface`
is the reverse.

Weights and segmentation of text stay what they were. A model that we exported, perhaps saved again by
transformers, stays as it was. Of any other the vocabulary is put into our order, and with it the rows of the
embedding. M2M-100 begins a source with the tag of its own language and a translation with the tag of its
language, where we begin a source with the tag of the target language and a translation with nothing: such a
model is a base for training, and translates only after some. H hidden, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lsmoe_ds.checkpoint.m2m_100 import EMBEDDING, our_names, their_name
from lsmoe_ds.checkpoint.stored import RECIPE, VOCABULARY, name_of
from lsmoe_ds.checkpoint.tensors import Entry, Tensors, open_tensors
from lsmoe_ds.config.codes import resolve_codes
from lsmoe_ds.config.explain import Places
from lsmoe_ds.config.file import apply_override, merge, validate
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.vocabulary import SPECIALS, Vocabulary, fill_up, parse_model
from lsmoe_ds.errors import UserError
from lsmoe_ds.export import nllb_moe
from lsmoe_ds.export.tokenizer import is_ours, sentencepiece_model, set_specials
from lsmoe_ds.folders import is_count, read_json
from lsmoe_ds.languages import CODE, UNK, normalize_code, tag
from lsmoe_ds.notices import counted

SENTENCEPIECE, PIECE_IDS = "sentencepiece.bpe.model", "vocab.json"
TIED = (EMBEDDING[1], "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
"""Names under which the one embedding may be stored."""
KINDS = {"m2m_100": "dense M2M-100", nllb_moe.TYPE: "NLLB-MoE of this config.json"}
COMPUTED = re.compile(r"model\.(encoder|decoder)\.embed_positions\.weights")
WIDTHS = ("d_model", "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads", "decoder_layers", "decoder_ffn_dim")
TRAINING = {"steps": 10000, "learning_rate": 1e-4, "warmup": 500}
# The languages of the published M2M-100 in the order of their ids; transformers knows them by heart and need not write them down.
M2M_100 = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu hy id ig ilo "
    "is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru sd si sk sl so sq "
    "sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
)
LANGUAGE = re.compile(r"__(?P<m2m>\w+)__|(?P<nllb>[a-z]{3}_[A-Z][a-z]{3})")


def read_huggingface(folder: Path, overrides: Sequence[str], out: Path) -> tuple[Tensors, Recipe, bytes]:
    """Return tensors by our names, the recipe of a training that starts from them, and the vocabulary, a
    sentencepiece model.

    The recipe says where the model will lie (``out``); ``overrides`` are ``a.b=value`` strings, which must
    say on what it is to be trained. Raises UserError for a folder that is damaged or of another architecture,
    and for overrides that are not possible.
    """
    config = _read_config(folder)
    theirs = _open_weights(folder)
    for side in ("encoder", "decoder"):
        if config[f"{side}_layers"] > len(theirs):  # as good as endless for whatever counts them
            layers, tensors = config[f"{side}_layers"], counted(len(theirs), "tensor")
            raise UserError(f"{folder}: '{side}_layers' in config.json is {layers}, but the folder has {tensors}")
    sparse = config["model_type"] == nllb_moe.TYPE
    if sparse and (experts := nllb_moe.count_experts(config)) > len(theirs):
        tensors = counted(len(theirs), "tensor")
        raise UserError(f"{folder} should have {experts:,} experts by config.json, but has {tensors}")
    model, rows = _vocabulary(folder, config["vocab_size"])
    recipe = _recipe(config, overrides, out, model, _longest(folder))
    names = nllb_moe.names(recipe) if sparse else {name: str(their_name(name)) for name in our_names(recipe)}
    shapes = {names[name]: shape for name, shape in _shapes(recipe, config["vocab_size"], names).items()}
    if odd := sorted(shapes.keys() ^ theirs.keys()):
        no_part = f"has a tensor that no {KINDS[config['model_type']]} has:"
        raise UserError(f"{folder} {'lacks' if odd[0] in shapes else no_part} {odd[0]}")
    for name, shape in shapes.items():
        if theirs.shape(name) != shape:
            raise UserError(f"{folder}: {name} should be {shape} by config.json, found {theirs.shape(name)}")
    entries = {name: theirs.entries[source] for name, source in names.items()}
    if sparse:
        entries = nllb_moe.without_masking(entries, config)
    whole = entries[EMBEDDING[0]]
    entries[EMBEDDING[0]] = Entry((len(rows), whole.shape[1]), lambda: whole.make()[torch.tensor(rows)])
    return Tensors(entries), recipe, model


def _read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``, of NLLB-MoE with the defaults of its routing. Raises UserError if it is of an
    architecture that is not ours.
    """
    config = read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder} is no Hugging Face model: config.json is missing or damaged")
    kind = config.get("model_type")
    if kind not in KINDS:
        only = f"only dense M2M-100 and NLLB models (m2m_100) and NLLB-MoE ({nllb_moe.TYPE}) are imported"
        raise UserError(f"{folder} is of the type {kind!r}: {only}")
    for key, wanted in (("activation_function", "relu"), ("scale_embedding", True), ("tie_word_embeddings", True)):
        if config.get(key, wanted) != wanted:
            raise UserError(f"{folder} has '{key}' {config[key]!r} in config.json: lsmoe_ds has {wanted!r} only")
    for key in ("vocab_size", "decoder_attention_heads", *WIDTHS):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise UserError(f"{folder}: '{key}' in config.json should be a number from 1 to {2**31 - 1}, found {value!r}")
    if config["encoder_attention_heads"] != config["decoder_attention_heads"]:
        raise UserError(
            f"{folder} has {config['encoder_attention_heads']} attention heads in the encoder and {config['decoder_attention_heads']} in "
            f"the decoder: lsmoe_ds has one number for both"
        )
    return {**config, **nllb_moe.routing(config, folder)} if kind == nllb_moe.TYPE else config


def _open_weights(folder: Path) -> Tensors:
    """Open the parameters, the embedding under its first name only. Raises UserError if source, target and
    output do not share it.
    """
    if not any(folder.glob("model*.safetensors*")) and any(folder.glob("pytorch_model*.bin*")):
        raise UserError(
            f"{folder} has its weights in pytorch_model.bin, which could run code: write them as safetensors by "
            f"M2M100ForConditionalGeneration.from_pretrained('{folder}').save_pretrained('{folder}') in transformers"
        )
    entries = {name: entry for name, entry in open_tensors(folder).entries.items() if not COMPUTED.fullmatch(name)}
    embeddings = {name: entries.pop(name) for name in TIED if name in entries}
    if embeddings:
        (first, kept), *others = embeddings.items()
        for name, other in others:
            if other.shape != kept.shape or not torch.equal(other.make(), kept.make()):
                raise UserError(f"{folder} has another matrix in {name} than in {first}: lsmoe_ds has one for source, target and output")
        entries[TIED[0]] = kept
    return Tensors(entries)


def _shapes(recipe: Recipe, vocabulary: int, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of our tensors."""
    model = recipe.model
    hidden, found = model.hidden, {}
    for name in names:
        side = model.encoder if name.startswith("encoder") else model.decoder
        into = side.width(0) if ".contract." in name else hidden
        out = side.width(0) if ".expand." in name else hidden
        if ".router." in name and side.moe is not None:
            out = side.moe.experts
        if name == EMBEDDING[0]:
            shape: tuple[int, ...] = (vocabulary, hidden)
        elif "norm." in name:
            shape = (hidden,)
        else:
            shape = (out, into) if name.endswith("weight") else (out,)
        found[name] = shape
    return found


def _longest(folder: Path) -> int | None:
    """Return the greatest length of a source of a model that we exported, None of any other."""
    made, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json") or {}
    longest = settings.get("model_max_length")
    return longest if made is not None and is_ours(made) and is_count(longest) and 4 <= longest < 2**20 else None


def _recipe(config: Mapping[str, Any], overrides: Sequence[str], out: Path, model: bytes, longest: int | None) -> Recipe:
    """Return the recipe of a training that begins with the model in ``out``."""
    vocabulary = Vocabulary(model)
    training = {**TRAINING, "dropout": config.get("dropout", 0.1), "attention_dropout": config.get("attention_dropout", 0.0)}
    data = {} if longest is None else {"batch": {"max_length": longest}}
    value: dict[str, Any] = {"name": name_of(out), "data": data, "training": training}
    places: Places = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if f"{key}.".startswith(("model.", "data.vocabulary.", "training.start_from.")):
            raise UserError(f"'--set {override}': '{key}' is what the imported model makes it")
        apply_override(value, override, places)
    if not isinstance(value["data"], dict) or not value["data"].get("corpora"):
        raise UserError("nothing says on what the model is to be trained: add --set data.corpora=[NAME] and --set data.languages=[de,fr]")
    if not value["data"].get("languages") and not value["data"].get("directions"):
        raise UserError("nothing says which languages are to be trained: add --set data.languages=[de,fr] or --set data.directions=[en-de]")
    sides = {side: {"layers": config[f"{side}_layers"], "feed_forward": config[f"{side}_ffn_dim"]} for side in ("encoder", "decoder")}
    if config["model_type"] == nllb_moe.TYPE:
        sides = {side: {**section, **nllb_moe.experts(config, side)} for side, section in sides.items()}
    merge(
        value,
        {
            "data": {"vocabulary": {"file": str(out / VOCABULARY), "size": vocabulary.size, "type": vocabulary.type}},
            "model": {"hidden": config["d_model"], "heads": config["encoder_attention_heads"], **sides},
            "training": {"start_from": str(out)},
        },
    )
    if wrong := resolve_codes(value, vocabulary.codes):
        raise UserError(f"'--set {wrong[0]}': {wrong[1]}")
    recipe = validate(Recipe, value, out / RECIPE, places)
    for code in recipe.languages.codes:
        vocabulary.tag_id(code)
    return recipe


# The vocabulary.


def _vocabulary(folder: Path, size: int) -> tuple[bytes, list[int]]:
    """Return our sentencepiece model, and for each of its V pieces the row of the embedding, which has
    ``size``.

    A piece that has no row, and that M2M-100 therefore reads as unknown, gets that of the unknown piece: left
    out it would change how text is cut.
    """
    if (own := _own_vocabulary(folder)) is not None:
        if (pieces := Vocabulary(own).size) != size:
            found = counted(pieces, "piece")
            raise UserError(f"{folder}: the vocabulary has {found}, but 'vocab_size' in config.json is {size}")
        return own, list(range(size))
    proto, ids, languages = _read_tokenizer(folder)
    kinds = type(proto).SentencePiece
    text = [piece for piece in proto.pieces if piece.type not in (kinds.UNKNOWN, kinds.CONTROL)]
    rows = [*(ids[piece] for piece in SPECIALS.values()), *languages.values()]
    rows += [ids.get(piece.piece, ids[SPECIALS[UNK]]) for piece in text]
    if wrong := [row for row in rows if not 0 <= row < size]:
        raise UserError(f"{folder}: a piece has the id {wrong[0]}, but 'vocab_size' in config.json is {size}")
    special = {name: kinds.UNKNOWN if index == UNK else kinds.CONTROL for index, name in SPECIALS.items()}
    tags = [tag(code) for code in languages]
    del proto.pieces[:]
    for name, kind in (special | dict.fromkeys(tags, kinds.CONTROL)).items():
        proto.pieces.add(piece=name, score=0.0, type=kind)
    proto.pieces.extend(text)
    fill_up(proto)
    rows += [ids[SPECIALS[UNK]]] * (len(proto.pieces) - len(rows))
    set_specials(proto, tags)
    return proto.SerializeToString(deterministic=True), rows


def _own_vocabulary(folder: Path) -> bytes | None:
    """Return the sentencepiece model of a folder whose vocabulary is ours already; None if it is not."""
    if (folder / VOCABULARY).is_file():
        Vocabulary.load(folder / VOCABULARY)
        return (folder / VOCABULARY).read_bytes()
    made = read_json(folder / "tokenizer.json")
    try:
        return sentencepiece_model(made) if made is not None and is_ours(made) else None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _read_tokenizer(folder: Path) -> tuple[Any, dict[str, int], dict[str, int]]:
    """Return the sentencepiece model, the row of each piece that has one, and the row of each language by our
    code.

    M2M-100 has rows by vocab.json. NLLB has those of fairseq: the four special pieces in the order that is
    ours too, then the others of the sentencepiece model. Languages come next, unless a file says where.
    """
    path = folder / SENTENCEPIECE
    if not path.is_file():
        only = ", and from tokenizer.json alone none is made: put the published one there" if (folder / "tokenizer.json").exists() else ""
        raise UserError(f"{folder} has no {SENTENCEPIECE}{only}")
    try:
        proto = parse_model(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if (folder / PIECE_IDS).exists():
        ids = read_json(folder / PIECE_IDS) or {}
        if not all(isinstance(row, int) for row in ids.values()) or not ids.keys() >= set(SPECIALS.values()):
            raise UserError(f"{folder / PIECE_IDS} is damaged: it should give ids to pieces, {', '.join(SPECIALS.values())} among them")
        first, known = len(ids), [f"__{code}__" for code in M2M_100.split()]
    else:
        begin = [piece.piece for piece in proto.pieces[:3]]
        if begin != ["<unk>", "<s>", "</s>"]:
            raise UserError(f"{path} begins with {', '.join(begin)}, NLLB's with <unk>, <s>, </s>, and M2M-100 has a {PIECE_IDS} beside it")
        ids = {name: index for index, name in SPECIALS.items()}
        ids |= {piece.piece: index + 1 for index, piece in enumerate(proto.pieces) if index >= 3}
        first, known = len(proto.pieces) + 1, []
    languages: dict[str, int] = {}
    for token, row in _language_rows(folder, first, known).items():
        match = LANGUAGE.fullmatch(token)
        code = normalize_code(match["m2m"] or match["nllb"]) if match else ""
        if CODE.match(code):
            languages.setdefault(code, row)  # of two that are one language to us, the first
    if not languages:
        raise UserError(f"{folder} names no languages: special_tokens_map.json or tokenizer.json of the published model does")
    return proto, ids, languages


def _language_rows(folder: Path, first: int, known: Sequence[str]) -> dict[str, int]:
    """Return the row of each token that may be a language's, in order: by its written id, or else counted
    from ``first``, in the written order or in that of ``known``.
    """
    tokenizer, settings, added, special = (
        read_json(folder / f"{name}.json") or {} for name in ("tokenizer", "tokenizer_config", "added_tokens", "special_tokens_map")
    )
    written: dict[str, int] = {}
    try:
        written |= {str(token["content"]): int(token["id"]) for token in tokenizer.get("added_tokens", [])}
        written |= {str(token["content"]): int(row) for row, token in settings.get("added_tokens_decoder", {}).items()}
        written |= {str(token): int(row) for token, row in added.items()}
        listed = [*_listed(special), *_listed(settings)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is damaged: its tokenizer's files are not understood ({error})") from None
    found = {token: row for token, row in written.items() if LANGUAGE.fullmatch(token)}
    order = list(dict.fromkeys(token for token in listed if LANGUAGE.fullmatch(token)))
    if not order and settings.get("language_codes", "m2m100") == "m2m100":
        order = list(known)
    return found or {token: first + index for index, token in enumerate(order)}


def _listed(settings: Mapping[str, Any]) -> Iterable[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        for token in settings.get(key) or []:
            yield str(token["content"] if isinstance(token, dict) else token)

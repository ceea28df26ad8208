"""Import M2M-100, NLLB and NLLB-MoE models of Hugging Face, the reverse of
:mod:`lsmoe_ds.export.huggingface`.

Weights, segmentation of text (:mod:`lsmoe_ds.export.their_vocabulary`) and tags stay the same, so an imported
model translates as before, and training can start from it. H hidden, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lsmoe_ds.checkpoint.m2m_100 import EMBEDDING, their_names
from lsmoe_ds.checkpoint.stored import RECIPE, VOCABULARY, name_of
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors, open_pickled, open_tensors
from lsmoe_ds.config.codes import resolve_codes
from lsmoe_ds.config.explain import Places
from lsmoe_ds.config.file import apply_override, merge, validate
from lsmoe_ds.config.host import M2M_100, NLLB_MOE, PREFIX, TOKENIZER, check_weights, is_encoder, is_host
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.errors import UserError
from lsmoe_ds.export import nllb_moe
from lsmoe_ds.export.their_vocabulary import read_vocabulary
from lsmoe_ds.export.tokenizer import is_ours
from lsmoe_ds.folders import is_count, read_json
from lsmoe_ds.model.build import outline
from lsmoe_ds.notices import counted

TIED = (
    EMBEDDING[1],
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "lm_head.weight",
)
"""Names under which the one embedding may be stored."""
KINDS = {M2M_100: "dense M2M-100", NLLB_MOE: "NLLB-MoE of this config.json"}
COMPUTED = re.compile(r"model\.(encoder|decoder)\.(embed_positions\.weights|version)")
PICKLED = "pytorch_model"
WIDTHS = (
    "d_model",
    "encoder_layers",
    "encoder_ffn_dim",
    "encoder_attention_heads",
    "decoder_layers",
    "decoder_ffn_dim",
)
OWN = ("vocabulary", "tags")  # keys of `data` that the imported model determines
TRAINING = {"steps": 10000, "learning_rate": 1e-4, "warmup": 500}


@dataclass(frozen=True)
class Asked:
    """The user's settings for the recipe of an imported model: ``a.b=value`` strings of options, or the
    section ``data`` of another recipe with the places of its keys.
    """

    overrides: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    places: Places = field(default_factory=dict)

    def change(self, value: dict[str, Any]) -> Places:
        """Change a recipe in place, and return the places of its keys. Raises UserError unless it then names
        the training data.
        """
        if not self.data:
            return _override(value, self.overrides)
        merge(value, {"data": {key: each for key, each in self.data.items() if key not in OWN}})
        return dict(self.places)


def read_huggingface(folder: Path, asked: Asked, out: Path) -> tuple[Tensors, Recipe, bytes]:
    """Return tensors by our names, the recipe of a training that starts from them, and the vocabulary, a
    sentencepiece model.

    The recipe starts from ``out``, the future folder of the model, and trains on the data that ``asked``
    names. Raises UserError for a folder that is damaged or of another architecture, and for settings that do
    not fit.
    """
    if is_encoder(folder):
        raise UserError(
            f"{folder} holds an encoder, of which nothing is to be imported: name it in a recipe as "
            "'model.huggingface', with 'model.task' tag or answer"
        )
    if (read_json(folder / "config.json") or {}).get("model_type") not in KINDS and is_host(folder):
        return read_host(folder, asked, out)
    config = _read_config(folder)
    theirs = _open_weights(folder)
    for side in ("encoder", "decoder"):
        if config[f"{side}_layers"] > len(theirs):  # counting so many layers would take forever
            layers, tensors = config[f"{side}_layers"], counted(len(theirs), "tensor")
            raise UserError(
                f"{folder}: '{side}_layers' in config.json is {layers}, but the folder has {tensors}"
            )
    sparse = config["model_type"] == NLLB_MOE
    if sparse and (experts := nllb_moe.count_experts(config)) > len(theirs):
        tensors = counted(len(theirs), "tensor")
        raise UserError(f"{folder} should have {experts:,} experts by config.json, but has {tensors}")
    embedding = config["vocab_size"], config["d_model"]
    if TIED[0] in theirs and theirs.shape(TIED[0]) != embedding:  # check before making a piece for each row
        raise UserError(
            f"{folder}: {TIED[0]} should be {embedding} by config.json, found {theirs.shape(TIED[0])}"
        )
    model, rows = read_vocabulary(folder, config["vocab_size"])
    recipe = _recipe(config, asked, out, model, _own_settings(folder))
    names = their_names(recipe, config["model_type"])
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
    entries[EMBEDDING[0]] = LazyTensor((len(rows), whole.shape[1]), lambda: whole.make()[torch.tensor(rows)])
    return Tensors(entries), recipe, model


def _read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``; for NLLB-MoE add the defaults of its routing. Raises UserError for an
    architecture that is not ours.
    """
    config = read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder} is no Hugging Face model: config.json is missing or damaged")
    kind = config.get("model_type")
    if kind not in KINDS:
        only = f"only dense M2M-100 and NLLB models (m2m_100) and NLLB-MoE ({NLLB_MOE}) are imported"
        raise UserError(f"{folder} is of the type {kind!r}: {only}")
    for key, wanted in (
        ("activation_function", "relu"),
        ("scale_embedding", True),
        ("tie_word_embeddings", True),
    ):
        if config.get(key, wanted) != wanted:
            raise UserError(
                f"{folder} has '{key}' {config[key]!r} in config.json: lsmoe_ds has {wanted!r} only"
            )
    for key in ("vocab_size", "decoder_attention_heads", *WIDTHS):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise UserError(
                f"{folder}: '{key}' in config.json should be a number from 1 to {2**31 - 1}, found {value!r}"
            )
    if config["encoder_attention_heads"] != config["decoder_attention_heads"]:
        raise UserError(
            f"{folder} has {config['encoder_attention_heads']} attention heads in the encoder and "
            f"{config['decoder_attention_heads']} in the decoder: lsmoe_ds has one number for both"
        )
    return {**config, **nllb_moe.routing(config, folder)} if kind == NLLB_MOE else config


def _open_weights(folder: Path) -> Tensors:
    """Open the parameters, the embedding under its first name only. Raises UserError if source, target and
    output do not share it.
    """
    pickled = not any(folder.glob("model*.safetensors*")) and any(folder.glob(f"{PICKLED}.bin*"))
    theirs = open_pickled(folder, PICKLED) if pickled else open_tensors(folder)
    entries = {name: entry for name, entry in theirs.entries.items() if not COMPUTED.fullmatch(name)}
    embeddings = {name: entries.pop(name) for name in TIED if name in entries}
    if embeddings:
        (first, kept), *others = embeddings.items()
        for name, other in others:
            if other.shape != kept.shape or not torch.equal(other.make(), kept.make()):
                raise UserError(
                    f"{folder} has another matrix in {name} than in {first}: lsmoe_ds has one for source, "
                    "target and output"
                )
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


def _own_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of ``data`` that a model's files determine: the use of tags, and, for a model that
    we exported, the maximum length of a source.
    """
    made, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json") or {}
    if made is None or not is_ours(made):
        return {"tags": "source-target"}
    given = (read_json(folder / "generation_config.json") or {}).get("forced_bos_token_id")
    found: dict[str, Any] = {"tags": "target" if given is None else "source-target"}
    longest = settings.get("model_max_length")
    return found | ({"batch": {"max_length": longest}} if is_count(longest) and 4 <= longest < 2**20 else {})


def read_host(folder: Path, asked: Asked, out: Path) -> tuple[Tensors, Recipe, bytes]:
    """Return the same as :func:`read_huggingface` for a host, with its own tokenizer (docs/hosts.md)."""
    check_weights(folder)
    training = {**TRAINING, "label_smoothing": 0.0, "dropout": 0.0}
    value: dict[str, Any] = {"name": name_of(out), "data": {}, "training": training}
    places = asked.change(value)
    merge(value, {"model": {"huggingface": str(folder)}, "training": {"start_from": str(out)}})
    if wrong := resolve_codes(value):
        raise UserError(f"'{'' if asked.data else '--set '}{wrong[0]}': {wrong[1]}")
    recipe = validate(Recipe, value, out / RECIPE, places)
    wanted = {name for name, _ in outline(recipe, recipe.data.vocabulary.size).named_parameters()}
    theirs = {f"{PREFIX}{name}": entry for name, entry in open_tensors(folder).entries.items()}
    if lacking := sorted(wanted - theirs.keys()):
        raise UserError(f"{folder} lacks {lacking[0].removeprefix(PREFIX)}")
    entries = {name: theirs[name] for name in sorted(wanted)}
    return Tensors(entries), recipe, (folder / TOKENIZER).read_bytes()


def _override(value: dict[str, Any], overrides: Sequence[str]) -> Places:
    """Apply overrides to a recipe in place, and return the places of its keys. Raises UserError unless it
    then names the training data.
    """
    places: Places = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if f"{key}.".startswith(("model.", "data.vocabulary.", "training.start_from.")):
            raise UserError(f"'--set {override}': '{key}' is what the imported model makes it")
        apply_override(value, override, places)
    if not isinstance(value["data"], dict) or not value["data"].get("corpora"):
        raise UserError(
            "nothing says on what the model is to be trained: add --set data.corpora=[NAME] and --set "
            "data.languages=[de,fr]"
        )
    if not value["data"].get("languages") and not value["data"].get("directions"):
        raise UserError(
            "nothing says which languages are to be trained: add --set data.languages=[de,fr] or --set "
            "data.directions=[en-de]"
        )
    return places


def sizes_of(folder: Path) -> dict[str, Any]:
    """Return the section ``model`` for the model in a folder, from its config.json alone. Raises UserError
    for an architecture that is not ours.
    """
    return _sizes(_read_config(folder))


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    sides = {
        side: {"layers": config[f"{side}_layers"], "feed_forward": config[f"{side}_ffn_dim"]}
        for side in ("encoder", "decoder")
    }
    if config["model_type"] == NLLB_MOE:
        sides = {side: {**section, **nllb_moe.experts(config, side)} for side, section in sides.items()}
    return {"hidden": config["d_model"], "heads": config["encoder_attention_heads"], **sides}


def _recipe(config: Mapping[str, Any], asked: Asked, out: Path, model: bytes, data: dict[str, Any]) -> Recipe:
    """Return the recipe of a training that begins with the model in ``out``."""
    vocabulary = Vocabulary(model)
    training = {
        **TRAINING,
        "dropout": config.get("dropout", 0.1),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }
    value: dict[str, Any] = {"name": name_of(out), "data": data, "training": training}
    places = asked.change(value)
    merge(
        value,
        {
            "data": {
                "vocabulary": {
                    "file": str(out / VOCABULARY),
                    "size": vocabulary.size,
                    "type": vocabulary.type,
                }
            },
            "model": _sizes(config),
            "training": {"start_from": str(out)},
        },
    )
    if wrong := resolve_codes(value, vocabulary.codes):
        raise UserError(f"'{'' if asked.data else '--set '}{wrong[0]}': {wrong[1]}")
    recipe = validate(Recipe, value, out / RECIPE, places)
    for code in recipe.languages.codes:
        vocabulary.tag_id(code)
    return recipe

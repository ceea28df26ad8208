"""What is no model of ours is refused with one sentence, however absurd its files are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.small_huggingface import DATA, imported, shard, write_m2m

from lsmoe_ds.errors import UserError
from lsmoe_ds.export.importing import Asked, read_huggingface


@pytest.fixture(scope="module")
def m2m(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("m2m")
    write_m2m(folder)
    return folder


def in_config(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if value is not ...}, default=str)
        )

    return change


def with_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")

    return rewrite


def writing(name: str, text: str | bytes | None) -> Callable[[Path], None]:
    """Another content of a file; with None it is removed."""

    def write(folder: Path) -> None:
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def pytorch_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def pickled(more: Any) -> Callable[[Path], None]:
    """Weights as torch saves them, beside something that is no tensor."""

    def write(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({**tensors, "more": more}, folder / "pytorch_model.bin")

    return write


def outside(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    shutil.move(folder / "model-00002-of-00002.safetensors", folder.parent / "x.safetensors")
    index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", "../x.safetensors"))


def without_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def tokenizer_json_only(folder: Path) -> None:
    (folder / "sentencepiece.bpe.model").rename(folder / "tokenizer.json")


def without_rows(folder: Path) -> None:
    (folder / "vocab.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "M2M100Tokenizer"}')


def vocabulary_json(**changed: int | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        ids = json.loads((folder / "vocab.json").read_text()) | changed
        (folder / "vocab.json").write_text(
            json.dumps({piece: row for piece, row in ids.items() if row is not None})
        )

    return change


QUERY, LONGEST = "model.decoder.layers.2.encoder_attn.q_proj.weight", "model.decoder.layers.2.fc1.weight"
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (writing("config.json", None), "is no Hugging Face model: config.json is missing"),
    "config is no JSON": (writing("config.json", "{"), "config.json is missing or damaged"),
    "config is a list": (writing("config.json", "[]"), "config.json is missing or damaged"),
    "said to have experts": (
        in_config(model_type="nllb-moe"),
        "lacks model.decoder.layers.0.cross_attention.k_proj.bias",
    ),
    "another model": (in_config(model_type="mbart"), "is of the type 'mbart': only dense M2M-100 and NLLB"),
    "gelu": (
        in_config(activation_function="gelu"),
        "'activation_function' 'gelu' in config.json: lsmoe_ds has 'relu' only",
    ),
    "no scale": (
        in_config(scale_embedding=False),
        "'scale_embedding' False in config.json: lsmoe_ds has True only",
    ),
    "untied": (in_config(tie_word_embeddings=False), "'tie_word_embeddings' False"),
    "untied in fact": (
        with_weights(lambda t: t.update({"lm_head.weight": t["model.shared.weight"] + 1})),
        "another matrix in lm_head",
    ),
    "heads": (in_config(decoder_attention_heads=2), "4 attention heads in the encoder and 2 in the decoder"),
    "no width": (
        in_config(d_model=...),
        "'d_model' in config.json should be a number from 1 to 2147483647, found None",
    ),
    "a word": (
        in_config(encoder_layers="2"),
        "'encoder_layers' in config.json should be a number from 1 to 2147483647, found '2'",
    ),
    "less than none": (in_config(decoder_ffn_dim=-1), "'decoder_ffn_dim' in config.json should be"),
    "hidden": (
        in_config(d_model=10**12),
        "'d_model' in config.json should be a number from 1 to 2147483647, found 1000000000000",
    ),
    "a wide one": (
        in_config(d_model=10**9),
        r"model.shared.weight should be \(409, 1000000000\) by config.json, found \(409, 16\)",
    ),
    "layers": (
        in_config(decoder_layers=10**9),
        r"'decoder_layers' in config.json is 1000000000, but the folder has \d+ tensors",
    ),
    "feed forward": (
        in_config(encoder_ffn_dim=10**9),
        r"fc1.*should be \(1000000000,.* by config.json, found",
    ),
    "vocabulary": (
        in_config(vocab_size=10**9),
        r"model.shared.weight should be \(1000000000, 16\) by config.json, found \(409, 16\)",
    ),
    "few rows": (
        in_config(vocab_size=5),
        r"model.shared.weight should be \(5, 16\) by config.json, found \(409, 16\)",
    ),
    "dropout": (in_config(dropout=7), "training.dropout.*found 7"),
    "one more layer": (
        in_config(decoder_layers=2),
        "has a tensor that no dense M2M-100 has: model.decoder.layers.2",
    ),
    "a layer less": (in_config(decoder_layers=4), "lacks model.decoder.layers.3"),
    "a tensor less": (with_weights(lambda t: t.pop(QUERY)), f"lacks {QUERY}"),
    "no embedding": (with_weights(lambda t: t.pop("model.shared.weight")), "lacks model.shared.weight"),
    "a tensor more": (
        with_weights(lambda t: t.update({"adapter": torch.zeros(2)})),
        "no dense M2M-100 has: adapter",
    ),
    "a narrow tensor": (
        with_weights(lambda t: t.update({LONGEST: torch.zeros(40, 8)})),
        r"fc1.weight should be \(40, 16\) by config",
    ),
    "no pickle": (
        pytorch_only,
        r"pytorch_model.bin is damaged, or holds more than tensors, which could run code: it is not read",
    ),
    "a pickle that runs": (
        pickled(print),
        r"pytorch_model.bin is damaged, or holds more than tensors, which could run code",
    ),
    "a pickled number": (pickled(5), "pytorch_model.bin should hold tensors by name and nothing else"),
    "no weights": (writing("model.safetensors", None), "model.safetensors is missing"),
    "damaged weights": (writing("model.safetensors", b"\xff" * 40), "model.safetensors is damaged"),
    "a shard elsewhere": (outside, "names the file '../x.safetensors': only safetensors files beside it"),
    "a shard less": (without_shard, "model-00002-of-00002.safetensors is missing"),
    "no vocabulary": (
        writing("sentencepiece.bpe.model", None),
        "has neither sentencepiece.bpe.model nor a tokenizer.json$",
    ),
    "tokenizer.json only, damaged": (
        tokenizer_json_only,
        "has neither sentencepiece.bpe.model nor a tokenizer.json$",
    ),
    "damaged vocabulary": (
        writing("sentencepiece.bpe.model", b"\xff\x00"),
        "sentencepiece.bpe.model: the vocabulary is damaged",
    ),
    "damaged ids": (writing("vocab.json", "[1]"), "vocab.json is damaged"),
    "ids that are none": (writing("vocab.json", '{"<s>": "a"}'), "vocab.json is damaged"),
    "no unknown piece": (
        vocabulary_json(**{"<unk>": None}),
        "vocab.json is damaged: it should give ids to pieces, <s>, <pad>",
    ),
    "a special piece elsewhere": (
        vocabulary_json(**{"<s>": -1}),
        "gives <s> the id -1: M2M-100 and NLLB give it 0",
    ),
    "a row below": (vocabulary_json(**{"\u2581": -1}), "a piece has the id -1"),
    "a row above": (vocabulary_json(**{"\u2581": 10**20}), "a piece has the id 100000000000000000000"),
    "neither kind": (writing("vocab.json", None), "names no languages: .*, or for an M2M-100 vocab.json"),
    "an M2M-100 without the rows of its pieces": (
        without_rows,
        "is an M2M-100 without vocab.json, which says which row each piece has",
    ),
    "languages unknown": (
        writing("tokenizer_config.json", '{"language_codes": "wmt21"}'),
        "names no languages",
    ),
    "odd tokens": (
        writing("tokenizer.json", '{"added_tokens": [5]}'),
        "is damaged: its tokenizer's files are not understood",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(m2m, tmp_path, case):
    shutil.copytree(m2m, tmp_path / "folder")
    change, says = CASES[case]
    change(tmp_path / "folder")
    with pytest.raises(UserError, match=says) as error:
        imported(tmp_path / "folder")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), r"add --set data.corpora=\[NAME\]"),
        (DATA[:1], "nothing says which languages are to be trained: add --set data.languages"),
        ((DATA[0], "data.languages=[de,xx]"), "the vocabulary has no tag for 'xx'"),
        (
            (*DATA, "model.hidden=8"),
            "'--set model.hidden=8': 'model.hidden' is what the imported model makes it",
        ),
        ((*DATA, "data.vocabulary.size=99"), "'data.vocabulary.size' is what the imported model makes it"),
        ((*DATA, "training.start_from=x"), "'training.start_from' is what"),
        ((*DATA, "model={}"), "'model' is what"),
        ((*DATA, "data=5"), "nothing says on what"),
        ((*DATA, "training=5"), "'training.steps' is missing"),
        ((*DATA, "training.stepps=5"), "unknown key 'training.stepps'"),
        ((*DATA, "nonsense"), "'--set nonsense' is not understood"),
    ],
)
def test_overrides_that_are_not_possible(m2m, overrides, says):
    with pytest.raises(UserError, match=says) as error:
        read_huggingface(m2m, Asked(overrides), Path("out"))
    assert "\n" not in str(error.value)

"""Models of Hugging Face as ours: the same logits and the same pieces, made here with the classes of
transformers, small and random.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import sentencepiece
import torch
from support.small_huggingface import (
    DATA,
    NLLB_CODES,
    imported,
    pieces_of,
    shard,
    tokenizer_of,
    write_m2m,
    write_nllb,
)
from support.small_run import write_corpus

from lsmoe_ds.checkpoint.m2m_100 import rename
from lsmoe_ds.checkpoint.stored import Weights, find_model, read_weights, write_folder
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.batches import DirectionIds
from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.importing import Asked, read_huggingface
from lsmoe_ds.export.tokenizer import tokenizer, tokenizer_config
from lsmoe_ds.folders import write_json
from lsmoe_ds.inference.load import build_model
from lsmoe_ds.notices import notice
from lsmoe_ds.training import start

WORDS = [
    "Ba",
    "deko",
    "fi",
    "lamé",
    "ｋａ",
    "Ⅳ",
    "½",
    "жа",
    "が",
    "?!",
    "...",
    "12",
    "xyz",
    "日本",
    "dä",
    "naäko",
    "①",
    "(ta)",
]


@pytest.fixture(scope="module")
def m2m(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("m2m")
    write_m2m(folder)
    return folder


@pytest.fixture(scope="module")
def nllb(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nllb")
    write_nllb(folder)
    return folder


def their_ids(folder: Path, vocabulary: Vocabulary) -> list[int]:
    """Their id of each of our pieces, by transformers; of those that it does not know, the unknown
    piece's.
    """
    tokenizer, names = (
        tokenizer_of(folder),
        {vocabulary.tag_id(code): token for code, token in vocabulary.their_tags.items()},
    )
    pieces = [vocabulary._processor.id_to_piece(index) for index in range(vocabulary.size)]
    return [tokenizer.convert_tokens_to_ids(names.get(index, piece)) for index, piece in enumerate(pieces)]


def check_logits(folder: Path, ids: list[int], tensors: Tensors, recipe: Any, vocabulary: Vocabulary) -> None:
    """Check that the imported model and transformers compute the same logits for random tokens.

    ``ids`` has, for each of our tokens, its id in transformers.
    """
    from transformers import M2M100ForConditionalGeneration

    theirs = M2M100ForConditionalGeneration.from_pretrained(folder).eval()
    ours = build_model(recipe, vocabulary.size, Weights(tensors, 0, {}), torch.device("cpu"))
    chosen = random.Random(1)
    sources, targets = (
        [[chosen.randrange(2, vocabulary.size) for _ in range(n)] for n in lengths]
        for lengths in ((9, 4, 7), (5, 8, 2))
    )
    direction = recipe.languages.directions[0]
    batch = DirectionIds.of(recipe.languages, vocabulary, "source-target").collate(
        sources, targets, [recipe.languages.direction_id(direction)] * 3
    )
    table = torch.tensor(ids)
    with torch.inference_mode():
        found = ours.logits(batch.source, batch.decoder_input, batch.ids)
        wanted = theirs(
            input_ids=table[batch.source],
            attention_mask=batch.source != vocabulary.PAD,
            decoder_input_ids=table[batch.decoder_input],
        ).logits[:, :, table]
    real = batch.decoder_input != vocabulary.PAD
    assert wanted[real].std() > 0.1
    assert (found - wanted)[real].abs().max() <= 1e-4


def test_m2m_100(m2m, capfd):
    """Every id is theirs; three pieces that vocab.json lacks, and M2M-100 reads as unknown, come after
    them.
    """
    notice.cache_clear()
    tensors, recipe, vocabulary = imported(m2m)
    assert (
        f"{m2m}: 8 rows of the embedding have no piece in the vocabulary: they stay, as padding"
        in capfd.readouterr().err
    )
    ids = their_ids(m2m, vocabulary)
    assert [vocabulary.their_tags[code] for code in ("de", "en", "fr", "ast")] == [
        "__de__",
        "__en__",
        "__fr__",
        "__ast__",
    ]
    assert [vocabulary.tag_id(code) for code in vocabulary.codes] == list(range(301, 401))
    assert ids[:401] == list(range(401)) and ids[401:] == [3] * (8 + 3 + 4)
    assert {298, 299, 300, *range(401, 409), *range(412, 416)} == {*vocabulary.unused}
    assert vocabulary.size == 416 and recipe.data.tags == "source-target"
    check_logits(m2m, [*range(409), *[3] * 7], tensors, recipe, vocabulary)


def test_nllb(nllb, tmp_path):
    tensors, recipe, vocabulary = imported(nllb)
    assert vocabulary.codes == (
        "ace_Arab",
        "de",
        "en",
        "fr",
        "zh_Hans",
        "zh_Hant",
        "ar",
        "ars",
        "nb",
    )  # of deu and ger the first
    assert [vocabulary.tag_id(code) for code in vocabulary.codes] == list(
        range(301, 310)
    )  # after the pieces, in the order of the list
    assert their_ids(nllb, vocabulary)[:301] == list(range(301)) and vocabulary.size == 320
    check_logits(nllb, [*range(314), *[3] * 6], tensors, recipe, vocabulary)
    # Where ids are written they count: transformers 5 gives <mask> the first of them.
    tokenizer = tokenizer_of(nllb)
    shutil.copytree(nllb, tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    tensors, recipe, vocabulary = imported(tmp_path / "saved")
    for code, theirs in zip(vocabulary.codes, NLLB_CODES[:-1], strict=True):
        assert vocabulary.tag_id(code) == tokenizer.convert_tokens_to_ids(theirs)
    assert vocabulary.tag_id("ace_Arab") == 302 and vocabulary._processor.id_to_piece(301) == "<mask>"
    check_logits(tmp_path / "saved", [*range(314), *[3] * 6], tensors, recipe, vocabulary)
    # A tokenizer.json alone gives the same, to the pieces that text is cut into.
    (tmp_path / "saved" / "sentencepiece.bpe.model").unlink(missing_ok=True)
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    alone, _, same = imported(tmp_path / "saved")
    assert (same.codes, same.their_tags, same.unused) == (
        vocabulary.codes,
        vocabulary.their_tags,
        vocabulary.unused,
    )
    assert all(torch.equal(alone[name], tensors[name]) for name in tensors)
    for line in text():
        assert same.encode(line) == vocabulary.encode(line), line


def text() -> list[str]:
    chosen = random.Random(2)
    lines = [" ".join(chosen.choice(WORDS) for _ in range(chosen.randint(1, 9))) for _ in range(300)]
    return lines + [
        "".join(chosen.choice("bdfklaeiouäéжが .,ﬁ") for _ in range(chosen.randint(1, 30))).strip()
        for _ in range(300)
    ]


@pytest.mark.parametrize("folder", ["m2m", "nllb"])
def test_pieces_are_theirs(folder, request):
    home = request.getfixturevalue(folder)
    vocabulary, tokenizer = imported(home)[2], tokenizer_of(home)
    ids = their_ids(home, vocabulary)
    checked = 0
    for line in text():
        if line and clean_text(line) == line:
            assert [ids[index] for index in vocabulary.encode(line)] == tokenizer(
                line, add_special_tokens=False
            )["input_ids"], line
            checked += 1
    assert checked > 400


def test_a_unigram_model(nllb, tmp_path):
    shutil.copytree(nllb, tmp_path / "unigram")
    model = pieces_of("unigram")
    (tmp_path / "unigram" / "sentencepiece.bpe.model").write_bytes(model)
    _, recipe, vocabulary = imported(tmp_path / "unigram")
    assert recipe.data.vocabulary.type == vocabulary.type == "unigram"
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for line in ("Ba deko fi.", "lamé жа が", "xyz"):
        assert vocabulary._processor.encode(line, out_type=str) == original.encode(line, out_type=str)


@pytest.mark.parametrize("folder", ["m2m", "nllb"])
def test_exported_again(folder, request):
    home = request.getfixturevalue(folder)
    tensors, recipe, vocabulary = imported(home)
    found, wanted = (
        rename(tensors, recipe, vocabulary.size),
        safetensors.torch.load_file(home / "model.safetensors"),
    )
    assert found.keys() == wanted.keys()
    for name in wanted.keys() - {"model.shared.weight"}:
        assert torch.equal(found[name], wanted[name]), name
    rows = len(wanted["model.shared.weight"])
    assert torch.equal(found["model.shared.weight"][:rows], wanted["model.shared.weight"])


def test_the_tokenizer_exported_again(m2m, tmp_path):
    from transformers import AutoTokenizer

    _, recipe, vocabulary = imported(m2m)
    vocabulary.save(tmp_path / "vocabulary.model")
    made = tokenizer(
        vocabulary, (tmp_path / "vocabulary.model").read_bytes(), "de", recipe.data.vocabulary.type
    )
    for name, value in (
        ("tokenizer", made),
        ("tokenizer_config", tokenizer_config(recipe)),
        ("config", {"model_type": "m2m_100"}),
    ):
        write_json(tmp_path / f"{name}.json", value)
    fast, chosen = AutoTokenizer.from_pretrained(tmp_path), random.Random(4)
    words = [*WORDS, "<2de>", "＜", "ﬁ", "ｶﾞ", "…", "a\u0301", "㌔", "´", "¨a", "\u3000"]
    for _ in range(500):
        line = " ".join(chosen.choice(words) for _ in range(chosen.randint(1, 9)))
        assert fast(line)["input_ids"] == [
            vocabulary.tag_id("de"),
            *vocabulary.encode(line),
            vocabulary.EOS,
        ], line


def test_shards_of_half_precision(m2m, tmp_path):
    whole, recipe, _ = imported(m2m)
    shutil.copytree(m2m, tmp_path / "shards")
    shard(tmp_path / "shards")
    tensors, same, _ = imported(tmp_path / "shards")
    assert same == recipe and tensors.keys() == whole.keys()
    for name, value in whole.items():
        assert tensors[name].dtype == torch.float32 and torch.equal(tensors[name], value.half().float()), name


def test_the_embedding_under_other_names_and_computed_positions(m2m, tmp_path):
    shutil.copytree(m2m, tmp_path / "old")
    tensors = safetensors.torch.load_file(m2m / "model.safetensors")
    embedding = tensors.pop("model.shared.weight")
    more = {"lm_head.weight": embedding, "model.decoder.embed_tokens.weight": embedding.clone()}
    more["model.encoder.embed_positions.weights"] = torch.zeros(3, 16)
    safetensors.torch.save_file(tensors | more, tmp_path / "old" / "model.safetensors")
    first, second = imported(m2m)[0], imported(tmp_path / "old")[0]
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_recipe(m2m):
    _, recipe, vocabulary = imported(
        m2m, "training.steps=7", "name=mine", "data.temperature=2", "parallel.tensor=1"
    )
    assert (recipe.model.hidden, recipe.model.heads, recipe.model.decoder.feed_forward) == (16, 4, 40)
    assert (recipe.training.steps, recipe.training.dropout, recipe.name, recipe.data.temperature) == (
        7,
        0.0,
        "mine",
        2,
    )
    assert (recipe.training.start_from, recipe.data.vocabulary.file) == (
        Path("out"),
        Path("out/vocabulary.model"),
    )
    assert (recipe.data.vocabulary.size, recipe.data.vocabulary.type) == (vocabulary.size, "bpe")
    assert imported(m2m)[1].name == "out"


def store(folder: Path, out: Path, *overrides: str) -> None:
    """As the command does it."""
    tensors, recipe, model = read_huggingface(folder, Asked(overrides), out)
    vocabulary = out.parent / "made.model"
    vocabulary.write_bytes(model)
    write_folder(out, tensors, recipe, vocabulary, {"kind": "consolidated", "step": 0})


def test_training_begins_with_it(m2m, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    corpora = 'data.corpora=[{"path": text.tsv, "format": tsv}]'
    store(
        m2m,
        Path("out"),
        corpora,
        DATA[1],
        "data.held_out.dev=5",
        "data.held_out.test=20",
        "training.steps=2",
        "deepspeed={}",
    )
    recipe = load_recipe("out/recipe.yaml")
    data = prepare(recipe)
    assert (data.folder / "vocabulary.model").read_bytes() == Path("out/vocabulary.model").read_bytes()
    start.check(recipe, Path("run"))
    weights = read_weights(find_model("out")).tensors
    wanted = imported(m2m)[0]
    assert weights.keys() == wanted.keys() and all(
        torch.equal(weights[name], wanted[name]) for name in wanted
    )


def test_as_the_command_does_it(m2m, tmp_path):
    record = convert(m2m, "consolidated", None, tmp_path / "base", overrides=DATA)
    made = json.loads((tmp_path / "base" / "provenance.json").read_text())
    assert (made["kind"], made["imported_from"], made["step"]) == ("consolidated", m2m.name, 0)
    found, wanted = read_weights(find_model(tmp_path / "base")).tensors, imported(m2m)[0]
    assert record["parameters"] == wanted.numbers and all(
        torch.equal(found[name], wanted[name]) for name in wanted
    )
    assert load_recipe(tmp_path / "base" / "recipe.yaml").training.start_from == tmp_path / "base"
    assert f"The model `{m2m.name}` of Hugging Face" in (tmp_path / "base" / "README.md").read_text()
    for arguments, says in (
        ({"to": "dense"}, "import it first"),
        ({"to": "consolidated", "average": 2}, "no checkpoints to average"),
        ({"to": "consolidated", "optimizer": True}, "no optimizer's state"),
    ):
        with pytest.raises(UserError, match=says):
            convert(m2m, direction=None, out=tmp_path / "no", **arguments)
    assert not (tmp_path / "no").exists()

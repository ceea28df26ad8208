"""Models that we exported for Hugging Face are read back: as they were written, and after transformers has
saved them again.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversions import ALPHABET, write_dense
from support.small_run import write_corpus

from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.config.data import Vocabulary as VocabularySettings
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.data.vocabulary import Vocabulary, add_tags, train_vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.their_vocabulary import read_vocabulary
from lsmoe_ds.export.tokenizer import is_ours, tokenizer
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate

EN_DE = Direction("en", "de")
LINES = ["ba de fi", "ko la mi nobu", "e\u0301 su", "tabi\u00adrefu", "<2fr> ba </s>"]
TRAINING = ["data.corpora=[{path: text.tsv, format: tsv}]", "data.directions=[en-de]", "training.steps=7"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Write a dense folder, export it, and return the dense folder.

    Its feed-forwards differ in width, so that the export is padded.
    """
    folder = tmp_path_factory.mktemp("own")
    write_corpus(folder)
    write_dense(folder)
    convert(folder / "dense", "huggingface", None, folder / "exported", check=0)
    return folder / "dense"


@pytest.fixture(scope="module")
def saved(dense) -> Path:
    """Load the export in transformers, save it from there, and return the new folder."""
    from transformers import AutoTokenizer, M2M100ForConditionalGeneration

    exported, again = dense.parent / "exported", dense.parent / "saved"
    M2M100ForConditionalGeneration.from_pretrained(exported).save_pretrained(again)
    AutoTokenizer.from_pretrained(exported).save_pretrained(again)
    assert not {"recipe.yaml", "provenance.json", "vocabulary.model"} & {
        path.name for path in again.iterdir()
    }
    return again


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_weights(find_model(folder)).tensors.items())


@pytest.mark.parametrize("kind", ["dense", "consolidated"])
def test_an_export_as_it_is_becomes_what_it_was(dense, tmp_path, kind):
    convert(dense.parent / "exported", kind, None, tmp_path / "back", check=0)
    found, wanted = weights(tmp_path / "back"), weights(dense)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    for name in ("recipe.yaml", "vocabulary.model"):
        assert (tmp_path / "back" / name).read_bytes() == (dense / name).read_bytes(), name
    before, after = (
        json.loads((folder / "provenance.json").read_text()) for folder in (dense, tmp_path / "back")
    )
    assert {key: after[key] for key in ("run", "step", "route")} == {
        key: before[key] for key in ("run", "step", "route")
    }


def test_an_export_is_used_in_place_of_a_run(dense):
    exported = dense.parent / "exported"
    assert list(translate(load(exported, "cpu"), EN_DE, LINES)) == list(
        translate(load(dense, "cpu"), EN_DE, LINES)
    )


def test_damage_to_an_export_is_found(dense, tmp_path):
    shutil.copytree(dense.parent / "exported", tmp_path / "damaged")
    content = bytearray((tmp_path / "damaged" / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "damaged" / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: .*model\.safetensors"):
        load(tmp_path / "damaged", "cpu")


@pytest.mark.parametrize("name", ["saved", "exported"])
def test_an_export_begins_a_training(dense, saved, tmp_path, name):
    """With the tokenizer's file alone, and beside our own vocabulary; it translates at once, by its own
    tags.
    """
    convert(dense.parent / name, "consolidated", None, tmp_path / "base", overrides=TRAINING)
    recipe = load_recipe(tmp_path / "base" / "recipe.yaml")
    assert (recipe.training.steps, recipe.training.start_from) == (7, tmp_path / "base")
    assert recipe.data.batch.max_length == load_recipe(dense / "recipe.yaml").data.batch.max_length
    assert recipe.data.vocabulary.file == tmp_path / "base" / "vocabulary.model"
    assert (recipe.model.encoder.feed_forward, recipe.model.decoder.feed_forward) == (
        48,
        48,
    )  # 24, 48 and 24, 3 x 16, 24, padded
    imported, original = load(tmp_path / "base", "cpu"), load(dense, "cpu")
    found, wanted = weights(tmp_path / "base"), weights(dense)
    for each, value in wanted.items():
        padded = found[each]
        assert torch.equal(padded[tuple(slice(0, size) for size in value.shape)], value), each
        assert padded.count_nonzero() == value.count_nonzero(), each
    for line in LINES:
        assert imported.vocabulary.encode(line) == original.vocabulary.encode(line), line
    assert list(translate(imported, EN_DE, LINES)) == list(translate(original, EN_DE, LINES))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_vocabulary_of_a_tokenizer_is_the_one_that_it_was_made_of(tmp_path, kind):
    chosen = random.Random(1)
    texts = [
        clean_text("".join(chosen.choice(ALPHABET) for _ in range(chosen.randint(1, 30)))) for _ in range(200)
    ]
    texts = [text for text in [*texts, *["ba de ko <2x> größer"] * 20] if text]
    settings = VocabularySettings(size=105, character_coverage=1.0, type=kind)
    trained = train_vocabulary(iter(texts), settings, ["de", "en"])
    model = add_tags(trained._model, ["zh_Hans", "fr"])
    before = Vocabulary(model)
    made = tokenizer(before, model, "de", kind)
    assert is_ours(made)
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    content, rows = read_vocabulary(tmp_path, before.size)
    after = Vocabulary(content)
    assert rows == list(range(before.size)) and not after.their_tags
    assert (after.codes, after.unused, after.size, after.type) == (
        before.codes,
        before.unused,
        before.size,
        kind,
    )
    for index in range(before.size):
        assert after._processor.id_to_piece(index) == before._processor.id_to_piece(index)
        assert after._processor.is_control(index) == before._processor.is_control(index)
    for text in texts:
        assert after.encode(text) == before.encode(text), text
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda made: made["model"].update(vocab=5), "tokenizer.json is damaged"),
        (
            lambda made: made["model"].update(vocab=made["model"]["vocab"] * 2),
            "tokenizer.json is damaged: a piece is there twice",
        ),
        (
            lambda made: made["model"].update(byte_fallback=True),
            "is of the kind 'byte fallback': allowed are Unigram and BPE",
        ),
        (lambda made: made.update(normalizer=None), "tokenizer.json is damaged"),
        (lambda made: made["added_tokens"].clear(), "names no languages"),
    ],
)
def test_a_damaged_tokenizer_is_refused(saved, tmp_path, change: Any, says):
    shutil.copytree(saved, tmp_path / "bad")
    made = json.loads((tmp_path / "bad" / "tokenizer.json").read_text())
    change(made)
    (tmp_path / "bad" / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=says) as error:
        convert(tmp_path / "bad", "consolidated", None, tmp_path / "base", overrides=TRAINING)
    assert "\n" not in str(error.value) and not (tmp_path / "base").exists()

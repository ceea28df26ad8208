"""Folders for transformers: the same ids, the same logits and the same translations as the model that was
converted.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from support.conversions import ALPHABET, PAIR_TOP3, global_weights, random_loaded, with_banks
from support.small_run import PAIR_TOP1, TARGET_TOP2, make_recipe, make_run
from torch import nn
from typer.testing import CliRunner

from lsmoe_ds.checkpoint.m2m_100 import rename, their_names
from lsmoe_ds.checkpoint.stored import find_model, write_folder
from lsmoe_ds.cli import app
from lsmoe_ds.config.data import Vocabulary as VocabularySettings
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.data.vocabulary import Vocabulary, train_vocabulary
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.huggingface import Exported, write_files
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.export.tokenizer import tokenizer, tokenizer_config
from lsmoe_ds.folders import write_json
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import cut_line, translate, translate_tokens
from lsmoe_ds.languages import EOS
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology

EN_DE, EN_FR, FR_EN = Direction("en", "de"), Direction("en", "fr"), Direction("fr", "en")
LINES = ["ba de fi", "ko la mi nobu", "su", "tabi refu", "de de  de ", "<2fr> ba </s>"]


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("huggingface"), TARGET_TOP2, PAIR_TOP1)[0]


def low_rank(run, fuse: bool, route: str) -> Loaded:
    recipe = with_banks(
        make_recipe(run.parent, None, None), {"rank": 3, "at": "both", "fuse_distillation": fuse}
    )
    base = load(run, "cpu")
    model = Transformer(recipe, base.vocabulary.size)
    initialize(model, 7, Topology.single())
    for name, parameter in model.named_parameters():
        if "_low_rank." in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(len(name)))
    return replace(base, model=model.eval(), recipe=recipe, route=route)


def ending(sparse: Loaded) -> Loaded:
    """Make a model likelier to end a sentence and return it.

    An untrained model would write up to the maximum length.
    """
    with torch.no_grad():
        end = sparse.model.embedding.tokens.weight[EOS]
        sparse.model.decoder_norm.bias += 5 * end / end.norm()
    return sparse


def exported(sparse: Loaded, direction: Direction | None, folder) -> Exported:
    tensors, recipe = extract(global_weights(sparse.model), sparse.recipe, direction, sparse.route)
    write_folder(
        folder, tensors, recipe, sparse.home / "vocabulary.model", {"kind": "huggingface"}, write=write_files
    )
    return Exported.load(find_model(folder))


def generated(model: Exported, lines: list[str], target: str = "") -> list[str]:
    """Translate with transformers alone, as a user who does not know this project would."""
    inputs = model.tokenizer(lines, return_tensors="pt", padding=True)
    if target:
        inputs["input_ids"][:, 0] = model.tokenizer.convert_tokens_to_ids(target)
    return model.tokenizer.batch_decode(model.model.generate(**inputs, num_beams=5), skip_special_tokens=True)


def ours(sparse: Loaded, direction: Direction, lines: list[str]) -> list[str]:
    """Our translations, without the sign for unknown pieces, which their tokenizer takes for a special
    token.
    """
    sources = [part for line in lines for part in cut_line(line, sparse)]
    found = translate_tokens(sparse, direction, sources, Search())
    assert all(
        0 < len(best.tokens) < 2 * (len(source) + 2) + 20
        for (best,), source in zip(found, sources, strict=True)
    ), "ends too late"
    return [" ".join(text.replace("⁇", " ").split()) for text in translate(sparse, direction, lines)]


def test_experts_of_unequal_widths(run, tmp_path):
    sparse = ending(random_loaded(run, TARGET_TOP2, PAIR_TOP3))
    model = exported(sparse, EN_DE, tmp_path / "en-de")
    assert (model.model.config.encoder_ffn_dim, model.model.config.decoder_ffn_dim) == (
        48,
        48,
    )  # 24, 48 and 24, 3 x 16, 24
    found = compare(sparse, model, EN_DE, LINES)
    assert found.same == found.sentences == len(LINES)
    assert 0 < found.largest_logit_difference <= 1e-4
    assert generated(model, LINES) == ours(sparse, EN_DE, LINES)
    # Scores too: what is never generated takes no part in the softmax.
    inputs = model.tokenizer(LINES, return_tensors="pt", padding=True)
    theirs = model.model.generate(**inputs, return_dict_in_generate=True, output_scores=True).sequences_scores
    scores = [
        best.score
        for (best,) in translate_tokens(
            sparse, EN_DE, [cut_line(line, sparse)[0] for line in LINES], Search()
        )
    ]
    assert theirs.tolist() == pytest.approx(scores, abs=1e-4)
    # The comparison can fail: another direction is another model.
    other = exported(sparse, EN_FR, tmp_path / "en-fr")
    assert (
        compare(sparse, replace(other, languages=model.languages), EN_DE, LINES).largest_logit_difference
        > 1e-2
    )


def test_low_rank_matrices_of_a_direction(run, tmp_path):
    sparse = low_rank(run, False, "specific")
    found = compare(sparse, exported(sparse, FR_EN, tmp_path / "fr-en"), FR_EN, LINES)
    assert found.same == found.sentences and 0 < found.largest_logit_difference <= 1e-4


def test_the_shared_route_serves_all_directions(run, tmp_path):
    sparse = ending(low_rank(run, True, "shared"))
    model = exported(sparse, None, tmp_path / "all")
    for direction in sparse.languages.directions:
        found = compare(sparse, model, direction, LINES[:3])
        assert found.same == found.sentences and 0 < found.largest_logit_difference <= 1e-4
    assert generated(model, LINES) == ours(sparse, EN_DE, LINES)  # the first direction
    assert generated(model, LINES, "<2fr>") == ours(sparse, EN_FR, LINES) != ours(sparse, EN_DE, LINES)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_are_ours(tmp_path, kind):
    from transformers import AutoTokenizer

    chosen = random.Random(1)
    lines = ["".join(chosen.choice(ALPHABET) for _ in range(chosen.randint(0, 30))) for _ in range(200)]
    lines += [
        "<2de>",
        "<2de> ba",
        "▁",
        "▁▁ ba",
        "ba ▁",
        "",
        " ",
        "\u2060<2de>",
        "a\u0301",
        "ba  ba",
        "ba\tde",
    ]
    texts = [clean_text(text) for text in [*lines[::2], *["ba de ko <2x> größer"] * 20] if clean_text(text)]
    settings = VocabularySettings(size=105, character_coverage=1.0, type=kind)
    vocabulary = train_vocabulary(iter(texts), settings, ["de", "en", "fr"])
    vocabulary.save(tmp_path / "vocabulary.model")
    made = tokenizer(vocabulary, (tmp_path / "vocabulary.model").read_bytes(), "de", kind)
    for name, value in (
        ("tokenizer", made),
        ("tokenizer_config", tokenizer_config(make_recipe(tmp_path, None, None))),
    ):
        write_json(tmp_path / f"{name}.json", value)
    write_json(tmp_path / "config.json", {"model_type": "m2m_100"})
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert fast.is_fast and len(fast) == vocabulary.size
    for line in lines:
        assert fast(line)["input_ids"] == [vocabulary.tag_id("de"), *vocabulary.encode(line), EOS], repr(line)
    for code in vocabulary.codes:
        assert fast.convert_tokens_to_ids(f"<2{code}>") == vocabulary.tag_id(code)
    for _ in range(200):
        ids = [chosen.randrange(4, vocabulary.size) for _ in range(chosen.randint(0, 12))]
        assert fast.decode(ids, skip_special_tokens=True) == " ".join(vocabulary.decode(ids).split()), ids


def test_a_run_to_a_folder_and_a_dense_folder_to_the_same(run, tmp_path):
    (run / "scores.json").unlink(missing_ok=True)
    record = convert(run, "huggingface", EN_DE, tmp_path / "direct", check=6)
    assert record == json.loads((run / "conversion.json").read_text())
    assert record["kind"] == "huggingface" and record["same_translations"] == record["sentences"] == 6
    assert 0 < record["largest_logit_difference"] <= 1e-4
    convert(run, "dense", EN_DE, tmp_path / "dense", check=0)
    before = (run / "conversion.json").read_text()
    again = convert(tmp_path / "dense", "huggingface", None, tmp_path / "again", check=0)
    assert (run / "conversion.json").read_text() == before and not (
        tmp_path / "dense" / "conversion.json"
    ).exists()
    assert {key: again[key] for key in ("direction", "sparse_parameters", "dense_parameters")} == {
        key: record[key] for key in ("direction", "sparse_parameters", "dense_parameters")
    }
    names = [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
        "recipe.yaml",
    ]
    names += ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocabulary.model"]
    assert sorted(path.name for path in (tmp_path / "direct").iterdir()) == names
    # The folder's own settings must not cut a translation that our search would finish: its tokens, and EOS.
    longest = Search().limits(torch.tensor(load_recipe(run / "recipe.yaml").data.batch.max_length))
    assert (
        json.loads((tmp_path / "direct" / "generation_config.json").read_text())["max_new_tokens"]
        == longest + 1
    )
    for name in names[1:4] + names[6:]:
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    provenance = json.loads((tmp_path / "direct" / "provenance.json").read_text())
    assert provenance["kind"] == "huggingface" and set(provenance["files"]) == set(names) - {
        "README.md",
        "provenance.json",
    }
    with pytest.raises(UserError, match="direct is dense: there are no experts to keep"):
        convert(tmp_path / "direct", "hybrid", None, tmp_path / "back")


def test_the_card(run, tmp_path):
    score = {"bleu": 12.34, "chrf": 40.0, "chrfpp": 38.76}
    signatures = {metric: f"{metric}|signed" for metric in score}
    more = {
        "copy": score,
        "sentences": 20,
        "exact": 0,
        "weak": 0,
        "seconds": 1,
        "signatures": signatures,
        "samples": [],
    }
    table = {
        "name": "small",
        "step": 2,
        "split": "test",
        "beam": 5,
        "length_penalty": 1.0,
        "route": "specific",
        "resources": {},
    }
    write_json(
        run / "scores.json",
        table | {"directions": {"en-de": score | more, "en-fr": score | more | {"bleu": 77.7}}},
    )
    convert(run, "huggingface", EN_DE, tmp_path / "en-de", check=0)
    card = (tmp_path / "en-de" / "README.md").read_text()
    for piece in (
        "English to German",
        "12.3 | 38.8 | 20",
        "M2M100ForConditionalGeneration",
        "text.tsv",
        "license unknown",
        "bleu|signed",
    ):
        assert piece in card, piece
    pairs = json.loads((run.parent / "data/prepared/small/manifest.json").read_text())["bitexts"]["de-en"][
        "train"
    ]["pairs"]
    assert f"de-en: {pairs} pairs" in card
    assert "77.7" not in card and str(run.parent) not in card and "{{" not in card and "{%" not in card
    assert "another step" not in card
    write_json(
        run / "scores.json", table | {"step": 1, "directions": {"en-de": score | more, "en-fr": score | more}}
    )
    convert(run, "dense", EN_DE, tmp_path / "dense", check=0)
    assert (
        "They are of another step than this model, which is of step 2."
        in (tmp_path / "dense" / "README.md").read_text()
    )
    (run / "scores.json").unlink()
    convert(run, "dense", EN_DE, tmp_path / "dense", check=0)
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "lsmoe translate FOLDER --from en --to de" in card and "None are known" in card


def test_ctranslate2_through_the_command(run, tmp_path):
    arguments = [
        "convert",
        str(run),
        "--from",
        "en",
        "--to",
        "de",
        "--check",
        "3",
        "--json",
        "--out",
        str(tmp_path / "out"),
    ]
    found = CliRunner().invoke(app, [*arguments, "--as", "ctranslate2", "--quantization", "int8"])
    assert found.exit_code == 0, found.exception
    record = json.loads(found.stdout)
    assert (record["kind"], record["quantization"], record["sentences"]) == ("ctranslate2", "int8", 3)
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["files"].keys() > {
        "model.bin",
        "config.json",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "ctranslate2.Translator" in card
        and "rounded to\nint8" in card
        and "for the rounding, which changes some" in card
    )
    found = CliRunner().invoke(app, [*arguments, "--as", "huggingface", "--quantization", "int8"])
    assert isinstance(found.exception, UserError) and "--quantization is for --as ctranslate2" in str(
        found.exception
    )


def test_without_transformers_it_is_written_but_not_checked(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import fails
    record = convert(run, "huggingface", EN_DE, tmp_path / "out", check=3)
    assert "transformers is not installed" in record["not_checked"] and "sentences" not in record
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_weights_that_are_not_the_recipes(run):
    recipe, vocabulary = make_recipe(run.parent, None, None), Vocabulary.load(run / "vocabulary.model")
    tensors = {name: torch.zeros(vocabulary.size, 16) for name in their_names(recipe)}
    with pytest.raises(UserError, match=r"decoder\.0\.cross_norm\.bias is missing"):
        rename(
            {name: value for name, value in tensors.items() if name != "decoder.0.cross_norm.bias"},
            recipe,
            vocabulary.size,
        )
    with pytest.raises(UserError, match="the weights are of 140 tokens, but the vocabulary has 141"):
        rename(tensors, recipe, vocabulary.size + 1)

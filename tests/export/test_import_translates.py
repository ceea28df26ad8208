"""An imported M2M-100 or NLLB translates as it did in transformers, in every engine, with its own tokenizer
and after it is exported again.
"""

from __future__ import annotations

import ast
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import PROJECT
from support.commands import main
from support.conversions import EN_DE, global_weights, random_model
from support.small_huggingface import shard, tokenizer_of, write_m2m, write_nllb
from support.small_run import write_corpus
from support.snippets import blocks, run
from transformers import AutoTokenizer, M2M100ForConditionalGeneration

from lsmoe_ds.checkpoint.stored import find_model, read_weights, write_folder
from lsmoe_ds.convert.command import convert
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.engine import load_engine
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate_all, translate_tokens
from lsmoe_ds.languages import EOS

NAMES = {
    "m2m": {code: f"__{code}__" for code in ("en", "de", "fr")},
    "nllb": {"en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn"},
}
DIRECTIONS = [Direction(*pair.split("-")) for pair in ("en-de", "de-en", "en-fr", "fr-en", "de-fr", "fr-de")]
CORPUS = ["data.corpora=[none]", f"data.directions=[{','.join(map(str, DIRECTIONS))}]"]
KINDS = ("m2m", "nllb")
ENDS = 3.0


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Per kind the model, its import, and that exported again."""
    root = tmp_path_factory.mktemp("translates")
    for kind, write in zip(KINDS, (write_m2m, write_nllb), strict=True):
        (root / kind).mkdir()
        write(root / kind, fluent=True)
        tokenizer_of(root / kind).save_pretrained(root / kind)
        convert(root / kind, "consolidated", None, root / f"{kind}-base", overrides=CORPUS)
        for to in ("huggingface", "ctranslate2"):
            convert(root / f"{kind}-base", to, None, root / f"{kind}-{to}", check=0)
    return root


def lines() -> list[str]:
    chosen = random.Random(6)
    syllables = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
    return [
        " ".join(
            "".join(chosen.choices(syllables, k=chosen.randint(1, 3))) for _ in range(chosen.randint(1, 6))
        )
        for _ in range(12)
    ]


def in_transformers(
    folder: Path, kind: str, tokenizer: Any, direction: Direction
) -> tuple[list[list[int]], list[str]]:
    """Tokens and texts, in the way that the model's page shows."""
    model = M2M100ForConditionalGeneration.from_pretrained(folder).eval()
    names = NAMES[kind]
    tokenizer.src_lang = direction.source if kind == "m2m" else names[direction.source]
    batch = tokenizer(lines(), return_tensors="pt", padding=True)
    target = tokenizer.convert_tokens_to_ids(names[direction.target])
    found = model.generate(
        **batch, forced_bos_token_id=target, num_beams=5, early_stopping=True, max_new_tokens=40
    )
    rows = [row[: row.index(2, 1)] if 2 in row[1:] else row for row in found.tolist()]
    assert {tuple(row[:2]) for row in rows} == {(2, target)}
    tokens = [row[2:] for row in rows]
    return tokens, tokenizer.batch_decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("direction", DIRECTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_translates_as_transformers(root, kind, direction):
    """With the original tokenizer and with the exported one: before any training, and after the way there and
    back.
    """
    tokens, texts = in_transformers(root / kind, kind, AutoTokenizer.from_pretrained(root / kind), direction)
    assert len({len(each) for each in tokens}) > 1 and len({tuple(each) for each in tokens}) > 6
    exported = root / f"{kind}-huggingface"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert type(tokenizer).__name__ == {"m2m": "M2M100Tokenizer", "nllb": "NllbTokenizer"}[kind]
    assert in_transformers(exported, kind, AutoTokenizer.from_pretrained(root / kind), direction) == (
        tokens,
        texts,
    )
    assert in_transformers(exported, kind, tokenizer, direction) == (tokens, texts)
    engines = [
        load_engine(root / f"{kind}-base"),
        load_engine(exported),
        load_engine(root / f"{kind}-ctranslate2"),
    ]
    for engine in [*engines, Exported.load(find_model(exported))]:
        sources = [engine.vocabulary.encode(line) for line in lines()]
        found = translate_tokens(engine, direction, sources, Search())
        assert [best.tokens for (best,) in found] == tokens, type(engine)
    assert translate_all(engines[0], direction, lines(), Search()) == texts


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_there_and_back_keeps_logits(root, kind):
    first, second = (
        M2M100ForConditionalGeneration.from_pretrained(folder).eval()
        for folder in (root / kind, root / f"{kind}-huggingface")
    )
    generator = torch.Generator().manual_seed(1)
    rows = first.config.vocab_size
    source, target = (torch.randint(4, rows, (3, length), generator=generator) for length in (7, 5))
    with torch.inference_mode():
        wanted, found = (
            model(input_ids=source, decoder_input_ids=target).logits for model in (first, second)
        )
    assert torch.equal(found[:, :, :rows], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_that_transformers_has_saved_is_imported_again(root, tmp_path, kind):
    """From its tokenizer's files alone, without a recipe."""
    M2M100ForConditionalGeneration.from_pretrained(root / f"{kind}-huggingface").save_pretrained(
        tmp_path / "saved"
    )
    AutoTokenizer.from_pretrained(root / f"{kind}-huggingface").save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", "consolidated", None, tmp_path / "again", overrides=CORPUS)
    before, after = load(root / f"{kind}-base", "cpu"), load(tmp_path / "again", "cpu")
    assert after.vocabulary.codes == before.vocabulary.codes and after.recipe.data.tags == "source-target"
    assert after.vocabulary.their_tags == before.vocabulary.their_tags
    for direction in DIRECTIONS[:3]:
        assert translate_all(after, direction, lines(), Search()) == translate_all(
            before, direction, lines(), Search()
        )


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_torch_has_saved(root, tmp_path, sharded):
    shutil.copytree(root / "m2m", tmp_path / "old")
    if sharded:
        shard(tmp_path / "old")
        (tmp_path / "old" / "model.safetensors.index.json").rename(
            tmp_path / "old" / "pytorch_model.bin.index.json"
        )
        index = tmp_path / "old" / "pytorch_model.bin.index.json"
        index.write_text(
            index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        )
    for file in (tmp_path / "old").glob("model*.safetensors"):
        tensors = {name: value.float() for name, value in safetensors.torch.load_file(file).items()}
        if "model.shared.weight" in tensors:
            tensors["lm_head.weight"] = tensors["model.shared.weight"]
            tensors["model.encoder.embed_positions.weights"] = torch.zeros(3, 16)
        if sharded:
            tensors = {name: value for name, value in tensors.items() if name in index.read_text()}
        torch.save(
            tensors, file.with_name(f"pytorch_{file.stem}.bin"), _use_new_zipfile_serialization=not sharded
        )
        file.unlink()
    convert(tmp_path / "old", "consolidated", None, tmp_path / "base", overrides=CORPUS)
    found, wanted = (
        read_weights(find_model(folder)).tensors for folder in (tmp_path / "base", root / "m2m-base")
    )
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name].half().float() if sharded else wanted[name]), name


def test_the_command_translates_between_any_of_its_languages(root, tmp_path, capsys, monkeypatch):
    """Directions that the recipe will not train are translated too; nothing says that the model lacks
    them.
    """
    convert(
        root / "nllb",
        "consolidated",
        None,
        tmp_path / "base",
        overrides=["data.corpora=[none]", "data.languages=[de,fr]"],
    )
    (tmp_path / "lines").write_text("\n".join(lines()) + "\n")
    capsys.readouterr()
    with (tmp_path / "lines").open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert main(["translate", str(tmp_path / "base"), "--from", "de", "--to", "fr"]) == 0
    told = capsys.readouterr()
    _, texts = in_transformers(
        root / "nllb", "nllb", AutoTokenizer.from_pretrained(root / "nllb"), Direction("de", "fr")
    )
    assert told.out.splitlines() == texts and "zero-shot" not in told.err


def card(folder: Path, line: str) -> list[str]:
    """Return the code blocks of a model card, with one line of text filled in."""
    return [
        each.replace("FOLDER", str(folder)).replace('"Text to translate."', repr(line))
        for each in blocks((folder / "README.md").read_text())
    ]


@pytest.mark.parametrize("kind", [*KINDS, "ours"])
def test_the_cards_code_translates(root, own, kind, capsys):
    """In each engine's own words; ``own`` is a model that was never imported, whose tokenizer has our
    tags.
    """
    base, exported = (
        (root / f"{kind}-base", root / f"{kind}-huggingface")
        if kind != "ours"
        else (own / "base", own / "huggingface")
    )
    for line in lines()[:3] if kind != "ours" else ("ba de fi", "ko la mi"):
        use, train = card(exported, line)
        found = run(use, {})
        said = capsys.readouterr().out
        ours = load(base, "cpu")
        last = Direction("en", "fr")
        assert ast.literal_eval(said) == translate_all(ours, last, [line], Search())
        labels = run(train, found)["batch"]["labels"][0]
        assert labels == [ours.vocabulary.tag_id(last.target), *ours.vocabulary.encode("Its translation."), 2]
        ctranslate2 = exported.with_name(exported.name.replace("huggingface", "ctranslate2"))
        run(card(ctranslate2, line)[0], {})
        said = capsys.readouterr().out.strip()
        assert said == translate_all(ours, ours.languages.directions[0], [line], Search())[0]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """Return a folder with a model of our own, which reads the tags of both languages, and its exports."""
    folder = tmp_path_factory.mktemp("own")
    write_corpus(folder)
    made = random_model(folder, None, None)
    with torch.no_grad():  # whatever is cut at its greatest length, CTranslate2 may cut otherwise
        end = made.model.embedding.tokens.weight[EOS]
        made.model.decoder_norm.bias += ENDS * end / end.square().sum()
    recipe = made.recipe.model_copy(
        update={"data": made.recipe.data.model_copy(update={"tags": "source-target"})}
    )
    tensors, recipe = extract(global_weights(made.model), recipe, EN_DE)
    record = {
        "kind": "dense",
        "run": "own",
        "step": 2,
        "direction": "all",
        "route": "specific",
        "sparse_parameters": 1,
    }
    write_folder(folder / "base", tensors, recipe, made.home / "vocabulary.model", record)
    for to in ("huggingface", "ctranslate2"):
        convert(folder / "base", to, None, folder / to, check=0)
    return folder


def test_an_export_of_ones_own_gives_the_same(own, tmp_path):
    """In transformers, in CTranslate2, and read back from what transformers has saved."""
    ours, exported = load(own / "base", "cpu"), Exported.load(find_model(own / "huggingface"))
    direction = ours.languages.directions[0]
    sources = [ours.vocabulary.encode(line) for line in ("ba de fi", "ko la mi nobu", "tabi refu", "ba")]
    search = Search(n_best=3)
    wanted = translate_tokens(ours, direction, sources, search)
    for engine in (exported, load_engine(own / "ctranslate2")):
        found = translate_tokens(engine, direction, sources, search)
        for some, ours_of_it in zip(found, wanted, strict=True):
            assert [each.tokens for each in some] == [each.tokens for each in ours_of_it], type(engine)
    for some, ours_of_it in zip(found, wanted, strict=True):  # CTranslate2's
        assert [each.score for each in some] == pytest.approx([each.score for each in ours_of_it], abs=1e-4)
    exported.model.save_pretrained(tmp_path / "saved")
    exported.tokenizer.save_pretrained(tmp_path / "saved")
    convert(
        tmp_path / "saved",
        "consolidated",
        None,
        tmp_path / "again",
        overrides=["data.corpora=[none]", "data.directions=[en-de]"],
    )
    again = load(tmp_path / "again", "cpu")
    assert again.recipe.data.tags == "source-target" and not again.vocabulary.their_tags
    assert translate_tokens(again, direction, sources, search) == wanted


def test_a_grown_import_keeps_what_it_has_learned(root, tmp_path):
    """A language that its tokenizer's class does not know takes the place of that class: the export has our
    tags.
    """
    convert(
        root / "nllb-base",
        "grown",
        None,
        tmp_path / "grown",
        check=0,
        overrides=["data.languages=[de,fr,cs]", "data.directions=[]"],
    )
    before, after = load(root / "nllb-base", "cpu"), load(tmp_path / "grown", "cpu")
    assert after.vocabulary.their_tags == before.vocabulary.their_tags and after.vocabulary.codes == (
        *before.vocabulary.codes,
        "cs",
    )
    assert translate_all(after, EN_DE, lines(), Search()) == translate_all(before, EN_DE, lines(), Search())
    convert(tmp_path / "grown", "huggingface", None, tmp_path / "exported", check=0)
    exported = Exported.load(find_model(tmp_path / "exported"))
    assert exported.tokenizer.convert_tokens_to_ids("<2cs>") == after.vocabulary.tag_id("cs")
    sources = [exported.encode(line) for line in lines()]
    assert sources == [after.vocabulary.encode(line) for line in lines()]
    new = Direction("en", "cs")
    found = [
        [best.tokens for (best,) in translate_tokens(engine, new, sources, Search())]
        for engine in (after, exported)
    ]
    assert found[0] == found[1]


def test_the_code_of_the_documentation_for_imported_models(root, capsys):
    page = (PROJECT / "docs" / "convert.md").read_text(encoding="utf-8")
    of_dense = page[page.index("## Hugging Face") : page.index("## PEFT")]
    first, (imported,) = blocks(of_dense)[0], [each for each in blocks(of_dense) if "src_lang" in each]
    found = run(first.replace("DIR", str(root / "nllb-huggingface")), {})
    capsys.readouterr()
    run(imported.replace("Ein Satz.", lines()[0]), found)
    wanted = translate_all(load(root / "nllb-base", "cpu"), Direction("de", "fr"), lines()[:1], Search())
    assert ast.literal_eval(capsys.readouterr().out) == wanted

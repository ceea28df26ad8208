"""What no model of transformers can be, or cannot do here, is refused with a sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import main
from support.small_host import LANGUAGES, SIZES, TEXT, host_recipe, host_settings, write_host

from lsmoe_ds.config.data import Prompt
from lsmoe_ds.config.host import check_folder, check_weights, load_pretrained, read_config
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.data.prompts import Prompts
from lsmoe_ds.errors import UserError
from lsmoe_ds.model.host import HostModel

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_host(tmp_path_factory.mktemp("hosts") / "Llama", "Llama")


BAD = [
    ({"model": {"huggingface": "nowhere"}}, "there is no folder nowhere"),
    ({"training": {"packed": True}}, "'training.packed' is not for models of 'model.huggingface'"),
    ({"parallel": {"tensor": 2}}, "'parallel.tensor' is 2 and 'parallel.expert' 1, but a model of"),
    (
        {"data": {"batch": {"max_length": 200, "tokens": 4096}}},
        "allows prompts with answers of 400 tokens, more than the 256",
    ),
    ({"data": {"prompt": {"text": "no source"}}}, "'text' has {source} 0 times: it must have it once"),
    ({"data": {"prompt": {"text": "{source} {target}"}}}, "'text' has {target}, which stands for nothing"),
    (
        {"data": {"vocabulary": {"size": 77}}},
        "'data.vocabulary.size' is 77, but that of 'model.huggingface' is",
    ),
    ({"model": {"hidden": 16}}, "'hidden' is 16, but the model in 'huggingface' has 32"),
    ({"model": {"preset": "transformer-tiny"}}, "'preset' and 'huggingface' are two models"),
    (
        {"model": {"neurons": {"random": 0.5}}},
        "'neurons' has no place in a model of transformers, which can have low_rank",
    ),
    (
        {"model": {"low_rank": {"rank": 2, "index": "modular", "pivot": "it"}}},
        "'low_rank.pivot' is it, which is no language",
    ),
    ({"model": {"task": "causal"}}, "'task' is causal: it must be translate"),
    ({"model": {"low_rank": {"rank": 2, "merge": "learned"}}}, "'merge' is for 'index: modular'"),
    ({"model": {"low_rank": {"rank": 2, "pivot": "de"}}}, "'pivot' is for 'index: modular'"),
    (
        {"model": {"low_rank": {"rank": {"en": 2, "de": 2, "fr": 2}, "index": "modular"}}},
        "'low_rank.rank' names en, the 'pivot', which has no matrices",
    ),
    (
        {"model": {"low_rank": {"rank": 2, "every": 3}}},
        "in layers that 'every: 3' chooses of the model, which has 0 and 2 layers",
    ),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_what_does_not_fit_is_refused_with_a_sentence(llama, tmp_path, changes, said):
    settings = host_settings(tmp_path, llama)
    for section, values in changes.items():
        settings.setdefault(section, {}).update(values)
    with pytest.raises(ValueError) as error:
        Recipe.model_validate(settings)
    assert said in str(error.value)


def test_a_plan_says_that_there_are_no_weights(llama, tmp_path, capsys):
    host = shutil.copytree(llama, tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(host_recipe(tmp_path, host).to_yaml())
    assert main(["plan", str(recipe)]) == 0 and "refuse" not in capsys.readouterr().err
    (host / "model.safetensors").unlink()
    assert main(["plan", str(recipe)]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"lsmoe: training will refuse this model: {host} has no *.safetensors: save")
    assert len(said.splitlines()) == 1


def test_tensors_without_a_place_are_named_in_a_sentence(llama, tmp_path, capsys):
    import transformers

    transformers.utils.logging.set_verbosity_info()
    folder = shutil.copytree(llama, tmp_path / "host")
    tensors = load_file(folder / "model.safetensors") | {"model.extra.weight": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    load_pretrained(folder, "translate", read_config(folder))
    said = "also holds model.extra.weight, which a model for this task does not use: left out"
    assert capsys.readouterr().err == f"lsmoe: {folder} {said}\n"
    assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.ERROR


@pytest.mark.parametrize(("name", "hint"), [("smollm2", True), ("another", False)])
def test_a_folder_that_is_not_there_can_be_fetched_if_it_is_known(tmp_path, name, hint):
    with pytest.raises(UserError, match="there is no folder") as error:
        check_folder(tmp_path / "models" / name)
    assert ("lsmoe data fetch" in str(error.value)) is hint


def test_weights_that_are_missing_or_pickled_are_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "host")
    (tmp_path / "host" / "model.safetensors").rename(tmp_path / "host" / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"has no \*.safetensors, but pytorch_model.bin, which could run any code"
    ):
        check_weights(tmp_path / "host")


def test_what_no_decoder_is_or_cannot_be_read_is_refused(llama, tmp_path):
    import transformers

    folder = shutil.copytree(llama, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 33}))
    with pytest.raises(ValueError, match=r"config.json cannot be read|which cannot translate"):
        host_recipe(tmp_path, folder)
    encoder = shutil.copytree(llama, tmp_path / "bert")
    transformers.BertConfig(**SIZES, vocab_size=300).save_pretrained(encoder)
    with pytest.raises(ValueError, match="which has an encoder: models that are a decoder alone"):
        host_recipe(tmp_path, encoder)
    cut = shutil.copytree(llama, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"the model in .*cut cannot be loaded"):
        HostModel(host_recipe(tmp_path, cut), 200)


def test_an_end_is_one_token(llama):
    tokenizer = HostTokenizer.load(llama / "tokenizer.json")
    for end in ("<|nope|>", ""):
        with pytest.raises(UserError, match=r"'data\.prompt\.end' is .* tokens? of the model's tokenizer"):
            Prompts.of(LANGUAGES, tokenizer, Prompt(text=TEXT, end=end))

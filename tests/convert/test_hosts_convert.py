"""Models of transformers with low-rank matrices, merged into a plain model and as adapters of peft."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.conversions import EN_DE
from support.host_runs import modular, prepared, trained
from support.small_host import END, START, host_recipe, host_settings

from lsmoe_ds.checkpoint.stored import find_model
from lsmoe_ds.config.data import Prompt
from lsmoe_ds.config.host_origin import Origin, origin_of
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.agreement import spread
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.prompts import SOURCE, prompt_text
from lsmoe_ds.directions import Direction, SentenceIds
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.folders import sha256
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.load import load
from lsmoe_ds.model.host import Host
from lsmoe_ds.training.start import check

pytest.importorskip("peft")
DE_FR = Direction("de", "fr")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("host-convert"), "Llama")
    (folder / "host" / "README.md").write_text("---\nlanguage: [en]\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "host" / "LICENSE").write_text("Take it.\n")
    return folder


@pytest.fixture(scope="module")
def run(pool, base):
    return trained(pool, modular(base), base / "run")


@pytest.mark.parametrize(
    ("direction", "route"), [(EN_DE, "specific"), (DE_FR, "outputs-1-3"), (DE_FR, "matrices-1-3")]
)
@pytest.mark.parametrize("kind", ["huggingface", "peft"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_direction_merged(run, direction, route, kind, tmp_path):
    found = convert(run, kind, direction, tmp_path / "out", 6, route)
    assert found["largest_logit_difference"] < 1e-4 and found["same_translations"] == found["sentences"] == 6
    assert "padded_parameters" not in found
    if kind == "peft":
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["r"] == {"specific": 2, "outputs-1-3": 4, "matrices-1-3": 2}[route]
        assert config["task_type"] == "CAUSAL_LM"
        assert Path(config["base_model_name_or_path"]).name == "host", "the base is not written again"


def test_settings_of_the_base_do_not_change_translations(base, run, tmp_path):
    """The folder of a model may say that it samples, or punishes repetitions, and loads as bfloat16."""
    import transformers

    host = shutil.copytree(base / "host", tmp_path / "host")
    given = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    (host / "generation_config.json").write_text(json.dumps(given))
    config = json.loads((host / "config.json").read_text()) | {"dtype": "bfloat16"}
    (host / "config.json").write_text(json.dumps(config))
    overrides = [
        f"data.corpora=[{{path: {base / 'text.tsv'}, format: tsv}}]",
        "data.directions=[en-de]",
        f"data.directory={base / 'data'}",
        "data.batch.max_length=96",
    ]
    trained_model = Host(host_recipe(base, host), 295).host
    assert trained_model.generation_config.repetition_penalty is None, "where dev text is translated"
    texts = ["baden leise", "mud rap baden"]
    wanted = []
    for number, folder in enumerate((base / "host", host)):
        out = tmp_path / f"start-{number}"
        convert(folder, "consolidated", None, out, 0, overrides=overrides)
        loaded = load(out)
        sources = [loaded.vocabulary.encode(text) for text in texts]
        wanted.append([best.tokens for (best,) in loaded.search(sources, EN_DE, Search(beam=2))])
    assert wanted[0] == wanted[1] and len(set(wanted[0][0])) < len(wanted[0][0]), "it repeats itself"
    convert(out, "huggingface", EN_DE, tmp_path / "plain", 0)
    plain = Exported.open(find_model(tmp_path / "plain"))
    found = [best.tokens for (best,) in plain.search(sources, EN_DE, Search(beam=2))]
    assert found == wanted[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype == torch.float32, "as it was written"
    assert model.generation_config.num_beams == 5
    assert not model.generation_config.do_sample and model.generation_config.repetition_penalty is None


def test_every_adapter_is_a_folder(run, tmp_path):
    import peft
    import transformers

    found = convert(run, "peft", None, tmp_path / "out", 8)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
        "host",
        "in-de", "in-fr", "out-de", "out-fr",
    ]  # fmt: skip
    assert found["largest_logit_difference"] < 1e-4 and found["same_translations"] == found["sentences"]
    assert [row["directions"] for row in found["adapters"]] == [["en-de"], ["de-en"], ["en-fr"], ["fr-en"]]
    base = transformers.AutoModelForCausalLM.from_pretrained(run.parent / "host", dtype=torch.float32)
    both = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "in-de", adapter_name="in-de")
    both.load_adapter(tmp_path / "out" / "out-fr", adapter_name="out-fr")
    # Equation 3 is what peft calls a linear combination of adapters side by side.
    both.add_weighted_adapter(["in-de", "out-fr"], [0.25, 0.75], "merged", combination_type="cat")
    both.set_adapter("merged")
    convert(run, "huggingface", DE_FR, tmp_path / "plain", 0, "outputs-1-3")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    tokens = torch.arange(40, 60)[None]
    torch.testing.assert_close(both(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_card_names_base_license_and_what_was_trained(run, tmp_path):
    convert(run, "huggingface", DE_FR, tmp_path / "plain", 0, "outputs-1-3")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "host"
    assert "| base model | host, license: apache-2.0, `host/LICENSE` |" in card
    assert "| trained directions | en-de, de-en, en-fr, fr-en |\n| not trained (zero-shot) | de-fr |" in card
    text = card.partition("## Training data")[2].partition("##")[0]
    assert "- de-en: 285 pairs of sentences\n- en-fr: 285 pairs" in text and "de-fr" not in text
    assert "licenses of its base model and its data" in text
    assert (tmp_path / "plain" / "host" / "LICENSE").read_text() == "Take it.\n"
    convert(run, "consolidated", None, tmp_path / "start", 0)
    more = ["data.directions=[en-de, de-en, en-fr, fr-en, de-fr, en-it, it-en]"]
    convert(tmp_path / "start", "grown", None, tmp_path / "grown", 0, overrides=more)
    card = (tmp_path / "grown" / "README.md").read_text()
    assert "| not trained (zero-shot) | de-fr, en-it, it-en |" in card
    found = convert(tmp_path / "plain", "huggingface", DE_FR, tmp_path / "again", 2)
    assert found["largest_logit_difference"] < 1e-4, "it is read back as it was written"
    assert "(zero-shot) | de-fr |" in (tmp_path / "again" / "README.md").read_text()


def test_a_run_that_started_from_a_model_says_so(pool, base, run, tmp_path):
    convert(run, "consolidated", None, tmp_path / "start", 0)
    recipe = modular(base, steps=2)
    recipe.training.start_from, recipe.training.directions = tmp_path / "start", ["en-de"]
    convert(trained(pool, recipe, tmp_path / "more"), "huggingface", EN_DE, tmp_path / "plain", 0)
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "| trained directions | en-de; training started from start |" in card
    convert(tmp_path / "more", "peft", None, tmp_path / "peft", 0)
    assert (
        "| not trained here | de-en, en-fr, fr-en, de-fr |" in (tmp_path / "peft" / "README.md").read_text()
    )


def test_the_name_and_license_of_a_base(run, tmp_path):
    assert origin_of(run / "host") == Origin("host", "apache-2.0"), "kept in the run"
    for named, told in (("owner/small", "owner/small"), ("/where/it/lay", "lay"), ("", "model")):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"_name_or_path": named}))
        assert origin_of(folder) == Origin(told, None)
    (folder / "PROVENANCE.json").write_text(json.dumps({"license": "MIT"}))
    assert origin_of(folder).license == "MIT"
    for head, license in (("license: other\nlicense_name: own", "own"), ("license: [", "MIT")):
        (folder / "README.md").write_text(f"---\n{head}\n---\n")
        assert origin_of(folder).license == license


def test_no_path_of_the_base_leaves_the_machine(run, tmp_path):
    import transformers

    for out, one, all_of in (
        (tmp_path / "out", "host", "host"),
        (run.parent / "beside", "../host", "../../host"),
    ):
        for direction, name, found in ((EN_DE, "", one), (None, "in-de", all_of)):
            convert(run, "peft", direction, out, 2)
            config = json.loads((out / name / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == found
            card = (out / "README.md").read_text()
            assert str(run.parent) not in card + (out / "provenance.json").read_text()
            assert ("`BASE` is the folder of the base model, host." in card) is (found == "host")
    folder = run.parent / "beside" / "in-de" / found
    transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_the_sentences_to_compare_are_spread_over_directions(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lsmoe_ds.console.LINE_EVERY", 0.0)
    assert convert(run, "consolidated", None, tmp_path / "out", 3)["sentences"] == 3
    assert "lsmoe: comparing both models: 6 of 6 sentences" in capsys.readouterr().err
    assert spread(10, 132).count(1) == 10 == sum(spread(10, 132)) and spread(7, 3) == [2, 2, 3]


def test_a_new_language_leaves_the_files_of_the_others_bit_equal(pool, base, run, tmp_path):
    old = convert(run, "peft", None, tmp_path / "old", 0)
    directions = ["en-de", "de-en", "en-fr", "fr-en", "de-fr", "en-it", "it-en"]
    more = [f"data.directions=[{','.join(directions)}]"]
    convert(run, "grown", None, tmp_path / "grown", 0, overrides=more)
    head, *lines = (base / "text.tsv").read_text().splitlines()
    rows = [f"{head}\tit", *(f"{line}\t{line.split()[0].replace('a', 'o')} {line[:9]}" for line in lines)]
    (tmp_path / "text.tsv").write_text("\n".join(rows) + "\n")
    given = modular(base).model_dump(mode="json", exclude_none=True)
    given["data"] |= {
        "corpora": [{"path": str(tmp_path / "text.tsv"), "format": "tsv"}],
        "directory": str(tmp_path / "data"),
        "directions": directions,
    }
    given["training"] |= {"start_from": str(tmp_path / "grown"), "directions": ["en-it", "it-en"], "steps": 3}
    recipe = Recipe.model_validate(given)
    prepare(recipe)
    check(recipe, tmp_path / "more")
    trained(pool, recipe, tmp_path / "more")
    convert(tmp_path / "more", "peft", None, tmp_path / "new", 0)
    assert {path.name for path in (tmp_path / "new").iterdir()} >= {"in-it", "out-it"}
    learned = load_file(tmp_path / "new" / "in-it" / "adapter_model.safetensors")
    assert all(bool(value.any()) for value in learned.values())
    assert len(old["adapters"]) == 4
    for name in ("in-de", "in-fr", "out-de", "out-fr"):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            before, after = (sha256(tmp_path / which / name / file) for which in ("old", "new"))
            assert before == after, (name, file)


def test_what_no_model_of_transformers_becomes(run, tmp_path):
    for kind in ("dense", "ctranslate2", "hybrid"):
        with pytest.raises(UserError, match=f"--as {kind} is not for models of transformers"):
            convert(run, kind, EN_DE, tmp_path / kind)
    with pytest.raises(UserError, match="the route outputs-1-3 merges adapters: name a direction"):
        convert(run, "peft", None, tmp_path / "peft", route="outputs-1-3")


ODD = [
    "  ba de",
    "ba 123 45",
    "1",
    "ba\u00adde",
    f"x{START}y",
    "Ba\tde\u00a0 fi",
    "e\u0301",
    "日本 ba",
    "don't 3.5",
]


@pytest.mark.parametrize("kind", ["huggingface", "peft"])
def test_the_code_of_a_model_card_translates_as_the_run_does(run, kind, tmp_path, capsys):
    convert(run, kind, EN_DE, tmp_path / "out", 0)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    loaded = load(run)
    line = PreparedData.of(loaded.recipe).text(EN_DE, "test")[0][0]
    code = code.replace("FOLDER", str(tmp_path / "out")).replace('"BASE"', repr(str(run.parent / "host")))
    # This model never ends: a few tokens of greedy search tell.
    code = code.replace('"num_beams": 5, "early_stopping": True', '"num_beams": 1').replace(
        ": 4 * len(text) + 20}", ": 8}"
    )
    exec(code.replace("Text to translate.", line), found := {})
    ((wanted,),) = loaded.search([loaded.vocabulary.encode(line)], EN_DE, Search(beam=1))
    assert capsys.readouterr().out == loaded.vocabulary.decode(wanted.tokens[:8]) + "\n" != "\n"
    # Prompts of other texts have the tokens that the run reads.
    form = form_of(loaded.recipe.data, loaded.languages, loaded.vocabulary)
    number = loaded.languages.direction_id(EN_DE)
    parts = code[code.index("before, after") : code.index("inputs, end")]
    for text in ODD:
        exec(parts.replace('"Text to translate."', repr(text)), found)
        tokens = form.collate([loaded.vocabulary.encode(text)], None, [number]).tokens
        assert found["ids"] == tokens[0].tolist(), text


def test_whole_prompts_have_other_tokens(base):
    """So the test above can fail."""
    prompt = Prompt(text="To {target_language} {source}\n", end=END)
    tokenizer = HostTokenizer.load(base / "host/tokenizer.json")
    first, second = prompt_text(prompt, EN_DE).split(SOURCE)
    apart = [
        [*tokenizer.encode_markup(first), *tokenizer.encode(t), *tokenizer.encode_markup(second)] for t in ODD
    ]
    assert all(
        a != tokenizer.encode_markup(f"{first}{t}{second}") for a, t in zip(apart[:2], ODD, strict=False)
    )


def test_a_prompt_that_the_tokenizer_would_join_with_the_text(pool, base, tmp_path):
    """Folders, and the code of their cards, read the parts apart, after the token that begins a text."""
    host = shutil.copytree(base / "host", tmp_path / "host")
    tokenizer = json.loads((host / "tokenizer.json").read_text())
    (start,) = (each["id"] for each in tokenizer["added_tokens"] if each["content"] == START)
    token = {"SpecialToken": {"id": START, "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [token, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {START: {"id": START, "ids": [start], "tokens": [START]}},
    }
    (host / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = host_settings(base, host, rank=2, index="target", at="attention")
    settings["data"] |= {"name": "joined", "prompt": {"text": "To {target_language} {source}\n"}}
    prepare(recipe := Recipe.model_validate(settings))
    made = trained(pool, recipe, tmp_path / "run")
    record = convert(made, "huggingface", EN_DE, tmp_path / "out", 4)
    assert record["same_translations"] == record["sentences"] == 4
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    assert f"ids = [*encode({START!r}), *encode(before)" in code
    found = {}
    exec(code.replace("FOLDER", str(tmp_path / "out")).replace(": 4 * len(text) + 20}", ": 2}"), found)
    loaded = load(made)
    form = form_of(recipe.data, loaded.languages, loaded.vocabulary)
    source = loaded.vocabulary.encode("Text to translate.")
    wanted = form.collate([source], None, [loaded.languages.direction_id(EN_DE)]).tokens[0].tolist()
    assert found["ids"] == wanted and wanted[0] == start


def test_a_model_is_imported_as_it_is(base, run, tmp_path):
    """For a study of the model itself, or to start from."""
    import transformers

    overrides = [
        f"data.corpora=[{{path: {base / 'text.tsv'}, format: tsv}}]",
        "data.directions=[en-de, de-fr]",
    ]
    overrides += [f"data.directory={base / 'data'}", "data.batch.max_length=96"]
    convert(base / "host", "consolidated", None, tmp_path / "start", overrides=overrides)
    loaded = load(tmp_path / "start")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base / "host", dtype=torch.float32)
    tokens = torch.arange(30, 50)[None]
    none = SentenceIds(*torch.zeros(3, 1, dtype=torch.long))
    torch.testing.assert_close(loaded.model.logits(tokens, none), theirs(tokens).logits)
    assert loaded.parameters == theirs.num_parameters()
    with pytest.raises(UserError, match="nothing says on what the model is to be trained"):
        convert(base / "host", "consolidated", None, tmp_path / "other")

"""An M2M-100 or NLLB as the model of a recipe: it is imported, and trained with what methods add."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.commands import main
from support.small_huggingface import imported, write_m2m, write_nllb, write_nllb_moe
from support.small_run import write_corpus
from support.starts import first_steps

from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.convert.recipes import open_recipe
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.planning.plan import plan
from lsmoe_ds.training import start

EN_DE = Direction("en", "de")
LOW_RANK = {"rank": 2, "index": "pair", "at": "attention"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return the working directory, which holds text, an NLLB model and an M2M-100 model."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    for name, write in (("nllb", write_nllb), ("m2m", write_m2m)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    return tmp_path


def write_recipe(folder: Path, model: dict | None = None, **changed: dict) -> Path:
    value = {
        "name": "tuned",
        "data": {
            "corpora": [{"path": "text.tsv", "format": "tsv"}],
            "languages": ["de", "fr"],
            "held_out": {"dev": 5, "test": 20},
            "batch": {"tokens": 256, "count": 2},
        },
        "model": {"huggingface": "nllb", "low_rank": LOW_RANK} if model is None else model,
        "training": {
            "steps": 4,
            "learning_rate": 0.01,
            "warmup": 1,
            "trainable": "methods",
            "dropout": 0.0,
        },
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    for section, keys in changed.items():
        value[section] |= keys
    file = folder / "tuned.yaml"
    file.write_text(yaml.safe_dump(value))
    return file


@pytest.mark.parametrize("name", ["nllb", "m2m"])
def test_the_model_of_a_recipe_is_imported_once(folder, name, capfd):
    file = write_recipe(folder, {"huggingface": name, "low_rank": LOW_RANK})
    recipe = open_recipe(file)
    assert f"importing {name} as {name}-imported" in capfd.readouterr().err
    assert recipe.model.huggingface is None and recipe.training.start_from == Path(f"{name}-imported")
    assert (recipe.model.hidden, recipe.model.decoder.feed_forward) == (16, 40)
    assert recipe.data.tags == "source-target"
    wanted = imported(folder / name)[0]
    found = read_weights(find_model(f"{name}-imported")).tensors
    assert found.keys() == wanted.keys() and all(torch.equal(found[each], wanted[each]) for each in wanted)
    assert open_recipe(file) == recipe
    assert "imported" not in capfd.readouterr().err

    weights = folder / name / "model.safetensors"
    weights.touch()  # as a copy has another time; it is the same model
    assert open_recipe(file) == recipe and not capfd.readouterr().err
    changed = load_file(weights)
    changed["model.shared.weight"] += 1
    save_file(changed, weights, {"format": "pt"})  # another model under the same name is imported again
    (folder / f"{name}-imported" / "scores").mkdir()
    with pytest.raises(
        UserError, match=f"{name} has changed since it was imported, and {name}-imported holds "
    ):
        open_recipe(file)
    assert "importing" not in capfd.readouterr().err
    (folder / f"{name}-imported" / "scores").rmdir()
    assert open_recipe(file) == recipe
    assert f"{name}-imported is replaced" in capfd.readouterr().err
    shutil.rmtree(folder / name)  # and the imported one is enough
    assert open_recipe(file) == recipe


def test_processes_that_read_a_recipe_at_once_import_its_model_once(folder):
    file = write_recipe(folder)
    program = (
        "from lsmoe_ds.convert.recipes import open_recipe; import sys; print(open_recipe(sys.argv[1]).name)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(file)], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = "".join(process.communicate()[1] for process in started)
    assert [process.returncode for process in started] == [0, 0], said
    assert said.count("importing nllb as") == 1


def test_methods_train_beside_it(pool, folder):
    model = {"huggingface": str(folder / "nllb"), "low_rank": LOW_RANK}
    # Processes of the pool have another working directory.
    recipe = open_recipe(write_recipe(folder, model, data={"directory": str(folder / "data")}))
    prepare(recipe)
    start.check(recipe, Path("run"))
    found, base = pool.run(1, first_steps, recipe, Path("run").resolve())[0], imported(folder / "nllb")[0]
    assert all(torch.equal(torch.from_numpy(found["weights"][name][0]), base[name]) for name in base)
    assert found["losses"][-1] < found["losses"][0]
    assert load_recipe("run/recipe.yaml") == recipe  # complete without the model's folder
    made = plan(recipe).parameters
    assert made.whole.total == base.numbers + sum(
        value[0].size for name, value in found["weights"].items() if name not in base
    )


@pytest.mark.slow
def test_it_is_trained_translates_and_is_served_by_the_commands(folder, capfd):
    from transformers import AutoTokenizer

    file = write_recipe(folder)
    assert main(["data", "prepare", str(file)]) == 0
    # A training owns its process: it installs handlers of signals and a watching thread.
    subprocess.run([sys.executable, "-m", "lsmoe_ds", "train", str(file)], check=True)
    lines = ["ba de fi", "ko la"]
    wanted = list(translate(load("runs/tuned", "cpu"), EN_DE, lines))
    record = convert("runs/tuned", "huggingface", EN_DE, "out", check=4)
    assert record["same_translations"] == record["sentences"] == 4
    assert record["largest_logit_difference"] <= 1e-4
    assert list(translate(load("out", "cpu"), EN_DE, lines)) == wanted
    settings = json.loads(Path("out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "NllbTokenizer"  # that of the model with which training began
    rows = json.loads(Path("out/config.json").read_text())["vocab_size"]
    ids = AutoTokenizer.from_pretrained("out").get_vocab()
    assert max(ids.values()) < rows and "<mask>" in ids  # the class would add <mask> beyond the embedding


@pytest.mark.parametrize(
    ("model", "changed", "says"),
    [
        ({"hidden": 8}, {}, "which decides 'model.hidden': leave that out"),
        ({"preset": "transformer-tiny"}, {}, "which decides 'model.preset'"),
        (
            {},
            {"training": {"start_from": "x"}},
            "leave 'training.start_from' out",
        ),
        ({}, {"data": {"languages": ["de", "xx"]}}, "has no tag for 'xx'"),
        ({}, {"data": {"languages": ["de", "sw"]}}, "has no tag for 'sw'"),
        ({}, {"data": {"corpora": []}}, "'data.corpora'"),
        ({}, {"data": {"prompt": {"text": "{source}"}}}, "'data.prompt.text'"),
        ({}, {"data": {"tags": "target"}}, "which decides 'data.tags': leave that out"),
        ({}, {"training": {"save_every": 2}}, "unknown key 'training.save_every'"),
        ({"huggingface": "nllb/config.json"}, {}, "no folder nllb/config.json"),
        ({"task": "tag"}, {}, "a translation model of the type m2m_100, which is imported first"),
        ({"huggingface": "nowhere"}, {}, "there is no folder nowhere"),
        ({"huggingface": "some/nllb"}, {}, "`hf download some/nllb --local-dir nllb` fetches"),
    ],
)
def test_what_does_not_go_with_it_is_refused(folder, model, changed, says):
    file = write_recipe(folder, {"huggingface": "nllb", "low_rank": LOW_RANK, **model}, **changed)
    with pytest.raises(UserError, match=says) as error:
        open_recipe(file)
    assert "\n" not in str(error.value) and "--set" not in str(error.value)
    assert str(file) in str(error.value)
    assert not (folder / "nllb-imported").exists()  # nothing is written for a recipe that is wrong


def test_the_folder_may_be_the_working_directory(folder, monkeypatch):
    file = write_recipe(folder, {"huggingface": ".", "low_rank": LOW_RANK}).resolve()
    monkeypatch.chdir(folder / "nllb")
    assert open_recipe(file).training.start_from == folder / "nllb-imported"


def test_dropout_is_that_of_the_model_unless_the_recipe_says_another(folder):
    config = json.loads((folder / "nllb" / "config.json").read_text())
    (folder / "nllb" / "config.json").write_text(
        json.dumps(config | {"dropout": 0.25, "attention_dropout": 0.125})
    )
    training = open_recipe(write_recipe(folder)).training
    assert (training.dropout, training.attention_dropout) == (0.0, 0.125)


def test_another_recipe_on_the_same_model_is_not_warned_of_its_training_text(folder, capfd):
    """It was never trained here, whatever the recipe says that was first."""
    open_recipe(write_recipe(folder))
    capfd.readouterr()
    prepare(open_recipe(write_recipe(folder, data={"languages": ["fr"]})))
    assert "may have been trained" not in capfd.readouterr().err


def test_the_imported_folder_is_not_named_as_a_host(folder):
    open_recipe(write_recipe(folder))
    with pytest.raises(UserError, match="lsmoe_ds wrote: name it as 'training"):
        open_recipe(write_recipe(folder, {"huggingface": "nllb-imported"}))


def test_a_damaged_model_is_refused(folder):
    weights = folder / "nllb" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"tuned.yaml, line \d+: 'model.huggingface' is nllb: "):
        open_recipe(write_recipe(folder))
    assert not (folder / "nllb-imported").exists()


def test_a_folder_of_something_else_is_not_replaced(folder):
    (folder / "nllb-imported").mkdir()
    with pytest.raises(UserError, match="would be imported as nllb-imported, which exists"):
        open_recipe(write_recipe(folder))


def test_an_nllb_moe_is_imported_with_its_experts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    (tmp_path / "moe").mkdir()
    write_nllb_moe(tmp_path / "moe")
    recipe = open_recipe(write_recipe(tmp_path, {"huggingface": "moe"}))
    assert recipe.model.encoder.moe is not None and recipe.model.encoder.moe.experts == 6

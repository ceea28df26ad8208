"""Dense sub-networks: what the sparse model computes for one direction, exactly; and the folder they are
written to.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.conversions import EN_DE, FR_EN, PAIR_TOP2, PAIR_TOP3, global_weights, random_loaded
from support.small_run import PAIR_TOP1, TARGET_TOP2, TOKEN_TOP2, make_recipe, make_run

from lsmoe_ds.checkpoint.stored import Weights
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.convert.agreement import compare
from lsmoe_ds.convert.command import convert
from lsmoe_ds.convert.model_card import model_card
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import check_convertible, convert_to_dense, extract
from lsmoe_ds.inference.load import build_model, load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.interrupt import Interrupted

TARGET_TOP1 = TARGET_TOP2 | {"top_k": 1, "every": 1}


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("convert"), TARGET_TOP2, PAIR_TOP2, 2, expert=2)[0]


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        (TARGET_TOP2, PAIR_TOP1),
        (TARGET_TOP1, PAIR_TOP3),
        (PAIR_TOP2, TARGET_TOP2),
        (None, PAIR_TOP2),
        (TARGET_TOP1, None),
        (TARGET_TOP1 | {"task": "source"}, PAIR_TOP2 | {"expert_groups": 2}),
        (TARGET_TOP2 | {"routing": "static"}, PAIR_TOP2 | {"routing": "static", "expert_groups": 2}),
    ],
)
@pytest.mark.parametrize("direction", [EN_DE, FR_EN])
def test_the_subnetwork_computes_what_the_sparse_model_computes(run, encoder, decoder, direction):
    sparse = random_loaded(run, encoder, decoder)
    weights, recipe = extract(global_weights(sparse.model), sparse.recipe, direction)
    assert not list(recipe.model.moe_layers()) and recipe.data.directions == [str(direction)]
    model = build_model(recipe, sparse.vocabulary.size, Weights(weights, 0, {}), torch.device("cpu"))
    dense = replace(sparse, model=model, recipe=recipe, languages=recipe.languages, kind="dense")
    lines = ["ba de fi", "ko la mi nobu", "su", "tabi refu gosi kale mo ba", "de de de"]
    found = compare(sparse, dense, direction, lines)
    assert found.sentences == found.same >= len(lines)
    assert 0 < found.largest_logit_difference <= 1e-4
    # The comparison can fail: another direction's sub-network is another model.
    other, _ = extract(global_weights(sparse.model), sparse.recipe, Direction("en", "fr"))
    model = build_model(recipe, sparse.vocabulary.size, Weights(other, 0, {}), torch.device("cpu"))
    assert compare(sparse, replace(dense, model=model), direction, lines).largest_logit_difference > 1e-2


def test_widths_are_those_of_the_joined_experts(run):
    sparse = random_loaded(run, TARGET_TOP2, PAIR_TOP1)
    _, recipe = extract(global_weights(sparse.model), sparse.recipe, EN_DE)
    assert recipe.model.encoder.feed_forward == [24, 48]
    assert recipe.model.decoder.feed_forward == [24, 16, 24]


def test_from_a_checkpoint_of_two_processes_to_a_folder_that_translates(run, tmp_path):
    out = tmp_path / "dense"
    record = convert(run, "dense", EN_DE, out, check=12)
    assert record["same_translations"] == record["sentences"] == 12
    assert record["largest_logit_difference"] <= 1e-4
    assert record == json.loads((run / "conversion.json").read_text())
    sparse, dense = load(run, "cpu"), load(out, "cpu")
    assert (record["sparse_parameters"], record["dense_parameters"]) == (sparse.parameters, dense.parameters)
    assert dense.parameters < sparse.parameters and dense.kind == "dense" and dense.step == sparse.step == 2
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "model.safetensors",
        "provenance.json",
        "recipe.yaml",
        "vocabulary.model",
    ]
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["run"] == "small" and provenance["direction"] == "en-de" and provenance["source_files"]
    lines = ["ba de fi", "", "ko la mi"]
    assert list(translate(dense, EN_DE, lines)) == list(translate(sparse, EN_DE, lines))
    with pytest.raises(UserError, match="'fr' is not in this system"):
        translate(dense, FR_EN, lines)


def test_a_dense_model_is_used_without_deepspeed_and_megatron(run, tmp_path):
    convert_to_dense(run, EN_DE, tmp_path / "dense")
    program = (
        "import sys\nfrom lsmoe_ds.inference.load import load\nfrom lsmoe_ds.inference.translate import "
        "translate\nfrom lsmoe_ds.directions import "
        f"Direction\nprint(list(translate(load({str(tmp_path / 'dense')!r}), Direction('en', 'de'), "
        "['ba'])))\nassert not {'deepspeed', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_folder_is_replaced_only_if_it_was_converted(run, tmp_path, capsys):
    out = tmp_path / "dense"
    convert_to_dense(run, EN_DE, out)
    assert "is replaced" not in capsys.readouterr().err
    convert_to_dense(run, FR_EN, out)
    assert f"lsmoe: {out} is replaced: it held dense, en-de, of step 2\n" in capsys.readouterr().err
    (out / "scores.json").write_text("{}")
    (out / "README.md").write_text("changed")
    with pytest.raises(
        UserError, match=r"dense holds scores\.json, which would be lost: choose another folder with --out"
    ):
        convert_to_dense(run, EN_DE, out)
    (out / "scores.json").unlink()
    assert load_recipe(out / "recipe.yaml").data.directions == ["fr-en"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    convert_to_dense(run, EN_DE, foreign)  # empty: no harm
    foreign = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(UserError, match="was not made by `lsmoe convert`"):
        convert_to_dense(run, EN_DE, foreign)
    assert load(foreign).step == 2
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        convert_to_dense(run, EN_DE, tmp_path / "file")


def test_a_failure_leaves_the_earlier_folder(run, tmp_path, monkeypatch):
    out = tmp_path / "dense"
    convert_to_dense(run, EN_DE, out)
    before = (out / "model.safetensors").read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lsmoe_ds.checkpoint.stored.write_json", fail)
    with pytest.raises(UserError, match="disk is full"):
        convert_to_dense(run, FR_EN, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert load(out).step == 2


def test_damage_of_a_converted_folder_is_named(run, tmp_path):
    out = tmp_path / "dense"
    convert_to_dense(run, EN_DE, out)
    for name in ("model.safetensors", "vocabulary.model"):
        data = bytearray((out / name).read_bytes())
        data[-3] ^= 1
        (out / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            load(out)
        data[-3] ^= 1
        (out / name).write_bytes(data)
    (out / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"model\.safetensors has 5 bytes"):
        load(out)
    (out / "provenance.json").write_text('{"format": "lsmoe_ds", "kind": "dense"}')
    with pytest.raises(UserError, match="damaged"):
        load(out)


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        (TOKEN_TOP2, TARGET_TOP2, "the encoder routes by token in layer 2"),
        (TARGET_TOP2, TOKEN_TOP2 | {"every": 1}, "the decoder routes by token in layers 1, 2, 3"),
        (TOKEN_TOP2 | {"routing": "sentence"}, TARGET_TOP2, "the encoder routes by sentence in layer 2"),
    ],
)
def test_token_routing_has_no_subnetwork_and_says_why(run, encoder, decoder, message):
    sparse = random_loaded(run, encoder, decoder)
    with pytest.raises(UserError, match=message):
        extract(global_weights(sparse.model), sparse.recipe, EN_DE)


def test_what_cannot_be_converted_is_refused(run, tmp_path):
    out = tmp_path / "out"
    for direction, message in (
        (Direction("en", "ru"), "'ru' is not in this system"),
        (Direction("de", "fr"), "de-fr is not in this system"),
    ):
        with pytest.raises(UserError, match=message):
            convert(run, "dense", direction, out)
    with pytest.raises(UserError, match=r"'dens' is nothing to convert to \(did you mean 'dense'\?\)"):
        convert(run, "dens", EN_DE, out)
    assert not out.exists()
    recipe = load_recipe(run / "recipe.yaml")
    with pytest.raises(UserError, match="do not belong to this recipe"):
        extract({"embedding.tokens.weight": torch.zeros(1)}, recipe, EN_DE)


def test_that_nothing_was_compared_is_said(run, tmp_path):
    """Without its prepared data a run is converted all the same, but the command does not keep silent about
    the comparison.
    """
    data, away = run.parent / "data", run.parent / "away"
    data.rename(away)
    try:
        record = convert(run, "dense", EN_DE, tmp_path / "out", check=3)
    finally:
        away.rename(data)
    assert (
        "no held-out text to compare on: there is no prepared data in" in record["not_checked"]
        and "sentences" not in record
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_interrupted_comparison_says_that_the_folder_is_whole(run, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr("lsmoe_ds.convert.command.check_agreement", stop)
    with pytest.raises(Interrupted):
        convert(run, "dense", EN_DE, tmp_path / "out")
    assert f"{tmp_path / 'out'} is written whole, but was not compared with {run}" in capsys.readouterr().err
    assert load(tmp_path / "out", "cpu").step


def test_a_card_tells_one_direction_from_all(run):
    sizes = {"dense_parameters": 9, "sparse_parameters": 9}
    made = {"run": "small", "version": "1", "route": "specific", "step": 2, **sizes}
    whole = make_recipe(run.parent, None, None)
    one = whole.model_copy(deep=True)
    one.data.directions = ["en-de"]
    cards = [model_card("dense", recipe, made, run).replace("\n", " ") for recipe in (whole, one)]
    says = [f"computes for {of}" for of in ("each of these directions", "this direction")]
    assert [each in card for each in says for card in cards] == [True, False, False, True]


def test_a_model_without_anything_specific_serves_all_directions(run, tmp_path):
    plain = random_loaded(run, None, None)
    tensors, recipe = extract(global_weights(plain.model), plain.recipe, None)
    assert recipe.data.directions == plain.recipe.data.directions
    assert {name: tensors[name].tolist() for name in tensors} == {
        n: w.tolist() for n, w in global_weights(plain.model).items()
    }
    for encoder, message in ((TARGET_TOP2, "name one, as in --direction en-de"), (None, "name one")):
        routed = make_recipe(run.parent, encoder, PAIR_TOP2)
        with pytest.raises(UserError, match=message):
            check_convertible(routed, None)


def test_a_direction_of_a_model_without_anything_specific_is_said_to_make_no_difference(
    pool, tmp_path, capsys
):
    run = make_run(pool, tmp_path, None, None, 1)[0]
    convert(run, "dense", EN_DE, tmp_path / "dense", check=0)
    said = (
        f"all directions of {run} have the same parameters: {tmp_path / 'dense'} serves all, not en-de alone"
    )
    assert said in capsys.readouterr().err
    assert load(tmp_path / "dense", "cpu").languages.directions == load(run, "cpu").languages.directions

"""A training records which units its directions activate, trains with their masks, and resumes with them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from support import starts
from support.layouts import train as train_in
from support.small_run import make_recipe, train_and_save, write_corpus
from support.starts import FOUR, FOUR_BF16, ONE, changed, first_steps, recipe_from
from typer.testing import CliRunner

from lsmoe_ds.analysis.neurons import analyze_neurons
from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.checkpoint.stored import find_model, read_weights
from lsmoe_ds.checkpoint.tensors import Tensors, open_tensors
from lsmoe_ds.cli import app
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.data.validation import validation_batches
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import SharedError, UserError
from lsmoe_ds.export.peft import split
from lsmoe_ds.inference import load as load_module
from lsmoe_ds.inference.engine import find_direction
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.methods.neurons import method as neurons_method
from lsmoe_ds.methods.neurons.recording import record
from lsmoe_ds.methods.neurons.selection import most_active
from lsmoe_ds.model.methods import check_holders
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training import start

root = starts.root  # fixture

NEURONS = {"share": 80, "pairs": 3}


def with_neurons(root: Path, layout: tuple = ONE, **section) -> Recipe:
    value = recipe_from(root, layout).model_dump(mode="json", exclude_none=True)
    value["model"]["neurons"] = {**NEURONS, **section}
    return Recipe.model_validate(value)


def masks_in(run: Path) -> dict[str, torch.Tensor]:
    tensors = read_weights(find_model(run)).tensors
    return {name: tensors[name] for name in tensors if name.endswith("_neurons.mask")}


@pytest.fixture(scope="module")
def trained(pool, root):
    recipe = with_neurons(root)
    start.check(recipe, root / "neurons")
    return root / "neurons", pool.run(1, first_steps, recipe, root / "neurons")[0]


def test_it_takes_the_most_active_units_of_the_model_that_it_starts_from(root, trained):
    run, found = trained
    base, recipe = load(root / "model"), with_neurons(root)
    data = PreparedData.of(recipe)
    batches = validation_batches(data, base.languages, data.vocabulary, recipe.data.batch, limit=3)
    counts, sentences = record(base.model, batches, 4, "sentence", Topology.single())
    assert sentences.tolist() == [3] * 4
    masks = masks_in(run)
    assert masks.keys() == {f"{at}_neurons.mask" for at in counts}
    for at, each in counts.items():
        assert torch.equal(masks[f"{at}_neurons.mask"], most_active(each, 80)), at
        assert 0 < masks[f"{at}_neurons.mask"].sum() < each.numel()
    assert len({tuple(row) for row in torch.cat(list(masks.values()), 1).tolist()}) > 1
    (_, said) = found["said"]
    assert said.startswith("neurons: 12 dev pairs recorded in ")
    assert "masks of 4 directions keep " in said and said.endswith(" of the units, in 36 bytes")


@pytest.mark.parametrize("layout", [FOUR, FOUR_BF16], ids=["float32", "bf16"])
def test_every_layout_takes_the_same(pool, root, trained, layout, tmp_path):
    tensor, expert, world, _, bf16 = layout
    recipe = with_neurons(root, layout)
    found = pool.run(world, first_steps, recipe, tmp_path / "run", tensor=tensor, expert=expert)
    masks, wanted = masks_in(tmp_path / "run"), masks_in(trained[0])
    assert masks.keys() == wanted.keys()
    if not bf16:  # in bfloat16 some units are active that are not in float32
        assert all(torch.equal(masks[name], wanted[name]) for name in wanted)
        assert found[0]["losses"] == pytest.approx(trained[1]["losses"], rel=1e-5)
    else:
        alike = torch.cat([(masks[name] == wanted[name]).flatten() for name in wanted])
        assert alike.float().mean() > 0.9


def test_a_run_goes_on_with_its_masks_and_without_recording(pool, root, trained, tmp_path):
    recipe, run = with_neurons(root), tmp_path / "run"
    train_in(pool, changed(recipe, training={"steps": 1}), run, ONE[:4])
    before = masks_in(run)
    assert pool.run(1, first_steps, recipe, run)[0]["said"][0].startswith("resuming from")
    after, whole = (read_weights(find_model(each)).tensors for each in (run, trained[0]))
    assert all(torch.equal(after[name], whole[name]) for name in whole)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_sub_network_of_a_direction_translates_the_same_and_is_narrower(root, trained, tmp_path):
    recipe, direction = with_neurons(root), Direction("en", "de")
    record = convert(trained[0], "hybrid", direction, tmp_path / "hybrid", check=8)
    assert record["same_translations"] == 8 and record["largest_logit_difference"] <= 1e-4
    number = recipe.languages.direction_id(direction)
    kept = int(masks_in(trained[0])["encoder.0.feed_forward.units_neurons.mask"][number].sum())
    assert find_model(tmp_path / "hybrid").recipe.model.encoder.feed_forward[0] == kept < 24


@pytest.fixture(scope="module")
def masked(pool, tmp_path_factory):
    """Train runs whose feed-forwards are all dense, and return them by what their masks remove."""
    folder = tmp_path_factory.mktemp("masked")
    write_corpus(folder)
    runs = {}
    for remove in ("units", "rows"):
        value = make_recipe(folder, None, None).model_dump(mode="json", exclude_none=True)
        value["model"]["neurons"] = {"random": 0.4, "remove": remove}
        recipe = Recipe.model_validate(value)
        data = prepare(recipe)
        runs[remove] = folder / remove
        open_run(recipe, runs[remove], data.folder / "vocabulary.model")
        pool.run(1, train_and_save, recipe, runs[remove], data.vocabulary.size)
    return runs


@pytest.mark.parametrize("to", ["dense", "huggingface", "ctranslate2"])
@pytest.mark.parametrize("remove", ["units", "rows"])
def test_exports_of_a_direction_translate_the_same(masked, remove, to, tmp_path):
    record = convert(masked[remove], to, Direction("fr", "en"), tmp_path / to, check=20)
    assert record["same_translations"] == record["sentences"] == 20
    assert to == "ctranslate2" or record["largest_logit_difference"] <= 1e-4
    assert record["dense_parameters"] < record["sparse_parameters"]
    with pytest.raises(UserError, match="needs a direction"):
        convert(masked[remove], to, None, tmp_path / "all", check=0)


def test_a_folder_says_what_was_merged_and_what_is_padded(masked, tmp_path):
    direction, folders = Direction("fr", "en"), {to: tmp_path / to for to in ("dense", "huggingface")}
    records = {to: convert(masked["units"], to, direction, out, check=0) for to, out in folders.items()}
    records["again"] = convert(folders["huggingface"], "dense", None, tmp_path / "again", check=0)
    folders["again"] = tmp_path / "again"
    cards = {to: (folder / "README.md").read_text() for to, folder in folders.items()}
    merged = "masks of each direction on its feed-forwards' units (40% at random)"
    assert all(f"| merged into its layers | {merged} |" in card for card in cards.values())
    dense = Tensors.of(read_weights(find_model(folders["dense"])).tensors).numbers
    padded = open_tensors(folders["huggingface"]).numbers
    assert [record["dense_parameters"] for record in records.values()] == [dense] * 3 != [padded] * 3
    of_folder = json.loads((folders["huggingface"] / "provenance.json").read_text())
    for each in (of_folder, records["huggingface"]):
        assert each["padded_parameters"] == padded
    assert not any("padded_parameters" in records[to] for to in ("dense", "again"))
    whole = f"| parameters | {dense:,} (the whole model: {of_folder['sparse_parameters']:,})"
    assert f"{whole}; {padded:,} in this folder, filled up to one width a side |" in cards["huggingface"]
    assert f"{whole} |" in cards["dense"] and f"{whole} |" in cards["again"]


def test_the_size_of_a_folder_is_that_of_its_files(masked, tmp_path):
    """CTranslate2's file is not the dense model's: it has a table of positions, and may be rounded."""
    options = ["--direction", "en-de", "--out", str(tmp_path / "out"), "--check", "0"]
    said = CliRunner().invoke(app, ["convert", str(masked["rows"]), "--as", "ctranslate2", *options])
    assert f"bytes of its weight files: {(tmp_path / 'out' / 'model.bin').stat().st_size}\n" in said.output
    assert "dense bytes" not in said.output


@pytest.mark.parametrize("remove", ["units", "rows"])
def test_an_analysis_counts_the_units_that_masks_leave_alone(masked, remove, tmp_path):
    """Under rows a unit that is masked may still give relu of its bias."""
    analyze_neurons(masked[remove], tmp_path / "out", share=100)
    masks, languages = masks_in(masked[remove]), find_model(masked[remove]).recipe.languages
    rows = list(csv.DictReader((tmp_path / "out" / "neurons.csv").open()))
    assert len(rows) == 5 * len(languages.directions)
    for row in rows:
        mask = masks[f"{row['side']}.{row['layer']}.feed_forward.units_neurons.mask"]
        number = languages.direction_id(Direction.parse(row["direction"]))
        kept = float(mask[number].float().mean())
        assert float(row["kept"]) == pytest.approx(kept, abs=1e-6) and kept < 0.5


def test_directions_by_which_a_model_has_grown_are_said_to_be_untrained(masked, tmp_path, capsys):
    more = ["data.languages=[de, fr, en]", "data.directions=all"]
    convert(masked["units"], "grown", None, tmp_path / "grown", check=0, overrides=more)
    loaded = load(tmp_path / "grown", "cpu")
    assert find_direction(loaded, Direction("de", "fr")) in loaded.languages.directions
    assert "the model was not trained on de-fr (zero-shot)" in capsys.readouterr().err
    find_direction(loaded, Direction("en", "fr"))
    assert not capsys.readouterr().err


def test_settings_of_masks_that_differ_are_named(masked):
    before = find_model(masked["rows"]).recipe
    section = before.model.neurons.model_copy(update={"remove": "units"})
    after = before.model_copy(update={"model": before.model.model_copy(update={"neurons": section})})
    said = "'model.neurons.remove' is units, but the model has learned with rows"
    with pytest.raises(UserError, match=said):
        check_holders(before, after)


def test_masks_take_a_bit_each_in_a_checkpoint(masked):
    (weights,) = masked["units"].glob("checkpoints/*/mp_rank_00_model_states.pt")
    stored = torch.load(weights, weights_only=True)["module"]
    packed = {name: value for name, value in stored.items() if name.endswith("_neurons.mask")}
    assert len(packed) == 5
    for value in packed.values():
        assert value["bits"].numel() == (math.prod(value["packed"]) + 7) // 8 and "values" not in value


def test_new_directions_of_a_grown_model_take_masks_of_their_target(masked, tmp_path):
    more = ["data.languages=[de, fr, en]", "data.directions=all"]
    convert(masked["units"], "grown", None, tmp_path / "grown", check=0, overrides=more)
    old, new = find_model(masked["units"]), find_model(tmp_path / "grown")
    before, after = masks_in(masked["units"]), masks_in(tmp_path / "grown")
    for name, mask in after.items():
        for number, direction in enumerate(new.recipe.languages.directions):
            known = old.recipe.languages
            like = direction if direction in known.directions else Direction("en", direction.target)
            row = before[name][known.direction_id(like)]
            assert torch.equal(mask[number], row), f"{name} of {direction}"


def test_new_directions_of_a_grown_model_take_the_masks_that_the_recipe_names(root, trained, tmp_path):
    more = ["data.languages=[de, fr, en]", "data.directions=all", "model.neurons.like={fr-de: fr-en}"]
    convert(trained[0], "grown", None, tmp_path / "grown", check=0, overrides=more)
    old, new = with_neurons(root).languages, find_model(tmp_path / "grown").recipe.languages
    before, after = masks_in(trained[0]), masks_in(tmp_path / "grown")
    taken = {"fr-de": "fr-en", "de-fr": "en-fr", "en-de": "en-de"}
    for name, mask in after.items():
        for direction, like in taken.items():
            row = before[name][old.direction_id(Direction.parse(like))]
            assert torch.equal(mask[new.direction_id(Direction.parse(direction))], row), (
                f"{name} of {direction}"
            )
    by_target = [masks[old.direction_id(Direction("en", "de"))] for masks in before.values()]
    named = [masks[old.direction_id(Direction("fr", "en"))] for masks in before.values()]
    assert not torch.equal(torch.cat(by_target), torch.cat(named)), "or the name makes no difference"


def test_units_kept_at_random_are_at_least_one_of_a_layer(pool, root, tmp_path):
    value = recipe_from(root).model_dump(mode="json", exclude_none=True)
    value["model"]["neurons"] = {"random": 0.01}
    found = pool.run(1, first_steps, Recipe.model_validate(value), tmp_path / "run")[0]
    assert found["said"][1] == "neurons: masks of 4 directions keep 4.2% of the units, in 36 bytes, at random"
    assert all((mask.sum(1) == 1).all() for mask in masks_in(tmp_path / "run").values())


def test_the_dev_set_must_have_pairs(root, trained, tmp_path):
    recipe = changed(with_neurons(root), data={"held_out": {"dev": 0, "test": 20}, "name": "without"})
    prepare(recipe)
    with pytest.raises(UserError, match=r"'model.neurons' reads the dev set, but .* has no dev pairs: raise"):
        start.check(recipe, tmp_path / "run")
    # Nothing is recorded for a model that already has its masks.
    convert(trained[0], "consolidated", None, tmp_path / "masked", check=0)
    start.check(changed(recipe, training={"start_from": str(tmp_path / "masked")}), tmp_path / "run")


def test_a_direction_that_was_never_trained_has_the_masks_of_its_target(masked, capsys, monkeypatch):
    loaded, used = load(masked["units"], "cpu"), []
    true_search = load_module.beam_search
    monkeypatch.setattr(load_module, "beam_search", lambda *a: used.append(a[2]) or true_search(*a))
    assert list(translate(loaded, Direction("de", "fr"), ["ba de fi"]))
    said = capsys.readouterr().err
    assert "de-fr was never trained: what each direction has of its own is that of en-fr" in said
    languages = loaded.languages
    numbers = languages.direction_id(Direction("en", "fr")), languages.id("de"), languages.id("fr")
    assert [(int(ids.direction), int(ids.source), int(ids.target)) for ids in used] == [numbers]
    only = Languages((Direction("en", "de"),))
    with pytest.raises(ValueError, match="no direction into fr was trained, whose neurons de-fr could have"):
        loaded.recipe.model.neurons.stand_in(Direction("de", "fr"), only)


def test_named_directions_take_recorded_masks_even_of_one_another(pool, root, trained, tmp_path):
    like = {"en-fr": "en-de", "eng-deu": "en-fr"}
    found = pool.run(1, first_steps, with_neurons(root, like=like), tmp_path / "run")[0]
    assert "; en-fr has that of en-de, en-de has that of en-fr" in found["said"][1]
    languages = with_neurons(root).languages
    de, fr = (languages.direction_id(Direction("en", code)) for code in ("de", "fr"))
    masks, own = masks_in(tmp_path / "run"), masks_in(trained[0])
    for name, mask in masks.items():
        assert torch.equal(mask[de], own[name][fr]) and torch.equal(mask[fr], own[name][de])
    assert any(not torch.equal(own[name][fr], own[name][de]) for name in own)


def test_a_named_direction_without_dev_text(root, monkeypatch):
    """What is missing is the text of the direction that is named, not that of the one it is named for."""
    recipe = with_neurons(root, like={"en-fr": "en-de"})
    model = Transformer(recipe, PreparedData.of(recipe).vocabulary.size)
    (method,) = (each for each in model.methods if each.name == "neurons")
    sentences = torch.ones(len(recipe.languages.directions))
    sentences[recipe.languages.direction_id(Direction("en", "de"))] = 0
    counts = {at: torch.ones_like(module.mask, dtype=torch.long) for at, module in method.masks.items()}
    monkeypatch.setattr(neurons_method, "record", lambda *_: (counts, sentences))
    with pytest.raises(SharedError, match=r"'model\.neurons\.like' names en-de, of which there is no dev"):
        method.begin(model, lambda limit: [])


def test_units_are_counted_as_the_recipe_says_on_all_directions(pool, root, tmp_path):
    recipe = changed(with_neurons(root, per="token"), training={"directions": ["en-de"], "validate_every": 2})
    found = pool.run(1, first_steps, recipe, tmp_path / "run")[0]
    assert found["said"][1].startswith("neurons: 12 dev pairs recorded"), "of all four directions"
    assert found["said"][2] == "every 2 steps it validates on 5 dev pairs in 1 direction"
    base = load(root / "model")
    batches = validation_batches(
        PreparedData.of(recipe), base.languages, base.vocabulary, recipe.data.batch, limit=3
    )
    counts, _ = record(base.model, batches, 4, "token", Topology.single())
    masks = masks_in(tmp_path / "run")
    assert all(torch.equal(masks[f"{at}_neurons.mask"], most_active(each, 80)) for at, each in counts.items())


def test_a_model_that_has_masks_keeps_them_and_takes_no_others(pool, root, trained, tmp_path):
    convert(trained[0], "consolidated", None, tmp_path / "start", check=0)
    again = changed(with_neurons(root), training={"start_from": str(tmp_path / "start")})
    start.check(again, tmp_path / "run")
    said = pool.run(1, first_steps, again, tmp_path / "run")[0]["said"]
    assert said == [f"starting from {tmp_path / 'start'}"]
    masks, own = masks_in(tmp_path / "run"), masks_in(trained[0])
    assert all(torch.equal(masks[name], own[name]) for name in own)
    for other in ({"share": 20}, {"per": "token"}, {"remove": "rows"}, {"like": {"en-fr": "en-de"}}):
        value = again.model_dump(mode="json", exclude_none=True)
        value["model"]["neurons"] |= other
        (key,) = other
        with pytest.raises(UserError, match=rf"'model\.neurons\.{key}' is .*, but .* has learned with"):
            start.check(Recipe.model_validate(value), tmp_path / "other")


@pytest.mark.parametrize("method", ["neurons={}", "lass={tuned: tuned}"])
def test_masks_that_are_found_at_the_start_cannot_be_added_to_a_grown_model(root, tmp_path, method):
    says = rf"'model\.{method.partition('=')[0]}' is found out when a training starts, and cannot be added"
    with pytest.raises(UserError, match=says):
        convert(root / "trained", "grown", None, tmp_path / "grown", check=0, overrides=[f"model.{method}"])


def test_masks_at_random_of_a_grown_model_cannot_become_recorded_ones(masked, tmp_path):
    convert(masked["units"], "consolidated", None, tmp_path / "whole", check=0)
    for run in (masked["units"], tmp_path / "whole"):
        with pytest.raises(UserError, match=r"'model\.neurons\.random' is not set, but .* learned with 0\.4"):
            convert(run, "grown", None, tmp_path / "g", check=0, overrides=["model.neurons={share: 80}"])


def test_no_peft_adapter_fits_a_base_with_masks(masked, tmp_path):
    value = find_model(masked["units"]).recipe.model_dump(mode="json", exclude_none=True)
    value["model"]["low_rank"] = {"rank": 2}
    with pytest.raises(UserError, match=r"'model\.neurons' gives each direction a base with other layers"):
        split({}, Recipe.model_validate(value), Direction("en", "de"))


@pytest.mark.parametrize(
    ("like", "says"),
    [
        ({"en-de": "en-de"}, "'neurons.like' names en-de for itself"),
        ({"en-de": "en-fr", "eng-deu": "fr-en"}, "'neurons.like' names eng-deu twice"),
    ],
)
def test_directions_that_are_like_themselves_or_named_twice_are_refused(root, like, says):
    with pytest.raises(ValueError, match=says):
        with_neurons(root, like=like)

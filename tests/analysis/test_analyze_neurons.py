"""What directions share of the units that they activate: lsmoe analyze neurons, and the report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from support.small_run import TOKEN_TOP2, make_recipe, make_run, train_and_save
from typer.testing import CliRunner

from lsmoe_ds.analysis.findings import draw
from lsmoe_ds.analysis.neurons import analyze_neurons, by_layer, record_all
from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.cli import app
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.directions import Direction, english_centric
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.load import load
from lsmoe_ds.languages import table
from lsmoe_ds.methods.neurons.analysis import are_related, find_overlaps, overlaps
from lsmoe_ds.methods.neurons.selection import most_active
from lsmoe_ds.report.report import write_report


def test_overlaps_are_intersection_over_union():
    masks = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)) < 0.4
    masks[4] = masks[5] = False
    sets = [set(row.nonzero().flatten().tolist()) for row in masks]
    for i, one in enumerate(sets):
        for j, other in enumerate(sets):
            wanted = len(one & other) / len(one | other) if one | other else 1.0
            assert float(overlaps(masks)[i, j]) == pytest.approx(wanted)


def test_relatives_are_languages_of_one_family_on_the_same_side():
    related = lambda one, other: are_related(Direction.parse(one), Direction.parse(other))  # noqa: E731
    assert related("en-de", "en-nl") and related("fr-en", "it-en")
    assert related("fr-de", "fr-nl") and related("fr-ja", "it-ja")
    assert not related("en-de", "en-ru") and not related("en-de", "de-en") and not related("en-de", "nl-en")
    assert not related("fr-de", "fr-it") and not related("de-fr", "nl-it")


def test_many_directions_are_drawn_by_language_and_relatives_are_neighbors():
    directions = english_centric(["ru", "de", "fr", "uk", "nl", "it", "aa", "ab", "af", "am", "ar"])
    directions += english_centric(["as", "az", "ba", "be", "bg", "bn", "bo", "bs", "ca", "cs", "da", "el"])
    generator = torch.Generator().manual_seed(1)
    shape = len(directions), 30
    masks = {name: torch.rand(shape, generator=generator) < 0.5 for name in ("encoder.0", "decoder.0")}
    found = find_overlaps(directions, masks, "units")
    grids = {grid.name: grid for grid in found.grids}
    assert list(grids) == ["spread", "kept", "overlap-encoder-1", "overlap-decoder-1"]
    picture = grids["overlap-decoder-1"]
    assert len(picture.rows) == 24 and abs(picture.rows.index("ru") - picture.rows.index("uk")) <= 2
    order = [directions.index(Direction.parse(each)) for each in ("en-de", "en-fr")]
    wanted = overlaps(masks["decoder.0"])[order[0], order[1]]
    found_at = picture.values[picture.rows.index("de")][picture.rows.index("fr")]
    assert found_at == pytest.approx(float(wanted))
    assert "<text" in draw(picture) and 'width="14"' in draw(picture), "small cells without numbers"
    into_english = [i for i, direction in enumerate(directions) if direction.target == "en"]
    each = overlaps(masks["decoder.0"])[into_english][:, into_english]
    pairs = (each.sum() - len(each)) / (len(each) * (len(each) - 1))
    assert picture.values[picture.rows.index("en")][picture.rows.index("en")] == pytest.approx(float(pairs))


def test_many_directions_into_one_language_and_a_single_direction():
    directions = [Direction(code, "en") for code in table() if code != "en"][:42]
    masks = {"encoder.0": torch.rand(42, 9) < 0.5, "decoder.0": torch.rand(42, 9) < 0.5}
    found = find_overlaps(directions, masks, "units")
    kept = next(grid for grid in found.grids if grid.name == "kept")
    assert len(kept.rows) == 43 and kept.values[kept.rows.index("en")][0] is None
    assert all("<svg" in draw(grid) for grid in found.grids)
    alone = find_overlaps(directions[:1], {name: mask[:1] for name, mask in masks.items()}, "units")
    assert alone.said == "one direction shares its units with none"


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("neurons"), TOKEN_TOP2, None)[0]


def test_a_run_with_experts(run, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["analyze", "neurons", str(run), "--out", str(out), "--limit", "4"])
    assert result.exit_code == 0, result.output
    assert "the median overlap goes from" in result.output and str(out / "index.html") in result.output
    loaded = load(run)
    counts, _, sentences = record_all(loaded, "dev", "sentence", 4)
    assert sentences.tolist() == [4] * 4
    assert {name: each.shape[1] for name, each in counts.items()} == {
        "encoder.0": 24,
        "encoder.1": 4 * 24,
        "decoder.0": 24,
        "decoder.1": 16,
        "decoder.2": 24,
    }
    rows = list(csv.DictReader((out / "neurons.csv").open()))
    for row in rows:
        mask = most_active(counts[f"{row['side']}.{row['layer']}"], 95)
        number = loaded.languages.direction_id(Direction.parse(row["direction"]))
        assert float(row["kept"]) == pytest.approx(float(mask[number].float().mean()), abs=1e-6)
    pairs = list(csv.DictReader((out / "overlaps.csv").open()))
    assert len(rows) == 5 * 4 and len(pairs) == 5 * 6
    page = (out / "index.html").read_text()
    assert "the units that have 95 % of the activations, counted by sentence in 16 dev sentences" in page
    whole = json.loads((out / "neurons.json").read_text())
    assert [grid["name"] for grid in whole["grids"]][:2] == ["spread", "kept"]
    assert (out / "overlap-decoder-3.svg").exists()


def test_options_change_what_is_counted(run, tmp_path):
    every = analyze_neurons(run, tmp_path / "every", share=100)
    assert "goes from 1.00 to 1.00 in the encoder" in every["said"]
    by_token, by_sentence = (record_all(load(run), "test", per, 3)[0] for per in ("token", "sentence"))
    assert all((by_token[name] >= each).all() for name, each in by_sentence.items())
    assert any((by_token[name] > 3).any() for name in by_token)
    with pytest.raises(UserError, match="--share is 101: give a percentage from 0 to 100"):
        analyze_neurons(run, tmp_path / "wrong", share=101)
    with pytest.raises(UserError, match="'train' is no held-out text"):
        analyze_neurons(run, tmp_path / "wrong", split="train")


def test_layers_and_experts_stand_in_their_order():
    names = ["decoder.0.feed_forward.units", "encoder.10.feed_forward.units", "encoder.2.feed_forward.units"]
    names += [f"encoder.3.feed_forward.experts.{number}.units" for number in (10, 2)]
    found = by_layer({name: torch.full((1, 1), i) for i, name in enumerate(names)})
    assert list(found) == ["encoder.2", "encoder.3", "encoder.10", "decoder.0"]
    assert found["encoder.3"].tolist() == [[4, 3]]


def test_the_report_of_a_run_with_masks_shows_them(pool, tmp_path):
    from support.small_run import write_corpus

    write_corpus(tmp_path)
    value = make_recipe(tmp_path, None, None).model_dump(mode="json", exclude_none=True)
    value["model"]["neurons"] = {"random": 0.5}
    recipe = Recipe.model_validate(value)
    data = prepare(recipe)
    run: Path = tmp_path / "run"
    open_run(recipe, run, data.folder / "vocabulary.model")
    pool.run(1, train_and_save, recipe, run, data.vocabulary.size)
    write_report(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "Units that directions share" in text and "How much every two directions share" in text

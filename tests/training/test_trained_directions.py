"""A training of some of its recipe's directions."""

from __future__ import annotations

from itertools import islice

import pytest
from support.invented_pairs import LANGUAGES, Vocabulary, prepare
from support.loops import loop
from support.small_run import make_recipe, write_corpus

from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.config.data import Batch as BatchSettings
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.batching import BatchStream
from lsmoe_ds.data.prepare import prepare as prepare_data
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.parts import merge
from lsmoe_ds.inference.engine import find_direction
from lsmoe_ds.inference.load import load
from lsmoe_ds.report.report import write_report


def stream(directions: list[str]) -> BatchStream:
    chosen = [Direction.parse(each) for each in directions]
    batch = BatchSettings(tokens=512, count=4)
    return BatchStream(prepare(), LANGUAGES, Vocabulary(), batch, 5.0, 1, directions=chosen)


def test_only_chosen_directions_are_in_batches():
    numbers = {d for step in islice(stream(["en-fr", "de-en"]), 9) for d in step.directions}
    assert numbers == {LANGUAGES.direction_id(Direction.parse(each)) for each in ("en-fr", "de-en")}
    with pytest.raises(UserError, match=r"none of 'training\.directions' has a training pair"):
        stream(["de-fr"])


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("some")
    write_corpus(folder)
    recipe = recipe_of(make_recipe(folder, None, None), directions=["fr-en"], validate_every=2)
    data = prepare_data(recipe)
    open_run(recipe, folder / "run", data.folder / "vocabulary.model")
    pool.run(1, loop, recipe, folder / "run")
    return folder / "run"


def recipe_of(recipe: Recipe, **training) -> Recipe:
    value = recipe.model_dump(mode="json", exclude_none=True)
    value["training"] |= training
    return Recipe.model_validate(value)


def test_scores_and_report_are_of_what_was_trained(run):
    table = evaluate(run, limit=2, progress=False)
    assert [str(score.direction) for score in table.directions] == ["fr-en"] and table.asked is None
    evaluate(run, limit=2, progress=False, part=Part(1, 1))
    (merged,) = merge(run, 1, limit=2).directions
    assert merged.metrics == table.directions[0].metrics
    assert len(evaluate(run, ["en-de"], limit=2, progress=False).directions) == 1
    write_report(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "fr" in text and "report" in text


def test_a_direction_of_the_recipe_that_was_not_trained_is_said(run, capsys):
    loaded = load(run, "cpu")
    find_direction(loaded, Direction("fr", "en"))
    assert capsys.readouterr().err == ""
    find_direction(loaded, Direction("en", "fr"))
    assert capsys.readouterr().err == "lsmoe: the model was not trained on en-fr (zero-shot)\n"


def test_the_model_of_another_direction_can_be_converted(run, tmp_path):
    convert(run, "dense", Direction("en", "de"), tmp_path / "dense", check=2)
    assert load_recipe(tmp_path / "dense" / "recipe.yaml").training.directions is None


def test_codes_are_read_as_everywhere_and_unknown_directions_refused(run):
    recipe = load_recipe(run / "recipe.yaml", ["training.directions=[FR-eng_Latn]"])
    assert recipe.training.directions == ["fr-en"] and recipe.trained == (Direction("fr", "en"),)
    with pytest.raises(UserError, match=r"'training\.directions' names de-fr, which is not among"):
        load_recipe(run / "recipe.yaml", ["training.directions=[de-fr]"])

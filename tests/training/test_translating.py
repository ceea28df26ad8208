"""The chrF of dev translations is that of greedy search, in every layout; it can stop a training."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from sacrebleu.metrics import CHRF
from support.loops import loop, recipe_in, records
from support.small_run import TARGET_TOP2, TOKEN_TOP2, write_corpus

from lsmoe_ds.checkpoint.run_folder import list_checkpoints
from lsmoe_ds.config.recipe import EarlyStopping, Recipe
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.inference.beam_search import Search
from lsmoe_ds.inference.load import load
from lsmoe_ds.inference.translate import translate_tokens

PAIRS = 3
SIDES = TOKEN_TOP2 | {"experts": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("translating")
    write_corpus(path)
    prepare(recipe_in(path))
    return path


def recipe_of(folder: Path, moe=SIDES, tags: str = "target", **layout) -> Recipe:
    recipe = recipe_in(folder, steps=6, every=3, moe=moe, **layout)
    changes = {"validate_translations": PAIRS, "validate_every": 6, "dropout": 0.0, "attention_dropout": 0.0}
    recipe.training = recipe.training.model_copy(update=changes)
    recipe.data.tags = tags
    return recipe


def searched(run: Path, recipe: Recipe) -> float:
    """Return the chrF by the search of inference, of the run's last checkpoint."""
    loaded, data = load(run, "cpu"), PreparedData.open(recipe.prepared)
    scores = []
    for direction in recipe.trained:
        pairs = data.tokens(direction, "dev")
        sources = [pairs.source[i].tolist() for i in range(PAIRS)]
        found = translate_tokens(loaded, direction, sources, Search(beam=1))
        texts = [data.vocabulary.decode(best.tokens) for (best,) in found]
        wanted = [data.vocabulary.decode(pairs.target[i].tolist()) for i in range(PAIRS)]
        scores.append(CHRF().corpus_score(texts, [wanted]).score)
    return sum(scores) / len(scores)


LAYOUTS = [(1, 1, 1, SIDES), (2, 1, 2, SIDES), (2, 2, 1, TARGET_TOP2), (2, 1, 1, None), (4, 2, 2, SIDES)]


@pytest.mark.parametrize(("world", "tensor", "expert", "moe"), LAYOUTS)
def test_every_layout_translates_as_greedy_search_does(pool, folder, world, tensor, expert, moe):
    """Ranks have sentences of other lengths, and more or fewer of them: none waits for another."""
    recipe = recipe_of(folder, moe, tensor=tensor, expert=expert)
    run = folder / f"run-{world}{tensor}{expert}-{moe is SIDES}"
    assert pool.run(world, loop, recipe, run, tensor=tensor, expert=expert) == [None] * world
    (chrf,) = [record["dev_chrf"] for record in records(run) if "dev_chrf" in record]
    assert chrf == pytest.approx(searched(run, recipe), abs=1e-6) and chrf > 0
    state = json.loads((list_checkpoints(run)[-1] / "state.json").read_text())
    assert state["dev_chrf"] == chrf and state["dev_loss"] is not None


def test_a_tag_that_is_given_is_no_part_of_the_translation(pool, folder):
    recipe, run = recipe_of(folder, tags="source-target"), folder / "run-tags"
    pool.run(1, loop, recipe, run)
    (chrf,) = [record["dev_chrf"] for record in records(run) if "dev_chrf" in record]
    assert chrf == pytest.approx(searched(run, recipe), abs=1e-6)


def with_chrf(topology, recipe: Recipe, run: Path, found: list[float]) -> None:
    from lsmoe_ds.training import loop as module

    with mock.patch.object(module, "dev_chrf", mock.Mock(side_effect=found)):
        assert loop(topology, recipe, run) is None


def test_the_best_by_chrf_stops_a_training_and_stays(pool, folder):
    recipe, run = recipe_of(folder, None), folder / "run-best"
    stopping = EarlyStopping(metric="chrf", patience=2)
    changes = {"validate_every": 1, "checkpoint_every": 1, "early_stopping": stopping}
    recipe.training = recipe.training.model_copy(update=changes | {"keep": 1, "keep_best": 1})
    pool.run(1, with_chrf, recipe, run, [10.0, 30.0, 20.0, 29.0])
    assert [path.name for path in list_checkpoints(run)] == ["step-2", "step-4"]

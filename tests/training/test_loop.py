"""What the training loop hands to each rank, and in which steps it validates and saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.loops import loop, recipe_in, records
from support.small_run import TOKEN_TOP2, write_corpus

from lsmoe_ds.checkpoint.run_folder import list_checkpoints
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("loop")
    write_corpus(path)
    prepare(recipe_in(path))
    return path


def recipe_of(folder: Path, **training) -> Recipe:
    """Make a recipe of five steps for two data ranks of two tensor-parallel peers each."""
    recipe = recipe_in(folder, steps=5, every=2, moe=TOKEN_TOP2, tensor=2)
    recipe.training = recipe.training.model_copy(update={"keep": 9, **training})
    return recipe


@pytest.fixture(scope="module")
def run(pool, folder) -> Path:
    pool.run(4, loop, recipe_of(folder), folder / "run", tensor=2)
    return folder / "run"


def test_it_validates_and_saves_in_every_nth_and_in_the_last_step(run):
    dev = {record["step"]: record["dev_loss"] for record in records(run) if "dev_loss" in record}
    assert list(dev) == [3, 5]
    assert [path.name for path in list_checkpoints(run)] == ["step-2", "step-4", "step-5"]
    states = [json.loads((path / "state.json").read_text()) for path in list_checkpoints(run)]
    assert [(state["step"], state["dev_loss"]) for state in states] == [(2, None), (4, None), (5, dev[5])]


def with_dev_losses(topology, recipe: Recipe, run: Path, losses: list[float]) -> None:
    """Train with these dev losses, whatever the model computes."""
    from unittest import mock

    from lsmoe_ds.training import loop as module

    with mock.patch.object(module, "validate", mock.Mock(side_effect=losses)):
        assert loop(topology, recipe, run) is None


def test_the_newest_checkpoints_stay_and_those_of_least_dev_loss(pool, folder):
    recipe = recipe_in(folder, steps=5, every=1)
    recipe.training = recipe.training.model_copy(update={"validate_every": 1, "keep": 1, "keep_best": 2})
    pool.run(1, with_dev_losses, recipe, folder / "best", [3.0, 1.0, 4.0, 2.0, 5.0])
    assert [path.name for path in list_checkpoints(folder / "best")] == ["step-2", "step-4", "step-5"]


def with_counted_validations(topology, recipe: Recipe, run: Path) -> tuple[list[int], list[str]]:
    """Return how many pairs each validation read, and what the training said to be alive meanwhile."""
    from unittest import mock

    from lsmoe_ds.training import loop as module

    read, said = [], []

    def validate(engine, batches, *rest) -> float:
        said.clear()
        read.append(sum(len(batch.source) for batch in batches))
        return 1.0

    with mock.patch.multiple(module, validate=validate, beat=said.append):
        assert loop(topology, recipe, run) is None
    return read, said


def test_a_validation_reads_as_many_pairs_of_each_direction_as_it_may(pool, folder):
    recipe = recipe_in(folder, steps=2, every=2)
    recipe.training = recipe.training.model_copy(update={"validate_every": 1, "validate_pairs": 3})
    (([read, _], said),) = pool.run(1, with_counted_validations, recipe, folder / "few")
    assert read == 3 * len(recipe.languages.directions)
    assert said.count("validating after step 2") == len(recipe.languages.directions), "one batch of each"


def seeds(checkpoint: Path, name: str) -> list[int]:
    """Return the seed from which a generator of each of the four ranks has started."""
    states = [torch.load(checkpoint / f"random-rank-{rank:05d}.pt")[name] for rank in range(4)]
    generators = [torch.Generator() for _ in states]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return [generator.initial_seed() for generator in generators]


def test_dropout_is_drawn_anew_by_each_data_rank_and_alike_by_its_tensor_parallel_peers(run):
    checkpoint = run / "checkpoints" / "step-2"
    first, peer, second, its_peer = seeds(checkpoint, "cpu")
    assert first == peer != second == its_peer
    own = seeds(checkpoint, "tracked.model-parallel-rng")
    assert len(set(own)) == 4, "in attention each draws for its own heads"
    states = [torch.load(checkpoint / f"random-rank-{rank:05d}.pt")["cpu"] for rank in range(4)]
    assert torch.equal(states[0], states[1]) and torch.equal(states[2], states[3])
    assert not torch.equal(states[0], states[2])


def given(topology, recipe: Recipe, run: Path) -> tuple:
    """Return what a rank's stream of batches, its random numbers and its validation are made from."""
    from unittest import mock

    from lsmoe_ds.parallel import compat
    from lsmoe_ds.training import loop as module

    found = []
    true_stream, true_seed, true_dev = (
        module.BatchStream,
        compat.seed_tensor_parallel_random,
        module.validation_batches,
    )

    def stream(*arguments, **options):
        found.append((arguments[4], arguments[5], options["rank"], options["world"]))
        return true_stream(*arguments, **options)

    def seed(number, tensor_rank):
        found.append((number, tensor_rank))
        return true_seed(number, tensor_rank)

    def dev(*arguments, **options):
        found.append((options["rank"], options["world"]))
        return true_dev(*arguments, **options)

    with (
        mock.patch.object(module, "BatchStream", stream),
        mock.patch.object(compat, "seed_tensor_parallel_random", seed),
        mock.patch.object(module, "validation_batches", dev),
    ):
        assert loop(topology, recipe, run) is None
    return tuple(found)


def test_each_rank_has_its_own_share_of_the_data_in_the_order_of_the_seed(pool, folder):
    recipe = recipe_of(folder, steps=1, seed=40)
    recipe.data.temperature, recipe.data.name = 3.0, "warmer"  # the vocabulary depends on it, too
    prepare(recipe)
    found = pool.run(4, given, recipe, folder / "given", tensor=2)
    for rank, (stream, (seed, tensor_rank), dev) in enumerate(found):
        assert stream == (3.0, 40, rank // 2, 2) and dev == (rank // 2, 2)
        assert tensor_rank == rank % 2 and seed == found[rank - rank % 2][1][0] >= 40
    assert found[0][1][0] == 40 != found[2][1][0]

"""A training goes on in another layout as if it had always been there: weights, optimizer state, losses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.alternating import alternating
from support.layouts import BOTH, EXPERTS, FOUR, ONE, TENSOR, load_and_save, losses, recipe_in, states, train
from support.small_run import write_corpus

from lsmoe_ds.checkpoint.optimizer import PIECES, open_optimizer
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.errors import UserError

# Reading depends on the layout before alone, and what a rank takes on that after: each comes twice.
CIRCLE = [ONE, BOTH, FOUR, EXPERTS, TENSOR, ONE]
PAIRS = [*pairwise(CIRCLE), *pairwise(CIRCLE[::-1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resharding")
    write_corpus(path)
    prepare(recipe_in(path, ONE))
    return path


@pytest.fixture(scope="module")
def begun(pool, folder):
    """Run folders after ten steps, by layout and precision."""
    known = {}

    def of(layout, bf16: bool = False):
        if (layout, bf16) not in known:
            known[layout, bf16] = folder / f"begun-{'-'.join(map(str, layout))}-{bf16}"
            train(pool, recipe_in(folder, layout, 10, bf16), known[layout, bf16], layout)
        return known[layout, bf16]

    return of


@pytest.mark.parametrize(("change", "bf16"), alternating(PAIRS[:5], [False, True]), ids=str)
def test_every_value_is_dealt_anew(pool, folder, begun, change, bf16, tmp_path):
    before, after = change
    from lsmoe_ds.checkpoint.reading import read_checkpoint

    first = begun(before, bf16) / "checkpoints" / "step-10"
    tensor, expert, world, _ = after
    pool.run(
        world,
        load_and_save,
        recipe_in(folder, after, bf16=bf16),
        first,
        tmp_path,
        tensor=tensor,
        expert=expert,
    )
    second = tmp_path / "checkpoints" / "step-10"
    shapes = {name: value.shape for name, value in read_checkpoint(first).weights.items()}
    wanted, found = states(first, shapes), states(second, shapes)
    for name, values in wanted.items():
        assert {"exp_avg", "exp_avg_sq", "weight"} <= values.keys() and values["exp_avg_sq"].any()
        for key in values.keys() & found[name].keys():
            assert torch.equal(values[key], found[name][key]), (name, key)
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize(("before", "after"), PAIRS[::2])
def test_a_training_goes_on_in_another_layout(pool, folder, begun, before, after, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(begun(before), run)
    train(pool, recipe_in(folder, after), run, after)
    whole = folder / "whole"
    if not whole.exists():
        train(pool, recipe_in(folder, ONE), whole, ONE)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


def test_a_checkpoint_that_does_not_say_what_lies_where(pool, folder, begun, tmp_path):
    import shutil

    shutil.copytree(begun(TENSOR), tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "step-10").iterdir():
        if PIECES.fullmatch(path.name):
            path.unlink()
    with pytest.raises(UserError, match="cannot resume in another layout"):
        open_optimizer(tmp_path / "run" / "checkpoints" / "step-10")


def test_the_state_of_a_run_in_16_bits_at_stage_0_is_read(tmp_path):
    """Earlier versions trained there; such a run resumes at stage 1."""
    from lsmoe_ds.parallel.deepspeed_engine import read_optimizer_file

    copies = [[torch.randn(3)], [torch.randn(2), torch.randn(1)]]
    state = {i: {"step": torch.tensor(4.0), "exp_avg": torch.randn(i + 1)} for i in range(3)}
    written = {"fp32_groups": copies, "optimizer_state_dict": {"state": state, "param_groups": []}}
    torch.save({"optimizer": written}, tmp_path / "state.pt")
    found, holders = read_optimizer_file(tmp_path / "state.pt", lambda values, path: values)
    assert found.keys() == state.keys() and torch.equal(found[2]["exp_avg"], state[2]["exp_avg"])
    assert all(map(torch.equal, holders, [copy for group in copies for copy in group]))

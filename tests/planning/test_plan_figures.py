"""What a plan takes for granted, and how it writes numbers."""

from __future__ import annotations

import pytest
from support.plans import recipe_of

from lsmoe_ds.planning.arithmetic import flops
from lsmoe_ds.planning.plan import human, in_bytes, plan


def test_sentences_are_taken_to_have_32_tokens():
    recipe = recipe_of("token", "pair")
    assert plan(recipe).flops == flops(recipe, 32) != flops(recipe, 64)
    assert plan(recipe, length=64).flops == flops(recipe, 64)


def test_a_plan_without_a_world_takes_the_fewest_ranks():
    assert plan(recipe_of("token", "token", tensor=2, expert=4)).world == 4
    assert plan(recipe_of("token", "token", tensor=4, expert=2)).world == 4
    assert plan(recipe_of("dense", "dense")).world == 1


WRITTEN = [(0, "0"), (999.4, "999"), (999.5, "1.00k"), (12_345, "12.3k"), (99_949, "99.9k"), (99_950, "100k")]
WRITTEN += [(999_499, "999k"), (999_500, "1.00M"), (533e6, "533M"), (6.52e9, "6.52B"), (1.3e13, "13.0T")]


@pytest.mark.parametrize(("number", "written"), WRITTEN)
def test_numbers_are_written_in_three_digits(number, written):
    assert human(number) == written


IN_BYTES = [(12, "12 B"), (20_582, "20.10 KiB"), (2**20, "1.00 MiB"), (5_347_234_611, "4.98 GiB")]


@pytest.mark.parametrize(("number", "written"), IN_BYTES)
def test_bytes_are_written_in_powers_of_two(number, written):
    assert in_bytes(number) == written

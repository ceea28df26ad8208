"""The tables of 64 GPUs in docs/planning.md are what the model of time says."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
from support import PROJECT

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.moe.costs import exchanges, rows_at_random
from lsmoe_ds.planning.devices import DEVICES
from lsmoe_ds.planning.times import VALUE, Cluster, estimate

CLUSTER = Cluster(64, 8, DEVICES["H100"], 50e9, 0.4)
LAYOUT = ["parallel.expert=64", "data.batch.count=128", "data.batch.tokens=8192"]
BY_TOKEN = ["model.decoder.moe.routing=token"]
NONE, ENGLISH = ["model.decoder.moe.replicas=[]"], ["model.decoder.moe.replicas=[en]"]
GROUPS = [f"model.{side}.moe.expert_groups=64" for side in ("encoder", "decoder")]
BY_NODE = [f"model.{side}.moe.expert_groups=8" for side in ("encoder", "decoder")]
CHUNKS = [f"model.{side}.moe.chunks=2" for side in ("encoder", "decoder")]
AFFINE = [*GROUPS, "model.encoder.moe.routing=task", "data.batch.languages=task-affine"]
PAIRS = ["model.decoder.moe.task=pair"]
BOTH_PAIRS = [*PAIRS, "model.encoder.moe.task=pair"]
BY_MICRO_BATCH = ["training.auxiliary_over=micro-batch"]
ROWS = [
    BY_TOKEN,
    BY_TOKEN + BY_MICRO_BATCH,
    NONE,
    NONE + BY_MICRO_BATCH,
    ENGLISH + BY_MICRO_BATCH,
    PAIRS,
    PAIRS + BY_MICRO_BATCH,
    AFFINE + NONE,
    [*AFFINE, *ENGLISH, "model.encoder.moe.replicas=[en]"],
    AFFINE + BOTH_PAIRS,
]


def paper(*changes: str) -> Recipe:
    return load_recipe(PROJECT / "recipes" / "papers" / "web-big-128.yaml", [*LAYOUT, *changes])


def table_below(heading: str, number: int = 0) -> list[list[float]]:
    """Read the numbers at the ends of the rows of a table below a heading of docs/planning.md."""
    page = (PROJECT / "docs" / "planning.md").read_text(encoding="utf-8")
    section = page.partition(f"### {heading}\n")[2].partition("\n##")[0]
    tables = [list(lines) for is_row, lines in groupby(section.splitlines(), _is_row) if is_row]
    rows = [line.strip("| ").split("|")[1:] for line in tables[number][2:]]
    return [[float(cell) for cell in row] for row in rows]


def _is_row(line: str) -> bool:
    return line.startswith("|")


def test_the_table_of_64_gpus_is_the_estimate():
    rows = table_below("128 experts on 64 GPUs, on paper")
    assert len(rows) == len(ROWS)
    for written, changes in zip(rows, ROWS, strict=True):
        whole, cut = (estimate(paper(*changes, *chunks), CLUSTER) for chunks in ([], CHUNKS))
        found = [whole.compute, whole.dispatch, whole.step, cut.dispatch, cut.step]
        assert written == pytest.approx([1e3 * value for value in found], rel=5e-3), changes


GROUPED = [  # changes, and the groups of experts
    (BY_TOKEN + BY_MICRO_BATCH, 1),
    ([*BOTH_PAIRS, "model.encoder.moe.routing=task"], 1),
    ([*BOTH_PAIRS, "model.encoder.moe.routing=task", *BY_NODE], 8),
    (AFFINE + BOTH_PAIRS, 64),
]


def test_the_table_of_rows_once_per_machine_is_the_estimate():
    nodes = CLUSTER.gpus // CLUSTER.node
    written = table_below("Rows once per machine, on paper")
    assert len(written) == len(GROUPED)
    for row, (changes, groups) in zip(written, GROUPED, strict=True):
        recipe, forwarding = paper(*changes), paper(*changes, "parallel.node=8")
        affine, tokens = recipe.data.batch.languages == "task-affine", recipe.data.batch.tokens // 2
        across = 0.0 if affine else rows_at_random(128, 2, 64, groups) * 56 / 63
        across_by_node = exchanges(forwarding, VALUE)[0].rows_of(affine).sent
        assert across_by_node == (0.0 if affine else rows_at_random(128, 2, nodes, groups))
        row_bytes = exchanges(recipe, VALUE)[0].row_bytes_inference / 2
        found = [across, across_by_node]
        found += [tokens * across / 56 * row_bytes / 1e3, tokens * across_by_node / 7 * row_bytes / 1e3]
        both = [estimate(each, CLUSTER) for each in (recipe, forwarding)]
        found += [1e3 * times.dispatch for times in both] + [1e3 * times.step for times in both]
        assert row == pytest.approx(found, rel=5e-3), changes


ON_NETWORKS = [
    [*ENGLISH, *BY_MICRO_BATCH, "model.decoder.moe.expert_groups=8"],
    GROUPED[2][0],
    GROUPED[3][0],
]


def test_the_table_of_two_networks_is_the_estimate():
    written = table_below("Rows once per machine, on paper", 1)
    cases = [(changes, rate) for changes in ON_NETWORKS for rate in (50, 12.5)]
    assert len(written) == len(cases)
    for row, (changes, rate) in zip(written, cases, strict=True):
        given, node = replace(CLUSTER, network_rate=rate * 1e9), "parallel.node=8"
        both = [[], [node], CHUNKS, [*CHUNKS, node]]
        times = [estimate(paper(*changes, *more), given) for more in both]
        assert row == pytest.approx([rate, *(1e3 * each.step for each in times)], rel=1e-3)
        assert 1e3 * times[0].gradients == pytest.approx(76 if rate == 12.5 else 19, rel=1e-2)

"""The tables of 64 GPUs in docs/planning.md are what the model of time says."""

from __future__ import annotations

from dataclasses import replace

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


def table_below(heading: str) -> list[list[float]]:
    """Read the numbers at the ends of the rows of the table below a heading of docs/planning.md."""
    page = (PROJECT / "docs" / "planning.md").read_text(encoding="utf-8")
    section = page.partition(f"### {heading}\n")[2].partition("\n##")[0]
    rows = [line.strip("| ").split("|")[1:] for line in section.splitlines() if line.startswith("|")]
    return [[float(cell) for cell in row] for row in rows[2:]]


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
    nodes, chunks = CLUSTER.gpus // CLUSTER.node, CHUNKS
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
    of_nodes = [*GROUPED[2][0], *chunks]
    for more, step in (([], 96.5), (["parallel.node=8"], 93.0)):
        assert 1e3 * estimate(paper(*of_nodes, *more), CLUSTER).step == pytest.approx(step, rel=5e-3)
    slow = replace(CLUSTER, network_rate=12.5e9)
    by_node = [*GROUPED[2][0], "parallel.node=8"]
    for changes, step in ((GROUPED[2][0], 215), (by_node, 182), ([*by_node, *chunks], 164)):
        assert 1e3 * estimate(paper(*changes), slow).step == pytest.approx(step, rel=5e-3)

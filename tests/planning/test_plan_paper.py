"""The tables of 64 GPUs in docs/planning.md are what the model of time says."""

from __future__ import annotations

import pytest
from support import PROJECT

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.moe.costs import exchanges, rows_at_random
from lsmoe_ds.planning.devices import DEVICES
from lsmoe_ds.planning.fit import VALUE, Cluster, estimate

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


def test_the_table_of_rows_once_per_node_is_the_estimate():
    """By node, a row crosses once to each node that holds any of its experts, to the rank there with the
    sender's number, which forwards it to the ranks of its experts.
    """
    nodes = CLUSTER.gpus // CLUSTER.node
    rows = table_below("Rows once per node, on paper")
    assert len(rows) == len(GROUPED)
    for written, (changes, groups) in zip(rows, GROUPED, strict=True):
        recipe = paper(*changes)
        times, tokens = estimate(recipe, CLUSTER), recipe.data.batch.tokens // 2
        leaving = rows_at_random(128, 2, 64, groups)
        across, within = leaving * 56 / 63, leaving * 7 / 63
        across_by_node = rows_at_random(128, 2, nodes, groups)
        within_by_node = leaving * 64 / 63 * 7 / 8  # from the rank that forwards them
        if recipe.data.batch.languages == "task-affine":
            across = within = across_by_node = within_by_node = 0.0
        rate = CLUSTER.device.link_rate, CLUSTER.network_rate
        flat, by_node = (
            fast / rate[0] + slow / rate[1]
            for fast, slow in ((within, across), (within_by_node, across_by_node))
        )
        dispatch = times.dispatch * (by_node / flat if flat else 1.0)
        row_bytes = exchanges(recipe, VALUE)[0].row_bytes_inference / 2
        found = [across, across_by_node]
        found += [tokens * across / 56 * row_bytes / 1e3, tokens * across_by_node / 7 * row_bytes / 1e3]
        found += [1e3 * times.dispatch, 1e3 * dispatch, 1e3 * times.step]
        found += [1e3 * (times.step - times.dispatch + dispatch)]
        assert written == pytest.approx(found, rel=5e-3), changes
    chunks = estimate(paper(*GROUPED[2][0], *CHUNKS), CLUSTER)
    assert 1e3 * chunks.step == pytest.approx(96.5, rel=5e-3), "which the page also says"

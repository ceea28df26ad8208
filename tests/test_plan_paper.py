"""The table of 64 GPUs in docs/planning.md is what the model of time says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.planning.devices import DEVICES
from lsmoe_ds.planning.fit import Cluster, estimate

PROJECT = Path(__file__).parent.parent
CLUSTER = Cluster(64, 8, DEVICES["H100"], 50e9, 0.4)
LAYOUT = ["parallel.expert=64", "data.batch.count=128", "data.batch.tokens=8192"]
BY_TOKEN = ["model.decoder.moe.routing=token"]
NONE, ENGLISH = ["model.decoder.moe.replicas=[]"], ["model.decoder.moe.replicas=[en]"]
GROUPS = [f"model.{side}.moe.expert_groups=64" for side in ("encoder", "decoder")]
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


def test_the_table_of_64_gpus_is_the_estimate():
    page = (PROJECT / "docs" / "planning.md").read_text(encoding="utf-8")
    section = page.partition("### 128 experts on 64 GPUs, on paper")[2].partition("\n## ")[0]
    rows = [
        list(map(float, cells))
        for cells in re.findall(r"^\|.*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", section, re.M)
    ]
    assert len(rows) == len(ROWS)
    for written, changes in zip(rows, ROWS, strict=True):
        recipe = load_recipe(PROJECT / "recipes" / "papers" / "web-big-128.yaml", LAYOUT + changes)
        times = estimate(recipe, CLUSTER)
        found = [1e3 * value for value in (times.compute, times.dispatch, times.step)]
        assert written == pytest.approx(found, rel=5e-3), changes

"""Which checkpoints a run keeps."""

from __future__ import annotations

import json

import pytest

from lsmoe_ds.run_folder import list_checkpoints, to_remove

DEV_LOSS = {10: 3.0, 20: 1.5, 30: None, 40: 2.0, 50: 2.5}


@pytest.mark.parametrize(
    ("keep", "best", "removed"), [(2, 0, [10, 20, 30]), (1, 1, [10, 30, 40]), (2, 2, [10, 30]), (1, 9, [30]), (9, 0, [])]
)
def test_the_newest_and_the_best_stay(tmp_path, keep, best, removed):
    for step, loss in DEV_LOSS.items():
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "dev_loss": loss}))
    assert [path.name for path in to_remove(list_checkpoints(tmp_path), keep, best)] == [f"step-{step}" for step in removed]

"""How a run folder is made, and which checkpoints it keeps."""

from __future__ import annotations

import json

import pytest
from small_run import make_recipe

from lsmoe_ds import run_folder
from lsmoe_ds.errors import UserError
from lsmoe_ds.run_folder import list_checkpoints, open_run, to_remove

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


def test_a_run_that_was_killed_while_it_was_made_is_made_again(tmp_path, monkeypatch):
    recipe, vocabulary, run = make_recipe(tmp_path, None, None), tmp_path / "vocabulary.model", tmp_path / "run"
    vocabulary.write_bytes(b"pieces")

    def killed(path, text):
        path.with_name(f".{path.name}.here.1").write_text(text[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "write_whole", killed)
        open_run(recipe, run, vocabulary)
    open_run(recipe, run, vocabulary)
    assert (run / "recipe.yaml").read_text() == recipe.to_yaml() and (run / "vocabulary.model").read_bytes() == b"pieces"

    (run / "recipe.yaml").unlink()
    (run / "vocabulary.model").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_run(recipe, run, vocabulary)

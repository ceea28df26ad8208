"""A system with a bitext too small to hold sentences out, and directions that it was not trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe, train_and_save, write_corpus

from lsmoe_ds.analysis.routing import read_routing
from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.directions import Direction, SentenceIds
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.evaluation.part import Part
from lsmoe_ds.evaluation.parts import merge
from lsmoe_ds.evaluation.scores import ScoreTable
from lsmoe_ds.inference.beam_search import Search, beam_search, never_generated
from lsmoe_ds.inference.engine import find_direction
from lsmoe_ds.inference.load import load
from lsmoe_ds.languages import EOS
from lsmoe_ds.report.report import render_report


@pytest.fixture(scope="module")
def scarce_run(pool, tmp_path_factory):
    """Train and return a run whose bitext en-xx has 9 pairs, too few to hold any out."""
    folder = tmp_path_factory.mktemp("scarce")
    write_corpus(folder)
    rows = (folder / "text.tsv").read_text().splitlines()
    rows = [
        f"{row}\t{'xx' if not n else f'{row.split(chr(9))[0]} q' if n < 10 else ''}"
        for n, row in enumerate(rows)
    ]
    (folder / "text.tsv").write_text("\n".join(rows) + "\n")
    settings = make_recipe(folder, TARGET_TOP2, TOKEN_TOP2).model_dump(mode="json")
    del settings["data"]["directions"]
    settings["data"] |= {"languages": ["de", "xx"], "vocabulary": {"size": 96}}
    recipe = Recipe.model_validate(settings)
    data = prepare(recipe)
    assert not data.text(Direction("en", "xx"), "test")[0]
    open_run(recipe, folder / "run", data.folder / "vocabulary.model")
    pool.run(1, train_and_save, recipe, folder / "run", data.vocabulary.size, tensor=1, expert=1)
    return folder / "run"


def test_a_direction_without_sentences_is_skipped_and_said(scarce_run, capsys, monkeypatch):
    run, empty = scarce_run, (Direction("en", "xx"), Direction("xx", "en"))
    table = evaluate(run, beam=1, progress=False)
    assert "lsmoe: skipped: en-xx, xx-en have no test sentences\n" in capsys.readouterr().err
    assert [str(score.direction) for score in table.directions] == [
        "en-de",
        "de-en",
    ] and table.skipped == empty
    assert ScoreTable.read(run / "scores.json") == table  # it is complete
    assert table.averages()["all"].directions == 2
    page = render_report(run)
    assert "Without sentences, and not scored: en-xx, xx-en." in page and "no complete" not in page
    assert {layer.layer for layer in read_routing(run / "routing.json")} == {1}
    (run / "scores.json").unlink()
    for number in (1, 2, 3):  # more parts than directions with text
        evaluate(run, beam=1, progress=False, part=Part(number, 3))
    merged = merge(run, 3, beam=1)
    assert merged.skipped == empty and [score.direction for score in merged.directions] == [
        score.direction for score in table.directions
    ]
    assert ScoreTable.read(run / "scores.json").sentences == table.sentences
    evaluate(run, ["en-xx", "en-de"], beam=1, limit=2, progress=False)
    assert "lsmoe: skipped: en-xx has no test sentences\n" in capsys.readouterr().err
    monkeypatch.setattr(
        "lsmoe_ds.evaluation.evaluate.load_engine", None
    )  # refused before any model is loaded
    with pytest.raises(UserError, match="en-xx has no test sentences; --test FILES scores text of your own"):
        evaluate(run, ["en-xx"], beam=1, progress=False)


def test_a_direction_that_was_not_trained(scarce_run, tmp_path, capsys):
    for code in ("de", "xx"):
        (tmp_path / f"s.{code}").write_text("kitaen mo\n")
    table = evaluate(scarce_run, ["de-xx"], beam=1, progress=False, test=[str(tmp_path / "s")])
    assert "lsmoe: the model was not trained on de-xx (zero-shot)\n" in capsys.readouterr().err
    # The target's tag and languages alone make a direction: what the system does into xx, from German text.
    loaded = load(scarce_run, "cpu")
    languages, vocabulary = loaded.languages, loaded.vocabulary
    ids = [vocabulary.tag_id("xx"), *vocabulary.encode("kitaen mo"), EOS]
    of = SentenceIds(*(torch.tensor([number]) for number in (languages.id("de"), languages.id("xx"), 0)))
    ((found,),) = beam_search(
        loaded.model, torch.tensor([ids]), of, never_generated(vocabulary), Search(1, 1.0), "specific"
    )
    assert (
        table.directions[0].samples[0].hypothesis == " ".join(vocabulary.decode(found.tokens).split()) != ""
    )
    own = "so no held-out text of it is scored: --test FILES scores text of your own"
    with pytest.raises(UserError, match=f"direction de-xx is not in this system, {own}"):
        evaluate(scarce_run, ["de-xx"], beam=1, progress=False)
    assert find_direction(loaded, Direction("deu", "xx")) == Direction("de", "xx")
    assert find_direction(loaded, Direction("deu", "en")) == Direction("de", "en")
    with pytest.raises(UserError, match="language 'fr' is not in this system"):
        find_direction(loaded, Direction("de", "fr"))
    with pytest.raises(
        UserError, match="direction de-xx is not in this system"
    ):  # as of a folder of one direction
        find_direction(replace(loaded, kind="dense"), Direction("de", "xx"))

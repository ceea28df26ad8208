"""Where scores lie: names of questions, which evaluation is complete, and which one stands for the run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.invented_scores import fake

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.convert.model_card import model_card
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.score_folder import ScoreFolder, fullest
from lsmoe_ds.evaluation.scores import ScoreTable

EN_DE, DE_EN = Direction("en", "de"), Direction("de", "en")
BOTH = (EN_DE, DE_EN)


def table(*directions: str, **changes: object) -> ScoreTable:
    """Scores of step 200; of both directions, unless some are named."""
    asked = tuple(map(Direction.parse, directions)) or None
    scores = tuple(fake(direction, 30) for direction in directions or map(str, BOTH))
    return replace(ScoreTable("demo", 200, "test", 5, 1.0, scores, asked=asked), **changes)


def test_the_name_of_a_question_tells_what_differs_from_a_complete_evaluation() -> None:
    many = tuple(Direction("en", f"{a}{b}") for a in "abcdef" for b in "klm")
    for changes, name in (
        ({}, "step-200.test.beam-5"),
        ({"step": 20, "split": "dev", "beam": 1}, "step-20.dev.beam-1"),
        ({"length_penalty": 0.6}, "step-200.test.beam-5.penalty-0.6"),
        ({"route": "shared", "limit": 20}, "step-200.test.beam-5.shared.limit-20"),
        (
            {"tokenize": "spm-0123456789ab", "comet": "comet-ab"},
            "step-200.test.beam-5.tok-spm-0123456789ab.comet-ab",
        ),
        ({"asked": (EN_DE,)}, "step-200.test.beam-5.en-de"),
        ({"asked": (EN_DE, DE_EN)}, "step-200.test.beam-5.de-en+en-de"),
        ({"asked": (DE_EN, EN_DE)}, "step-200.test.beam-5.de-en+en-de"),
    ):
        assert table(**changes).question == name
    names = {table(asked=many).question, table(asked=many[1:]).question, table(asked=many[:-1]).question}
    assert len(names) == 3 and all(
        (len(name) < 60 and "7-directions-" in name) or "18-directions-" in name for name in names
    )


def test_what_is_complete_and_how_it_is_said() -> None:
    for made, said in (
        (table(), "Step 200, test set, 20 sentences, beam 5."),
        (table("en-de", "de-en"), "Step 200, test set, 20 sentences, beam 5."),
        (
            table(route="shared", length_penalty=0.6),
            "Step 200, test set, 20 sentences, beam 5, length penalty 0.6, shared route.",
        ),
        (
            replace(table("en-de"), asked=None, skipped=(DE_EN,)),
            "Step 200, test set, 10 sentences, beam 5. Without sentences, and not scored: de-en.",
        ),
    ):
        assert made.covers(BOTH) and made.describe(BOTH) == said
    for made, lack in (
        (table(limit=7), "only the first 7 sentences of each direction"),
        (table("en-de"), "only 1 of 2 directions"),
        (table(tokenize="char"), "BLEU by the tokenizer char"),
        (table(split="dev"), "not the test set"),
        (table("en-de", limit=7), "only the first 7 sentences of each direction, only 1 of 2 directions"),
    ):
        assert not made.covers(BOTH) and made.describe(BOTH).endswith(
            f". This is no complete evaluation: {lack}."
        )
    assert table("en-de").covers([EN_DE])


def test_the_fullest_evaluation() -> None:
    ordered = [
        table(step=300),
        table(),
        table(beam=4),
        table(step=100),
        table(route="shared", step=400),
        table("en-de", "de-en", limit=9, step=500),
        table("en-de", step=600),
        table(split="dev", step=700),
    ]
    for first in range(len(ordered)):
        for tables in (ordered[first:], ordered[first:][::-1]):
            assert fullest(tables, BOTH) is ordered[first]
    assert fullest(ordered, BOTH, step=100) is ordered[3]
    assert fullest([], BOTH) is None and fullest([table("en-de")], [DE_EN]) is None


def test_scores_json_is_the_latest_complete_evaluation(tmp_path) -> None:
    folder = ScoreFolder(tmp_path)
    folder.check()

    def write(made: ScoreTable) -> ScoreTable:
        folder.make(made.question)
        folder.write(made, BOTH)
        assert ScoreTable.read(folder.record(made.question)) == made
        return ScoreTable.read(tmp_path / "scores.json")

    with pytest.raises(UserError, match="there are no scores"):
        write(table("en-de"))
    first = table(beam=2)
    assert write(first) == first  # the first complete one, whatever its search
    assert write(table()) == table() == write(table(beam=1))  # the usual search comes before others
    for other in (
        table(step=100),
        table(limit=3),
        table(split="dev"),
        table(route="shared"),
        table(tokenize="13a"),
        table("en-de"),
    ):
        assert write(other) == table()
    assert write(table(step=300, beam=2)) == table(step=300, beam=2) == write(table(step=200))
    assert write(table(step=300)) == table(step=300)
    (tmp_path / "scores.json").write_text("{")
    assert write(table()) == table()


def test_scores_of_an_earlier_version(tmp_path) -> None:
    new = {"question", "asked", "skipped", "tokenize"}
    for name, before, question in (
        ("complete", table(), "step-200.test.beam-5"),
        ("partial", table("en-de", limit=5), "step-200.test.beam-5.limit-5.en-de"),
    ):
        folder = ScoreFolder(tmp_path / name)
        folder.check()
        old = {key: value for key, value in json.loads(before.to_json()).items() if key not in new}
        (folder.home / "scores.json").write_text(json.dumps(old))
        assert folder.best(BOTH).directions == before.directions and folder.best(BOTH).covers(BOTH) == (
            name == "complete"
        )
        (folder.home / "scores").mkdir()
        folder.write(table(step=300), BOTH)  # what it replaces is kept
        assert ScoreTable.read(folder.home / "scores.json") == table(step=300)
        assert ScoreTable.read(folder.record(question)) == before


def test_the_model_card_quotes_complete_scores_of_its_direction_and_says_which(tmp_path) -> None:
    folder = ScoreFolder(tmp_path)
    folder.check()
    for made in (
        table("en-de", limit=2, step=900),
        replace(table("en-de"), directions=(fake("en-de", 44),)),
        table("de-en", step=300),
        replace(table(step=100), directions=(fake("en-de", 33), fake("de-en", 33))),
        replace(table("en-de", route="shared"), directions=(fake("en-de", 55),)),
    ):
        (tmp_path / "scores").mkdir(exist_ok=True)
        folder.write(made, BOTH)
    settings = {
        "name": "x",
        "data": {"corpora": ["django"], "directions": ["en-de"]},
        "model": {"preset": "transformer-tiny"},
    }
    recipe = Recipe.model_validate({**settings, "training": {"steps": 1}, "deepspeed": {}})
    made = {
        "run": "demo",
        "step": 200,
        "route": "specific",
        "version": "0",
        "sparse_parameters": 1,
        "dense_parameters": 1,
    }
    card = model_card("dense", recipe, made, tmp_path)
    assert (
        "Step 200, test set, 10 sentences, beam 5.\n" in card
        and "| en-de | 22.0 | 45.0 | 10 |" in card
        and "no complete" not in card
    )
    assert "| en-de | 16.5 | 34.0 | 10 |" in model_card("dense", recipe, made | {"step": 100}, tmp_path)
    shared = model_card("dense", recipe, made | {"route": "shared"}, tmp_path)
    assert "shared route." in shared and "| en-de | 27.5 | 56.0 | 10 |" in shared
    for path in (tmp_path / "scores").glob("*.json"):
        if "limit" not in path.name:
            path.unlink()
    (tmp_path / "scores.json").unlink()
    card = model_card("dense", recipe, made, tmp_path)
    assert "This is no complete evaluation: only the first 2 sentences of each direction." in card

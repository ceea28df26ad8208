"""Scores of labels and answers against seqeval and the script of SQuAD v1.1, and what tables hold of them."""

from __future__ import annotations

import importlib
import json
import random
from dataclasses import replace

import pytest
from rich.console import Console
from seqeval.metrics import f1_score, precision_score, recall_score
from support.labelled_scores import tagged

from lsmoe_ds.config.codes import read_direction
from lsmoe_ds.config.data import Data
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.compare import compare_runs
from lsmoe_ds.evaluation.direction_scores import Sample, score_direction
from lsmoe_ds.evaluation.labelled import join_answers, score_answers, score_language, score_tags
from lsmoe_ds.evaluation.metrics import TASKS
from lsmoe_ds.evaluation.scores import ScoreTable

DE = Direction("de", "de")
# A prediction, its right answers, and the F1 and the exact match that the official script gives.
SQUAD = [
    ("the Eiffel Tower!", ["Eiffel Tower"], 100.0, 100.0),
    ("in the year 1889", ["1889", "March 1889"], 50.0, 0.0),
    ("Gustave", ["Gustave Eiffel"], 66.66666666666666, 0.0),
    ("Paris Paris", ["Paris"], 66.66666666666666, 0.0),
    ("London", ["Paris"], 0.0, 0.0),
    ("Berlin.", ["Hamburg", "berlin"], 100.0, 100.0),
    ("1,500 men", ["1500"], 66.66666666666666, 0.0),
    ("state-of-the-art", ["stateoftheart"], 100.0, 100.0),
    ("The", ["a"], 0.0, 100.0),
    ("", ["x"], 0.0, 0.0),
    ("die Stadt", ["Stadt"], 66.66666666666666, 0.0),
    ("a Coruña", ["Coruña"], 100.0, 100.0),
    ("«Berlin»", ["Berlin"], 0.0, 0.0),
    ("東京", ["東京都"], 0.0, 0.0),
]


def test_tags_are_scored_as_by_seqeval() -> None:
    draw = random.Random(1)
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    lengths = [draw.randint(1, 12) for _ in range(40)]
    gold, predicted = ([draw.choices(labels, k=length) for length in lengths] for _ in range(2))
    found = score_tags(gold, predicted)
    assert found.as_dict() == pytest.approx(
        {
            "f1": 100 * f1_score(gold, predicted),
            "precision": 100 * precision_score(gold, predicted),
            "recall": 100 * recall_score(gold, predicted),
        }
    )
    assert 0 < found["f1"] < 100 and found["precision"] != found["recall"]


def test_tags_by_hand() -> None:
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["O", "O"]]  # one of three entities; one of two is right
    found = score_tags(gold, predicted)
    assert found.as_dict() == pytest.approx({"f1": 40, "precision": 50, "recall": 100 / 3})
    assert score_tags([["O"]], [["O"]]).as_dict() == {"f1": 0, "precision": 0, "recall": 0}
    with pytest.raises(ValueError, match="numbers of labels differ"):
        score_tags([["O", "O"]], [["O"]])


@pytest.mark.parametrize(("prediction", "answers", "f1", "exact"), SQUAD)
def test_answers_are_scored_as_by_the_script(
    prediction: str, answers: list[str], f1: float, exact: float
) -> None:
    assert score_answers([prediction], [answers]).as_dict() == {"f1": pytest.approx(f1), "exact": exact}


def test_scores_of_answers_are_means_over_questions() -> None:
    found = score_answers([each[0] for each in SQUAD], [each[1] for each in SQUAD])
    assert found.as_dict() == pytest.approx({"f1": 51.19047619047618, "exact": 35.714285714285715})


def test_lines_of_a_language() -> None:
    score = score_language("tag", DE, ["Anna lebt", "Ja"], ["B-PER O", "O"], ["B-PER O", "B-LOC"], seconds=2)
    assert score.metrics == score_tags([["B-PER", "O"], ["B-LOC"]], [["B-PER", "O"], ["O"]])
    assert (score.task, score.sentences, score.seconds, score.copy) == ("tag", 2, 2, None)
    assert score.samples[0] == Sample("Anna lebt", "B-PER O", "B-PER O")
    right = join_answers(["1889", "March\t1889\n"])
    score = score_language("answer", DE, ["When?"], ["in 1889"], [right])
    assert score.metrics.as_dict() == {"f1": pytest.approx(100 * 2 / 3), "exact": 0}
    assert score.samples == (Sample("When?", "in 1889", "1889 | March 1889"),)
    with pytest.raises(UserError, match="de has no sentences to score"):
        score_language("tag", DE, [], [], [])
    with pytest.raises(ValueError, match="1 sources, 2 hypotheses"):
        score_language("answer", DE, ["a"], ["b", "c"], ["d"])
    with pytest.raises(ValueError, match="only what is not translated"):
        score_language("translate", DE, ["a"], ["b"], ["c"])


def test_seqeval_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"pip install 'lsmoe_ds\[hosts\]'"):
        score_tags([["O"]], [["O"]])


def tables() -> list[ScoreTable]:
    asked = ScoreTable("answers", 9, "dev", limit=1, groups={"de": "low"}, asked=(DE,), task="answer")
    score = score_language("answer", DE, ["When?"], ["1889"], ["1889"])
    translated = score_direction(Direction("en", "de"), ["a"], ["b"], ["c"])
    return [
        tagged(de=80, en=90, oc=40),
        replace(asked, directions=(score,), skipped=(Direction("oc", "oc"),)),
        ScoreTable("demo", 100, "test", 4, 0.6, (translated,)),
    ]


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.task)
def test_json_round_trip(table: ScoreTable) -> None:
    assert ScoreTable.from_json(table.to_json()) == table
    value = json.loads(table.to_json())
    names = set(TASKS[table.task].titles)
    only_translated = {"copy", "weak", "signatures"}
    for score in value["directions"].values():
        assert names <= score.keys()
        assert (only_translated <= score.keys()) == table.translates
        assert (not only_translated & score.keys()) != table.translates
    assert ({"beam", "tokenize", "signatures"} <= value.keys()) == table.translates
    assert ("task" in value) != table.translates


def test_scores_of_earlier_versions_are_translations() -> None:
    metrics = {"bleu": 1.0, "chrf": 2.0, "chrfpp": 3.0}
    direction = {
        **metrics,
        "copy": {"bleu": 4.0, "chrf": 5.0, "chrfpp": 6.0},
        "sentences": 7,
        "exact": 0.25,
        "weak": 0.5,
        "seconds": 1.5,
        "signatures": {"bleu": "b", "chrf": "c", "chrfpp": "p"},
        "samples": [{"source": "a", "hypothesis": "b", "reference": "c"}],
    }
    old = {"name": "old", "step": 8, "split": "test", "beam": 4, "length_penalty": 0.6, "resources": {}}
    table = ScoreTable.from_json(json.dumps({**old, "directions": {"en-de": direction}}))
    assert (table.task, table.beam, table.asked) == ("translate", 4, (Direction("en", "de"),))
    (score,) = table.directions
    assert score.metrics.as_dict() == metrics and score.copy and score.copy["chrfpp"] == 6
    assert (score.task, score.exact, score.weak, score.signatures["chrf"]) == ("translate", 0.25, 0.5, "c")
    assert json.loads(table.to_json())["directions"]["en-de"] == direction


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"task": "tag"', '"task": "sing"', "the task 'sing' is none of translate, tag, answer"),
        ('"task": "tag"', '"task": "answer"', "'exact' is missing"),
        ('"de-de"', '"de-en"', "de-en is no language"),
    ],
)
def test_damaged_scores_are_refused(before: str, after: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScoreTable.from_json(tagged(de=80).to_json().replace(before, after))


def test_languages_are_averaged_by_their_resources_only() -> None:
    found = tagged(de=80, en=90, oc=40).averages()
    assert {name: (each.directions, each.metrics["f1"], each.copy) for name, each in found.items()} == {
        "all": (3, 70, None),
        "high": (2, 85, None),
        "low": (1, 40, None),
    }


def test_questions_name_no_search() -> None:
    table = tagged(de=80, en=90)
    assert table.question == "step-100.test"
    assert (
        replace(table, asked=(DE, Direction("en", "en")), limit=5).question == "step-100.test.limit-5.de+en"
    )
    every = [DE, Direction("en", "en"), Direction("oc", "oc")]
    assert table.describe(every) == (
        "Step 100, test set, 14 sentences. This is no complete evaluation: only 2 of 3 languages."
    )
    limited = replace(table, task="answer", limit=7, skipped=(every[2],))
    assert limited.describe(every) == (
        "Step 100, test set, 14 questions. Without questions, and not scored: oc. This is no complete "
        "evaluation: only the first 7 questions of each language."
    )


def test_table_has_the_columns_of_the_task() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tagged(de=80, en=90).render())
    text = console.export_text()
    for expected in ("language", "F1", "Precision", "Recall", "sentences", "84.0", "all languages"):
        assert expected in text
    assert "2 languages" in text and "de " in text
    for other in ("BLEU", "chrF", "copying", "direction", "de-de"):
        assert other not in text


def test_only_translations_are_compared(tmp_path) -> None:
    paths = [tmp_path / name / "scores.json" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        tagged(de=80).write(path)
    with pytest.raises(UserError, match="scores of the task tag: only translations are compared"):
        compare_runs(paths)


def test_one_language_is_no_direction_of_translation() -> None:
    assert Direction.parse("de-de") == DE and DE.alone and not Direction("en", "de").alone
    assert (str(DE), DE.label, Direction("en", "de").label) == ("de-de", "de", "en-de")
    with pytest.raises(UserError, match="'de-de' is not a direction: both codes are de"):
        read_direction("de-de")
    with pytest.raises(ValueError, match="'de-de' is not a direction: write source-target with two diff"):
        Data.model_validate({"corpora": ["mediawiki"], "directions": ["de-de"]})
